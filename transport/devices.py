"""Between a GPU's memory and the host's: copies on streams of their own, cut where CUDA wants them cut."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from functools import lru_cache

import torch

from transport import cudart, registration
from transport.specs import Bytes


@lru_cache(maxsize=64)
def copies_to_host(device: int) -> torch.cuda.Stream:
    """The stream on which this process copies from that device, apart from all computing."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@lru_cache(maxsize=64)
def copies_from_host(device: int) -> torch.cuda.Stream:
    """The stream on which this process copies to that device: the bus goes both ways at once."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def queued(tensor: torch.Tensor) -> torch.cuda.Event:
    """An event behind everything that this thread has queued for the tensor's device so far."""
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(tensor.device))
    return event


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous tensor, uint8 [nbytes], without a copy."""
    flat = tensor.detach().reshape(-1)
    return (flat if flat.numel() else flat.as_strided((0,), (1,))).view(torch.uint8)


def to_host(destination: Bytes, source: torch.Tensor, after: torch.cuda.Event) -> None:
    """Copy `source`, contiguous on a GPU, into `destination`, uint8 of its size; complete on return.

    after: the copy begins when this has happened. The thread sleeps meanwhile. The first call lets the
    rings of this process be registered with CUDA, which makes the next ones some five times faster.
    """
    index = source.device.index
    registration.register_rings(index)
    stream = copies_to_host(index)
    stream.wait_event(after)
    host = _address(destination)
    _queue(index, host, source.data_ptr(), pieces(host, destination.nbytes), stream)
    done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    done.record(stream)
    done.synchronize()


def from_host(destination: torch.Tensor, start: int, source: Bytes, stream: torch.cuda.Stream) -> None:
    """Queue on `stream` a copy of `source` to the bytes of `destination`, on a GPU, from `start` on.

    Both must stay as they are until an event recorded after this has happened.
    """
    host = _address(source)
    there = destination.data_ptr() + start
    _queue(destination.device.index, there, host, pieces(host, source.nbytes), stream)


def pieces(address: int, nbytes: int) -> Iterator[tuple[int, int]]:
    """Where a copy between host memory and a device is to be cut: start and stop of each piece, in bytes."""
    return registration.rings.pieces(address, nbytes)


def _queue(
    device: int, destination: int, source: int, parts: Iterator[tuple[int, int]], stream: torch.cuda.Stream
) -> None:
    """Call the runtime itself: torch's way to the same call takes 20 to 100 µs for each piece."""
    copy, handle = cudart.runtime().copy, stream.cuda_stream
    # A thread that never used CUDA would open it on device 0 by its first call.
    with nullcontext() if torch.cuda.current_device() == device else torch.cuda.device(device):
        for start, stop in parts:
            copy(destination + start, source + start, stop - start, handle)


def _address(array: Bytes) -> int:
    address: int = array.__array_interface__["data"][0]
    return address
