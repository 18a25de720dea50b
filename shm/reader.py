"""A reader's side of a ring: attach, open records as read-only arrays, release them by dropping them.

A lease is a numpy array: it, every view, tensor, `Parameter`, dlpack capsule or storage made from it
keeps the record, and the death of the array releases with a single store. That may happen in any
thread, in the middle of any function, at any time: it takes no lock and calls nothing that does.
"""

from __future__ import annotations

import math
import os
import threading
import time
import weakref
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from shm import layout as at
from shm import memory, segment
from shm.errors import RingClosed, StaleHandle, Stalled
from shm.handle import Handle, Offer
from shm.liveness import started
from shm.mapping import lineage
from shm.record import Trace
from shm.tenure import Tenure, Watch
from shm.words import TOTAL_STORE_ORDER, fence, fence_in_finalizer

_FINALIZER_MAY_TAKE = 1.0  # seconds between the death of a view and the store of its finalizer
_ASK_EVERY = 16  # looks at a record that is being filled, until its writer's lock is asked
_YIELDS, _NAP = 100, 50e-6  # how often to yield while the writer is in mid-step, and to sleep afterwards
# Who waits for a copy assumes so many bytes per second until it has seen some, and sleeps for this part of
# the time that is left at that speed.
_FAST, _EARLY, _LONGEST_NAP = 16e9, 0.5, 10e-3

View = NDArray[np.uint8]


class _Lease(weakref.ref[View]):
    """A weak reference to a view that knows what to store when the view is gone.

    It does what `weakref.finalize` would do at exit=False, in a third of the time, and is the reference
    by which a second `open` finds the view, too. `_leases` keeps it alive, as `finalize` keeps itself.
    """

    __slots__ = ("column", "nbytes", "offset", "pid", "tenure", "word")

    column: memoryview
    word: int
    pid: int
    tenure: Tenure  # of the mapping and the lock, held by this reference until the view is gone
    offset: int
    nbytes: int


_leases: dict[int, _Lease] = {}


def _release(
    lease: weakref.ref[View],
    # Bound here, since at exit the module's names may be gone before the last view.
    _leases: dict[int, _Lease] = _leases,
    _getpid: Callable[[], int] = os.getpid,
) -> None:
    """The end of a view: one store, in the process that attached and nowhere else."""
    gone = _leases.pop(id(lease))
    if _getpid() == gone.pid:
        if not TOTAL_STORE_ORDER:
            fence_in_finalizer()  # SYNC release: the reads of the record before the store
        gone.column[gone.word] = 0


