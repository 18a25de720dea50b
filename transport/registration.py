"""The rings that this process maps, registered with CUDA, so that the device copies from and to them itself.

Copies from memory that CUDA does not know go through a buffer of the driver at a fifth of the speed. So
each ring is registered once, behind its high-water mark as it grows, by one thread in the background: a
copy that comes before it is slower and just as right. The same thread unregisters what nobody uses any
more and only then lets it be unmapped: the next ring may come to the same address, where the device would
read the bytes of the dead one.

Registered is one step after the other, each by itself, and a copy must not go across: `pieces` cuts at
every step, registered or not yet, so that it need not know.
"""

from __future__ import annotations

import logging
import mmap
import os
import queue
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import numpy as np

from transport import cudart
from transport.cudart import DeviceError

STEP = 16 << 20
"""Bytes that are registered at once, counted from the beginning of a ring's data; rings grow by as much."""

_log = logging.getLogger("tensorferry.transport")


class HostMemory(Protocol):
    """What registers: `cudart.Runtime`, or a test's own. Methods raise `DeviceError`."""

    def register(self, address: int, nbytes: int, *, read_only: bool) -> None:
        """Pin these pages and map them for the device."""

    def unregister(self, address: int) -> None:
        """Undo that."""


class Registered(NamedTuple):
    """Rings that are mapped here, bytes of them that are registered, and why no more are ("": all are).

    A ring that nobody uses any more counts until it is unmapped.
    """

    rings: int
    nbytes: int
    refused: str


class _Ring:
    """One mapping of a ring's data: what is to be registered of it and what is. Implements `shm.Watched`."""

    def __init__(self, owner: Registrar, address: int, nbytes: int, *, writable: bool) -> None:
        self.address = address
        self.nbytes = nbytes
        self.writable = writable
        self.mark = 0
        self.registered = 0  # bytes from the beginning on
        self.over = False  # unmapped: nothing may be registered here any more
        self._owner = owner

    def grown(self, mark: int) -> None:
        if mark > self.mark:
            self.mark = mark
            self._owner.wake(self)

    def ended(self, let_go: Callable[[], None]) -> None:
        self._owner.forget(self, let_go)


