"""Copies to, from and on a GPU: on streams of their own, cut where CUDA wants them cut, kept until done."""

from __future__ import annotations

import atexit
import logging
import os
import queue
import threading
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import lru_cache
from typing import NamedTuple

import torch

from transport import cudart, registration
from transport.specs import Bytes

_log = logging.getLogger("tensorferry.transport")

_LAST_MOMENT = 5.0  # seconds: an exit that never ends would be worse than one by SIGABRT


class Piece(NamedTuple):
    """Memory of another process on a GPU, as this one has it open; `owner` keeps it from being used again."""

    address: int
    nbytes: int
    owner: object


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
    return _behind(torch.cuda.current_stream(tensor.device))


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
    try:
        _queue(index, host, source.data_ptr(), pieces(host, destination.nbytes), stream)
    finally:  # interrupted or not: whoever gets the destination next must not find the device writing there
        cudart.runtime().wait(_behind(stream))


def copy_out(address: int, source: torch.Tensor, after: torch.cuda.Event) -> None:
    """Copy `source`, contiguous on a GPU, to an address on the same GPU; otherwise as `to_host`."""
    index = source.device.index
    stream = copies_to_host(index)
    stream.wait_event(after)
    try:
        _queue(index, address, source.data_ptr(), [(0, source.nbytes)], stream)
    finally:  # as in `to_host`
        cudart.runtime().wait(_behind(stream))


def copy_in(
    destination: torch.Tensor, start: int, source: Bytes | Piece, stream: torch.cuda.Stream
) -> torch.cuda.Event:
    """Queue on `stream` a copy of `source` to the bytes of `destination`, on a GPU, from `start` on.

    Keeps `source` until that is done; the event says when. The destination is the caller's to keep.
    """
    there, index = destination.data_ptr() + start, destination.device.index
    if isinstance(source, Piece):
        _queue(index, there, source.address, [(0, source.nbytes)], stream)
    else:
        host = _address(source)
        _queue(index, there, host, pieces(host, source.nbytes), stream)
    done = _behind(stream)
    _kept().keep(done, source)
    return done


def after_copies(action: Callable[[], object]) -> None:
    """Call `action`, which raises nothing, in another thread once the copies queued by now are done."""
    _kept().then(action)


def pieces(address: int, nbytes: int) -> Iterable[tuple[int, int]]:
    """Where a copy between host memory and a device is to be cut: start and stop of each piece, in bytes."""
    return registration.rings.pieces(address, nbytes)


def _behind(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call] # waiting would spin otherwise
    event.record(stream)
    return event


def _queue(
    device: int, destination: int, source: int, parts: Iterable[tuple[int, int]], stream: torch.cuda.Stream
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


class Kept:
    """What copies read from, kept until they are done by one thread that waits for their events in order.

    It sleeps meanwhile. A host function in the stream (`cudaLaunchHostFunc`) would have to take the GIL while
    the stream stands still, and asking again and again would cost a core.
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[torch.cuda.Event | None, object]] = queue.SimpleQueue()
        self._letting_go = threading.Lock()
        self._ending = False
        try:
            threading.Thread(target=self._run, name="tensorferry-copied", daemon=True).start()
        except RuntimeError:
            if threading.main_thread().is_alive():  # else the interpreter ends: nothing is let go of any more
                raise
        # In a forked child the thread is not there, and what it held it holds for ever.
        atexit.register(self._end, os.getpid())

    def keep(self, done: torch.cuda.Event, source: object) -> None:
        """Keep `source` until `done` has happened, and no longer. Returns at once."""
        self._queue.put((done, source))

    def then(self, action: Callable[[], object]) -> None:
        """Call `action`, which raises nothing, in the thread once all that is kept now is let go of."""
        self._queue.put((None, action))

    def _run(self) -> None:
        while True:
            done, source = self._queue.get()
            try:
                if done is not None:
                    self._await(done)
            except cudart.DeviceError as error:  # no copy will ever end on this device
                _log.error(
                    "copies on a device fail, and what they read from is kept until this process ends, so"
                    " restart it: %s",
                    error,
                )
                self._queue.put((done, source))
                return
            with self._letting_go:
                if self._ending:
                    self._queue.put((done, source))
                    return
                if done is None and callable(source):
                    source()
                del done, source  # before the next wait, which may be long

    def _await(self, done: torch.cuda.Event) -> None:
        cudart.runtime().wait(done)

    def _end(self, process: int) -> None:
        """From now on the thread lets go of nothing; the process ends.

        Python ends a daemon thread by unwinding its stack where it next asks for the GIL. torch asks for it
        when an event was destroyed, and C++ that is unwound there aborts the process.
        """
        if os.getpid() == process:
            self._ending = True
            self._letting_go.acquire(timeout=_LAST_MOMENT)


@lru_cache(maxsize=1)
def _kept() -> Kept:
    return Kept()


os.register_at_fork(after_in_child=_kept.cache_clear)
