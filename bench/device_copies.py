"""Part 1 of `bench gpu`: single copies between host memory and the device, from memory of three kinds."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

import shm
from bench.part import Json, Report, WrongAnswerError
from transport import devices, registration
from transport.tensors import source_of

MIB = 1 << 20
RING = 1 << 30
TIMEOUT = 30.0


@contextmanager
def registered_ring(nbytes: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """A record of a ring as its writer and as a reader have it, both registered: uint8 [nbytes]."""
    watch = registration.rings.watch
    registration.register_rings()
    writer = shm.RingWriter(RING, watch=watch)
    offer = writer.offer()
    reader = shm.RingReader(offer, "bench", watch=watch)
    writer.admit(offer, "bench")
    (record,) = writer.reserve([nbytes])
    buffer = writer.buffer(record)
    buffer[:] = 1
    writer.commit([record], keep=True)
    view = reader.open(record.handle)
    deadline = time.monotonic() + TIMEOUT
    ends = (buffer.ctypes.data, view.ctypes.data)
    while not all(registration.rings.covers(end, nbytes) for end in ends):
        if time.monotonic() > deadline:
            raise TimeoutError(f"the ring was not registered: {registration.rings.state()}")
        time.sleep(0.01)
    yield torch.from_numpy(buffer), torch.from_numpy(view)
    del view
    reader.close()
    writer.close()


def copies(_folder: Path, *, sizes: list[int], times: int) -> Report:
    """Every kind of copy of every size in turn, in random order; microseconds until it is done."""
    found: dict[str, dict[str, list[float]]] = {}
    with registered_ring(max(sizes)) as (buffer, view):
        for nbytes in sizes:
            turns = _turns(buffer[:nbytes], view[:nbytes])
            found[str(nbytes)] = _timed(turns, max(3, min(times, times * 16 * MIB // nbytes)))
    checked = _check(sizes)
    values: dict[str, Json] = {"copies": found}
    return Report(values=values, expected=checked, verified=checked)


def _turns(buffer: torch.Tensor, view: torch.Tensor) -> dict[str, Callable[[], object]]:
    nbytes, seen = view.nbytes, view.numpy()
    device = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
    pinned = torch.ones(nbytes, dtype=torch.uint8).pin_memory()
    pageable = torch.ones(nbytes, dtype=torch.uint8)
    stream = devices.copies_from_host(0)
    event = devices.queued(device)

    def from_ring() -> None:
        devices.copy_in(device, 0, seen, stream)
        stream.synchronize()

    def from_pinned() -> None:
        with torch.cuda.stream(stream):
            device.copy_(pinned, non_blocking=True)
        stream.synchronize()

    def to_pinned() -> None:
        with torch.cuda.stream(stream):
            pinned.copy_(device, non_blocking=True)
        stream.synchronize()

    return {
        "ring": from_ring,
        "pinned": from_pinned,
        "pageable": lambda: device.copy_(pageable),
        "to ring": lambda: devices.to_host(buffer.numpy(), device, event),
        "to pinned": to_pinned,
        "to pageable": lambda: pageable.copy_(device),
    }


def _timed(turns: Mapping[str, Callable[[], object]], times: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in turns}
    draw = random.Random(times)
    for number in range(times + 2):
        for name in draw.sample(list(turns), len(turns)):
            start = time.perf_counter()
            turns[name]()
            seconds = time.perf_counter() - start
            if number >= 2:
                found[name].append(seconds * 1e6)
    return found


def _check(sizes: list[int]) -> int:
    """Bytes that go to the device through a ring and back through another place of it are the same."""
    for nbytes in sizes:
        data = torch.from_numpy(np.random.default_rng(nbytes).integers(0, 256, nbytes, np.uint8))
        with registered_ring(2 * nbytes) as (buffer, view):
            buffer[:nbytes] = data
            there = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
            devices.copy_in(there, 0, view[:nbytes].numpy(), devices.copies_from_host(0))
            devices.copies_from_host(0).synchronize()
            devices.to_host(buffer[nbytes:].numpy(), there, devices.queued(there))
            if not view[nbytes:].equal(data):
                raise WrongAnswerError(f"{nbytes} bytes did not come back as they went")
    return len(sizes)


def floor(_folder: Path, *, sizes: list[int], threads: list[int], times: int) -> Report:
    """A copy by the CPU into a registered ring and one to the device, one after the other, in one process."""
    found: dict[str, dict[str, list[float]]] = {}
    for nbytes in sizes:
        data = torch.from_numpy(np.random.default_rng(1).integers(0, 256, nbytes, np.uint8))
        device = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
        with registered_ring(nbytes) as (buffer, view):
            for number in threads:
                steps = _Steps(data, buffer, view, device, number)
                found[f"{nbytes} {number}"] = _timed(steps.kinds(), times)
        if not device.cpu().equal(data):
            raise WrongAnswerError("the device has other bytes")
    values: dict[str, Json] = {"floor": found}
    return Report(values=values, expected=len(sizes), verified=len(sizes))


class _Steps:
    """The two copies that no way through host memory can do without, apart, in turn and overlapped."""

    def __init__(
        self, data: torch.Tensor, buffer: torch.Tensor, view: torch.Tensor, device: torch.Tensor, threads: int
    ) -> None:
        source = source_of(data)
        assert source is not None
        self._source = source
        self._place, self._seen = buffer.numpy(), view.numpy()
        self._device, self._threads = device, threads
        self._stream = devices.copies_from_host(0)

    def kinds(self) -> dict[str, Callable[[], None]]:
        return {
            "copy": self._copy,
            "transfer": self._transfer,
            "floor": self._both,
            "overlapped": self._overlapped,
        }

    def _copy(self) -> None:
        self._source.fill(self._place, threads=self._threads)

    def _transfer(self) -> None:
        devices.copy_in(self._device, 0, self._seen, self._stream)
        self._stream.synchronize()

    def _both(self) -> None:
        self._copy()
        self._transfer()

    def _overlapped(self) -> None:
        done = 0

        def progress(filled: int) -> None:
            nonlocal done
            devices.copy_in(self._device, done, self._seen[done:filled], self._stream)
            done = filled

        self._source.fill(self._place, threads=self._threads, progress=progress)
        self._stream.synchronize()