class Registrar:
    """Knows the rings of a process and, once started, registers them in a thread of its own."""

    def __init__(self) -> None:
        # Nothing here is guarded by a lock, since rings end in finalizers: a dictionary and a set, whose
        # single operations are whole, and one queue that may be put to from anywhere.
        self._rings: dict[int, _Ring] = {}
        self._leaving: set[_Ring] = set()  # not used any more, and not yet unmapped
        self._queue: queue.SimpleQueue[tuple[_Ring, Callable[[], None] | None]] = queue.SimpleQueue()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None
        self._refused = ""

    def watch(self, address: int, nbytes: int, writable: bool) -> _Ring:
        """Take note of a ring's data that was just mapped; see `shm.Watch`."""
        ring = self._rings[address] = _Ring(self, address, nbytes, writable=writable)
        return ring

    def start(self, open_memory: Callable[[], HostMemory]) -> None:
        """From now on register every ring, those that are there too. Only the first call matters.

        open_memory: called once in the thread; `DeviceError` from it is the reason why nothing is registered.
        """
        with self._starting:
            if self._thread is not None:
                return
            self._thread = threading.Thread(
                target=self._run, args=(open_memory,), name="tensorferry-register", daemon=True
            )
        for ring in list(self._rings.values()):
            self._queue.put((ring, None))
        self._thread.start()

    def wake(self, ring: _Ring) -> None:
        """More of a ring can be registered."""
        if self._thread is not None:
            self._queue.put((ring, None))

    def forget(self, ring: _Ring, let_go: Callable[[], None]) -> None:
        """A ring's data is not used any more: unregister it, then let it go. For finalizers."""
        self._leaving.add(ring)
        # Taken out before the thread is looked at: `start` sets the thread and then looks at the rings, so
        # that either it does not see this one or this sees the thread.
        if self._rings.get(ring.address) is ring:
            del self._rings[ring.address]
        if self._thread is None:
            self._let_go(ring, let_go)
        else:
            self._queue.put((ring, let_go))

    def pieces(self, address: int, nbytes: int) -> Iterator[tuple[int, int]]:
        """Where to cut a copy of host memory to or from a device: (start, stop) of each piece, in bytes."""
        start = 0
        for ring in list(self._rings.values()):
            if ring.address <= address < ring.address + ring.nbytes:
                first = STEP - (address - ring.address) % STEP
                for stop in range(first, nbytes, STEP):
                    yield start, stop
                    start = stop
        yield start, nbytes

    def covers(self, address: int, nbytes: int) -> bool:
        """Whether all of these bytes are registered now."""
        return any(
            ring.address <= address and address + nbytes <= ring.address + ring.registered
            for ring in list(self._rings.values())
        )

    def state(self) -> Registered:
        """What is registered now, for people and tests."""
        rings = {*list(self._rings.values()), *list(self._leaving)}
        return Registered(len(rings), sum(ring.registered for ring in rings), self._refused)

    def _let_go(self, ring: _Ring, let_go: Callable[[], None]) -> None:
        let_go()
        self._leaving.discard(ring)

    # ------------------------------------------------------------------ in the thread

    def _run(self, open_memory: Callable[[], HostMemory]) -> None:
        memory: HostMemory | None = None
        try:
            memory = open_memory()
        except DeviceError as error:
            self._refuse(str(error))
        while True:
            ring, let_go = self._queue.get()
            if let_go is None:
                if memory is not None:
                    self._register(memory, ring)
            else:
                self._unregister(memory, ring)
                self._let_go(ring, let_go)
            del ring, let_go

    def _register(self, memory: HostMemory, ring: _Ring) -> None:
        """Whole steps up to the mark, and what is left at the end of the ring."""
        while not (ring.over or self._refused):
            stop = min(ring.registered + STEP, ring.nbytes)
            if stop > ring.mark or stop == ring.registered:
                return
            try:
                memory.register(
                    ring.address + ring.registered, stop - ring.registered, read_only=not ring.writable
                )
            except DeviceError as error:
                self._refuse(str(error))
                return
            ring.registered = stop

    def _unregister(self, memory: HostMemory | None, ring: _Ring) -> None:
        ring.over = True
        registered, ring.registered = ring.registered, 0
        for start in range(0, registered, STEP):
            assert memory is not None
            try:
                memory.unregister(ring.address + start)
            except DeviceError as error:  # the context is broken: nothing is read through it any more
                self._refuse(str(error))

    def _refuse(self, reason: str) -> None:
        """Whatever failed once would fail for each ring: go on without, and say so once."""
        if not self._refused:
            self._refused = reason
            _log.warning("rings are not registered with CUDA, copies to the device are slower: %s", reason)


rings = Registrar()
"""Of this process: it has one address space, and what is registered in it is so for all of it."""


def register_rings(device: int = 0) -> None:
    """Register with CUDA every ring that this process maps, those that it maps later too.

    In the background; until then, and where it is refused (said once in the log), copies between ring and
    device take the slow way. Called by the first `send` of a CUDA tensor and by who stages.
    """

    def open_memory() -> HostMemory:
        runtime = cudart.runtime()
        runtime.use(device)
        return runtime

    rings.start(open_memory)


def try_registration() -> str:
    """Register and unregister a little shared memory as a reader of a ring maps it; why that fails, or ""."""
    descriptor = os.memfd_create("tensorferry")
    try:
        os.truncate(descriptor, mmap.PAGESIZE)
        with mmap.mmap(descriptor, mmap.PAGESIZE) as filled:
            filled[0] = 1  # a page that nobody wrote is none
        mapping = mmap.mmap(descriptor, mmap.PAGESIZE, prot=mmap.PROT_READ)
        address = int(np.frombuffer(mapping, np.uint8).ctypes.data)
        cudart.runtime().register(address, mmap.PAGESIZE, read_only=True)
        cudart.runtime().unregister(address)
    except DeviceError as error:
        return str(error)
    finally:
        os.close(descriptor)
    return ""


def registered() -> Registered:
    """What of the rings that this process maps is registered with CUDA now, and why not more."""
    return rings.state()


def _forget() -> None:
    """In a forked child: its parent's rings are not mapped, nor is the thread there."""
    global rings
    rings = Registrar()


os.register_at_fork(after_in_child=_forget)
