"""From the sender's ring to the device that the model runs on: copied as tensors come, beside the computing.

The device reads the ring itself (`transport.register_rings`), on a stream of its own. An event behind each
copy tells two parties that it is done: the stream of the model, which waits on the device, and the thread
that lets go of the view that was copied (`transport.copy_in`).
"""

from __future__ import annotations

from typing import cast

import numpy as np
import torch

import transport


class Stager:
    """Brings the torch tensors of messages to `device`: give it to `receive(stage=…)`.

    `message.staged` is then `Staged`. On the CPU the bytes are copied at once.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = torch.empty(0, device=device).device  # with its index
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            transport.register_rings(self.device.index)
            self._stream = transport.copies_from_host(self.device.index)

    def batch(self) -> Staged:
        """For the next message."""
        return Staged(self.device, self._stream)


class Staged:
    """The tensors of one message on their way to the device. Dropping it does no harm at any time."""

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None) -> None:
        self._device = device
        self._stream = stream
        self._tensors: list[torch.Tensor] = []
        self._last: torch.cuda.Event | None = None

    def place(self, nbytes: int) -> _Place:
        """Room for one more tensor."""
        place = _Place(self, self._empty(nbytes))
        self._tensors.append(place.tensor)
        return place

    def wait(self) -> None:
        """Let what this thread queues on its current stream from now on find the tensors complete.

        Does not wait itself. The tensors may be dropped while that still runs.
        """
        if self._last is None:
            return
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(self._last)
        for tensor in self._tensors:
            tensor.record_stream(stream)  # they were allocated for the stream of the copies

    def synchronize(self) -> None:
        """Sleep until the tensors are complete."""
        if self._last is not None:
            self._last.synchronize()

    def _empty(self, nbytes: int) -> torch.Tensor:
        # For the stream of the copies: what the model's stream freed could be used there still.
        with torch.cuda.stream(self._stream):  # None: nothing happens
            return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def copy(self, destination: torch.Tensor, start: int, array: transport.Bytes | transport.Piece) -> None:
        """Queue a copy to the bytes from `start` on, which keeps `array` until it is done."""
        if self._stream is not None:
            if array.nbytes:
                self._last = transport.copy_in(destination, start, array, self._stream)
        else:
            assert isinstance(array, np.ndarray)  # a piece of a GPU comes only to who uses that GPU
            destination.numpy()[start : start + array.nbytes] = array


class _Place:
    """Where one tensor goes: uint8 [nbytes] on the device."""

    def __init__(self, staged: Staged, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self._staged = staged

    def write(self, start: int, array: transport.Bytes | transport.Piece) -> None:
        self._staged.copy(self.tensor, start, array)


def staged(message: transport.Message) -> Staged | None:
    """What a `Stager` made of the tensors of a message."""
    return cast("Staged | None", message.staged)


def choose_device(name: str, place: int = 0) -> torch.device:
    """The device that `auto`, `cpu` or `cuda` means here; of several GPUs, workers take turns by `place`.

    Raises:
        ValueError: `cuda` where torch finds none.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        raise ValueError(f"device 'cuda': torch {torch.__version__} ({build}) finds no GPU; use auto or cpu")
    if not available or name == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", place % torch.cuda.device_count())
