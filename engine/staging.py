"""From the sender's ring to the device that the model runs on: copied as tensors come, beside the computing.

The device reads the ring itself (`transport.register_rings`), on a stream of its own. An event behind each
copy tells two parties that it is done: the stream of the model, which waits on the device, and one thread
here, which then lets go of the view that was copied. That thread waits for the events in their order and
sleeps meanwhile; a host function in the stream (`cudaLaunchHostFunc`) would have to take the GIL while the
stream stands still, and asking again and again would cost a core.
"""

from __future__ import annotations

import logging
import queue
import threading
from typing import cast

import torch

import transport

_log = logging.getLogger("tensorferry.worker")


class Stager:
    """Brings the torch tensors of messages to `device`: give it to `receive(stage=…)`.

    `message.staged` is then `Staged`. On the CPU the bytes are copied at once.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = torch.empty(0, device=device).device  # with its index
        self._copier: _Copier | None = None
        if device.type == "cuda":
            transport.register_rings(self.device.index)
            self._copier = _Copier(self.device)

    def batch(self) -> Staged:
        """For the next message."""
        return Staged(self.device, self._copier)


class Staged:
    """The tensors of one message on their way to the device. Dropping it does no harm at any time."""

    def __init__(self, device: torch.device, copier: _Copier | None) -> None:
        self._device = device
        self._copier = copier
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
        if self._copier is None:
            return torch.empty(nbytes, dtype=torch.uint8)
        return self._copier.empty(nbytes)

    def copy(self, destination: torch.Tensor, start: int, array: transport.Bytes) -> None:
        """Queue a copy to the bytes from `start` on, which keeps `array` until it is done."""
        if self._copier is None:
            destination.numpy()[start : start + array.nbytes] = array
        elif array.nbytes:
            self._last = self._copier.copy(destination, start, array)


class _Place:
    """Where one tensor goes: uint8 [nbytes] on the device."""

    def __init__(self, staged: Staged, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self._staged = staged

    def write(self, start: int, array: transport.Bytes) -> None:
        self._staged.copy(self.tensor, start, array)


class _Copier:
    """The stream of the copies to one device, and the thread that lets go of what was copied."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = transport.copies_from_host(device.index)
        self._under_way: queue.SimpleQueue[tuple[torch.cuda.Event, transport.Bytes]] = queue.SimpleQueue()
        threading.Thread(target=self._let_go, name="tensorferry-staged", daemon=True).start()

    def empty(self, nbytes: int) -> torch.Tensor:
        # For this stream: what the model's stream freed could be used there still.
        with torch.cuda.stream(self._stream):
            return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def copy(self, destination: torch.Tensor, start: int, array: transport.Bytes) -> torch.cuda.Event:
        transport.from_host(destination, start, array, self._stream)
        done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        done.record(self._stream)
        self._under_way.put((done, array))
        return done

    def _let_go(self) -> None:
        while True:
            done, array = self._under_way.get()
            try:
                self._await(done)
            except RuntimeError as error:  # no copy will ever end on this device
                _log.error("a copy to the device failed, and what it read from is kept: %s", error)
                self._under_way.put((done, array))
                return
            del done, array  # before the next wait, which may be long

    def _await(self, done: torch.cuda.Event) -> None:
        done.synchronize()


def staged(message: transport.Message) -> Staged | None:
    """What a `Stager` made of the tensors of a message."""
    return cast("Staged | None", message.staged)


def choose_device(name: str) -> torch.device:
    """The device that `auto`, `cpu` or `cuda` means here.

    Raises:
        ValueError: `cuda` where torch finds none.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        raise ValueError(f"device 'cuda': torch {torch.__version__} ({build}) finds no GPU; use auto or cpu")
    return torch.device("cuda" if available and name != "cpu" else "cpu")