class RingReader:
    """One reader's column in one segment.

    Taking the offer locks the column, clears it and writes the challenge there, which is the proof
    that this process maps the writer's memory. Nothing may be opened before the writer said that it
    admitted the column. `trace`, if given, is called as trace(event, fields) when a record is about to
    be opened and when it is: opening, opened. `watch` hears of the mapping, its growth and its end.
    Raises `SegmentMissing`, `LayoutMismatch`, `AdmissionFailed` or `NoSpace`.
    """

    def __init__(
        self, offer: Offer, name: str, *, trace: Trace | None = None, watch: Watch | None = None
    ) -> None:
        self._segment = segment.attach(offer.name, offer.column, offer.challenge, watch)
        layout = self._segment.layout
        self.identity = self._segment.identity  # the number by which handles name this segment
        self.column = self._segment.index
        self.opened = 0
        self._slots, self._capacity = layout.slots, layout.capacity
        self._header, self._words = self._segment.header, self._segment.column
        self._first_line, self._opened_word = layout.slot_word(0), layout.opened_word
        self._leases: dict[int, _Lease] = {}  # by slot, the last one; its view may be gone
        self._opening = threading.Lock()
        self._populated = 0
        self._pid, self._lineage = os.getpid(), lineage()
        self._closed = False
        self._trace = trace
        self._write_column(offer.challenge, name)

    def writer_alive(self) -> bool:
        """Whether the writer's lock is held; slow is not dead. `RingClosed` after `close`."""
        return self._segment.writer_alive()

    def check(self, handle: Handle) -> None:
        """`StaleHandle` unless the numbers are possible in this segment; touches no shared memory."""
        identity, slot, generation, offset, nbytes = handle
        if identity != self.identity:
            raise StaleHandle("the handle is for another segment")
        if not (0 <= slot < self._slots and 0 < generation <= at.MAX_GENERATION):
            raise StaleHandle(f"slot {slot}, generation {generation}: no such record can be")
        if not (nbytes > 0 and 0 <= offset <= self._capacity - nbytes and offset % at.LINE == 0):
            raise StaleHandle(f"{nbytes} bytes at {offset}: outside the data")

    def open(self, handle: Handle, *, timeout: float = 1.0, early: bool = False) -> View:
        """The bytes of a record, read-only, shape [nbytes]; released when the last view of them goes.

        `early`: do not wait until the writer has filled all of it; `filled` tells how far it is.
        `StaleHandle` when the record is not there (any more), whatever the reason; `Stalled` when the
        writer lives but has stopped in mid-step for `timeout` seconds: the handle stays good.
        `RingClosed` after `close` and in a forked child.
        """
        self.check(handle)
        _, slot, generation, offset, nbytes = handle
        word = at.C_HAZARD + slot
        with self._opening:
            self._usable()
            words = self._words
            if words[word]:
                living = self._living(handle)
                if living is not None:
                    self._await_line(handle, timeout, early)  # whoever opened it may have come early
                    return living
            lease: _Lease | None = None
            words[word] = generation
            try:
                if self._trace:
                    self._trace("opening", {"slot": slot, "generation": generation})
                fence()  # SYNC open: the hazard before the line, as `reclaim` marks before it looks
                self._await_line(handle, timeout, early)
                words[self._opened_word + slot] = time.monotonic_ns()
                view = np.frombuffer(self._segment.data, np.uint8, nbytes, offset)
                lease = _Lease(view, _release)
                lease.column, lease.word, lease.tenure = words, word, self._segment.tenure
                lease.pid, lease.offset, lease.nbytes = self._pid, offset, nbytes
                self._leases[slot] = _leases[id(lease)] = lease
            except BaseException:
                # Once the lease is kept, its view's end stores the 0, and nobody else may: the slot
                # could be open again by then.
                if id(lease) not in _leases:
                    words[word] = 0
                raise
            self.opened += 1
            if offset + nbytes > self._populated:
                self._populate_ahead()
        if self._trace:
            self._trace("opened", {"slot": slot, "generation": generation})
        return view

    def is_whole(self, handle: Handle) -> bool:
        """Whether all bytes of a record that is open here are complete. `RingClosed`."""
        line = self._first_line + handle.slot * at.SLOT_WORDS
        whole: bool = self._mapped()[line + at.S_FILLED] == handle.nbytes
        if not TOTAL_STORE_ORDER:
            fence()  # SYNC publish: the count before the bytes that it counts
        return whole

    def filled(self, handle: Handle) -> int:
        """How many of the first bytes of a record that is open here are complete.

        `StaleHandle` when the writer gave it up: the rest will never come. A writer that died is told
        by `writer_alive`. `RingClosed`.
        """
        self.check(handle)
        header, line = self._mapped(), self._first_line + handle.slot * at.SLOT_WORDS
        count = int(header[line + at.S_FILLED])
        if header[line] & ~at.CLOSING != handle.generation:
            raise StaleHandle(f"the writer gave up slot {handle.slot}, generation {handle.generation}")
        if not TOTAL_STORE_ORDER:
            fence()  # SYNC publish: the count before the bytes that it counts
        return count

    def wait_filled(
        self, handle: Handle, least: int, *, timeout: float = 1.0, within: float = math.inf
    ) -> int:
        """`filled` once at least `least` of the first bytes of a record that is open here are complete.

        Fewer when `within` seconds are over. `StaleHandle` when the writer gave it up or died; `Stalled` when
        it lives but has made no progress for `timeout` seconds; `RingClosed`.
        """
        began = progressed = time.monotonic()
        first = seen = self.filled(handle)
        tries, now = 0, began
        while seen < least and now - began < within:
            # Few looks: on a machine without a free core each takes time from who is writing.
            speed = (seen - first) / (now - began) if seen > first else _FAST
            nap = max((least - seen) / speed * _EARLY, (now - progressed) / 16, _NAP)
            time.sleep(min(nap, _LONGEST_NAP, within))
            self._usable()
            count, tries, now = self.filled(handle), tries + 1, time.monotonic()
            if count > seen:
                seen, progressed = count, now
            elif tries % _ASK_EVERY == 0 and not self._segment.writer_alive():
                # Read once more: what is not there after the lock was found free will never be.
                if (seen := self.filled(handle)) < least:
                    raise StaleHandle(f"the writer died while it filled slot {handle.slot}")
            elif now - progressed > timeout:
                raise self._stalled(handle, "filling", timeout)
        return seen

    def close(self) -> None:
        """Open nothing any more. The column stays locked until the last view of its records is gone."""
        with self._opening:
            if self._closed or os.getpid() != self._pid:
                return
            self._closed = True
            self._leases.clear()
            self._words = self._header = memoryview(b"").cast("Q")
            self._segment.close()

    def _usable(self) -> None:
        if self._closed:
            raise RingClosed("this end of the ring is closed")
        if lineage() != self._lineage:
            raise RingClosed(f"this end was made in process {self._pid}, this is a child of it")

    def _mapped(self) -> memoryview:
        """Header and slot lines, for as long as they are looked at, should another thread close this end."""
        header = self._header
        self._usable()
        return header

    def _write_column(self, challenge: int, name: str) -> None:
        column = self._words
        np.frombuffer(column, np.uint64)[: at.C_HAZARD + 2 * self._slots] = 0
        encoded = name.encode()[: at.NAME_BYTES].ljust(at.NAME_BYTES, b"\0")
        for index, word in enumerate(memoryview(encoded).cast("Q")):
            column[at.C_NAME + index] = word
        column[at.C_PID] = self._pid
        column[at.C_STARTED] = started(self._pid)
        column[at.C_ATTACHED_NS] = time.time_ns()
        if not TOTAL_STORE_ORDER:
            fence()
        column[at.C_CHALLENGE] = challenge  # last: the writer scans this column once it sees it

    def _living(self, handle: Handle) -> View | None:
        """The living view of a record that is open here already; None when its slot is free to open."""
        word = at.C_HAZARD + handle.slot
        if self._words[word] != handle.generation:
            raise StaleHandle(f"slot {handle.slot} is open here in another generation")
        lease = self._leases.get(handle.slot)
        if lease is None:  # somebody else wrote into this column
            raise StaleHandle(f"slot {handle.slot} is marked as open here, and nothing opened it")
        view = lease()
        if view is not None:
            if (lease.offset, lease.nbytes) != (handle.offset, handle.nbytes):
                raise StaleHandle(f"slot {handle.slot} is open here with other bounds")
            return view
        deadline = time.monotonic() + _FINALIZER_MAY_TAKE
        while self._words[word]:  # the view is gone, and its end is just being told in some thread
            if time.monotonic() > deadline:
                raise Stalled(f"a view of slot {handle.slot} died here, but its finalizer does not end")
            time.sleep(0)
        return None

    def _await_line(self, handle: Handle, timeout: float, early: bool) -> None:
        """Wait out the writer's second look and its copy; `StaleHandle` unless the line is the handle's."""
        _, slot, generation, offset, nbytes = handle
        header, line = self._header, self._first_line + slot * at.SLOT_WORDS
        writer_died, tries, deadline = False, 0, 0.0
        while True:
            seen = header[line]
            if seen & ~at.CLOSING != generation:
                raise StaleHandle(f"slot {slot} holds generation {generation} no more")
            if header[line + at.S_OFFSET] != offset or header[line + at.S_NBYTES] != nbytes:
                raise StaleHandle(f"slot {slot} holds other bytes in generation {generation}")
            whole = early or header[line + at.S_FILLED] == nbytes
            if whole and (seen == generation or writer_died):
                break
            if writer_died:
                raise StaleHandle(f"the writer died while it filled slot {slot}")
            # The line is read again after the lock was found free: what was read before may be from
            # before the writer reclaimed it, what is read after is final.
            writer_died = not self._segment.writer_alive()
            now = time.monotonic()
            deadline = deadline or now + timeout
            if not writer_died and now > deadline:
                step = "reclaiming" if whole else "filling"
                raise self._stalled(handle, step, timeout)
            tries += 1
            time.sleep(0 if tries < _YIELDS else _NAP)
        if not TOTAL_STORE_ORDER:
            fence()  # SYNC publish: the line before the bytes

    def _stalled(self, handle: Handle, step: str, seconds: float) -> Stalled:
        header, line = self._mapped(), self._first_line + handle.slot * at.SLOT_WORDS
        return Stalled(
            f"the writer (pid {header[at.H_PID]}) stopped while {step} slot {handle.slot}: it has"
            f" {header[line + at.S_FILLED]} of {handle.nbytes} bytes, no more in {seconds:.1f} s"
        )

    def _populate_ahead(self) -> None:
        """Map the pages that the writer reserved since the last time, in the background."""
        start, end = self._populated, min(self._header[at.H_MARK], self._capacity)
        # A mark that says more than there is would have us take the pages that nobody reserved.
        if end <= start or end > self._segment.reserved():
            return
        self._populated = end
        self._segment.tenure.grown(end)
        data: View = np.frombuffer(self._segment.data, np.uint8, end - start, start)
        threading.Thread(target=_populate, args=(data,), name="tensorferry-populate", daemon=True).start()


def _populate(data: View) -> None:
    memory.populate(int(data.ctypes.data), data.nbytes, writing=False)
