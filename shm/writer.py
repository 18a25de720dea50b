"""The writer's side of a ring: reserve, fill, commit or abort; hold while in flight; reclaim; admit.

One process writes a ring, from any number of its threads. A record lives while somebody counts on it
(the process itself while it fills or lends it, each link that has a message with it in flight) or has
it open (a hazard word in an admitted column). Reclaim is the two-phase scheme of hazard pointers
(M. Michael, IEEE TPDS 15(6), 2004): mark, fence, look again, free; so that safety never rests on what
the writer believes about messages.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from itertools import repeat

import numpy as np
from numpy.typing import NDArray

from shm import layout as at
from shm import memory, segment
from shm.columns import Columns
from shm.errors import RingClosed, RingFull
from shm.handle import Offer
from shm.layout import Layout
from shm.ledger import Ledger
from shm.mapping import address_of, lineage
from shm.placement import Placement
from shm.record import Holding, Record, RingStatistics, Trace
from shm.shares import Shares
from shm.tenure import Tenure, Watch
from shm.words import TOTAL_STORE_ORDER, fence

GROWTH_BYTES = 16 << 20
_LINE_WORDS = at.SLOT_WORDS
_LOOK_EVERY = 8
_LOOK_AT_MOST = 256
_FIRST_NAP, _LONGEST_NAP = 50e-6, 2e-3
_ASK_LOCKS_EVERY = 0.1
# Seconds of waiting from which on others may not overtake, and until which: what is not free by then is
# held by long leases, and to keep the others waiting for it is no use.
_PRECEDENCE = (0.05, 1.0)


class _Loan(weakref.ref[NDArray[np.uint8]]):
    """A weak reference to a loan's view, for `_return` when that is gone: `weakref.finalize`, but faster."""

    __slots__ = ("record", "returned", "tenure")

    record: Record
    returned: deque[Record]
    tenure: Tenure  # of the mapping, held by this reference until the view is gone


_loans: dict[int, _Loan] = {}


def _return(loan: weakref.ref[NDArray[np.uint8]], _loans: dict[int, _Loan] = _loans) -> None:
    """The end of a loan, in any thread at any time: its writer is told at its next look."""
    gone = _loans.pop(id(loan))
    gone.returned.append(gone.record)


class RingWriter:
    """A ring of `capacity` bytes for up to `slots` records and `columns` readers.

    `share` is the part of the capacity (0 to 1) that one reader may hold or be sent at a time, `growth`
    the bytes of pages that are reserved at a step, `spare` those of /dev/shm that this leaves free.
    `trace`, if given, is called as trace(event, fields) at every step that another process can see:
    reserve, grow, publish, commit, closing, freed, admit.
    `watch` hears of the mapping of the data, its growth and its end.
    Raises `NoSpace` when /dev/shm or memory is short of the control pages.
    """

    def __init__(
        self,
        capacity: int,
        *,
        slots: int = 16384,
        columns: int = 64,
        share: float = 1.0,
        growth: int = GROWTH_BYTES,
        spare: int = 0,
        trace: Trace | None = None,
        watch: Watch | None = None,
    ) -> None:
        layout = Layout(at.round_up(capacity, at.PAGE), at.round_up(slots, at.SLOT_WORDS), columns)
        self._segment = segment.create(layout, watch)
        self._layout = layout
        self.identity = self._segment.identity  # the number by which handles name this segment
        self._first_line = layout.slot_word(0)
        self._header = self._segment.header
        self._trace = trace
        self._pid, self._lineage = os.getpid(), lineage()
        self._lock = threading.RLock()
        self._ledger = Ledger(layout.slots)
        self._columns = Columns(self._segment)
        self._placement = Placement(
            self._segment, share=share, growth=growth, spare=spare, look=self._look, trace=trace
        )
        self._shares = Shares(self._segment, self._ledger, self._columns, self._placement)
        self._waiting: dict[object, float] = {}  # who waits for space, in order, and since when
        self._since_look = 0
        self._closed = False
        self._array: NDArray[np.uint8] = np.frombuffer(self._segment.data, np.uint8)
        self._address = address_of(self._segment.data)

    @property
    def name(self) -> str:
        """The segment's name in /dev/shm; not for peers that were not offered it."""
        return self._segment.name

    @property
    def pid(self) -> int:
        """The process that made it, the only one that may use it."""
        return self._pid

    @property
    def capacity(self) -> int:
        """Bytes for records; lower than asked for once /dev/shm or memory turned out to be short."""
        return self._placement.capacity

    # ------------------------------------------------------------------ reserve, fill, commit, abort

    def reserve(
        self,
        sizes: Sequence[int],
        *,
        columns: Collection[int] = (),
        timeout: float = 0.0,
        poll: Callable[[], object] | None = None,
    ) -> list[Record]:
        """Space for records of these sizes (bytes, each > 0), all of it or nothing.

        `columns` are the readers whose messages will carry the records: they are counted as in flight
        there from now on. Waits `timeout` seconds at most, looking again after 50 µs, doubling to 2 ms,
        and calls `poll` each time. `RingFull` later, `RecordTooLarge` never, `NoSpace` when the ring
        cannot grow to what was asked for, `RingClosed`.
        """
        if not sizes:
            return []
        if min(sizes) <= 0:
            raise ValueError(f"a record needs at least one byte, not {min(sizes)}")
        try:
            return self._attempt(sizes, columns, None)
        except RingFull as full:
            self._placement.check(sizes)
            if timeout <= 0:
                raise RingFull(f"{full}; {self.describe()}", what=full.what, columns=full.columns) from None
        return self._wait_for_space(sizes, columns, timeout, poll)

    def buffer(self, record: Record) -> NDArray[np.uint8]:
        """The bytes of a record, writable, shape [nbytes], until `commit` or `abort`."""
        return self._array[record.offset : record.offset + record.nbytes]

    def publish(self, record: Record, message: int = 0) -> None:
        """Let readers open a record that is still being filled; `progress` and `commit` follow."""
        self._usable()
        self._store_line(record, 0, message, time.monotonic_ns())
        if self._trace:
            self._trace("publish", {"slot": record.slot, "generation": record.generation})

    def progress(self, record: Record, filled: int) -> None:
        """The first `filled` bytes of a published record are complete."""
        if not TOTAL_STORE_ORDER:
            fence()  # SYNC publish: the bytes before the word that counts them
        self._header[record.line + at.S_FILLED] = filled

    def commit(self, records: Sequence[Record], *, message: int = 0, keep: bool = False) -> None:
        """The records are complete: others may open them. `keep`: this process goes on counting on them.

        `ValueError` for a record that was given up.
        """
        self._usable()
        now = time.monotonic_ns()
        for record in records:
            if self._header[record.line] == record.generation:
                self.progress(record, record.nbytes)
            else:
                self._store_line(record, record.nbytes, message, now)
        if self._trace:
            self._trace("commit", {"records": len(records)})
        if not keep:
            self.drop(records)

    def abort(self, records: Iterable[Record]) -> None:
        """Give the space of records up, in place of `commit`; nobody may still be writing into it.

        What is open or lent already is given back when the last view of it is gone.
        """
        with self._lock:
            for record in records:
                self._ledger.land_everywhere(record)
                record.aborted = True
                if not self._closed and self._header[record.line] == record.generation:
                    # No reader may open it any more; who has it open early sees that it will never be whole.
                    self._header[record.line] = 0
                    self._header[record.line + at.S_FILLED] = 0
                self._ledger.let_go(record)
                if not record.count:
                    self._reclaim([record.slot])

    @property
    def tenure(self) -> Tenure:
        """Whoever has something else write into `buffer` keeps this meanwhile, should the ring be closed."""
        self._usable()
        return self._segment.tenure

    # ------------------------------------------------------------------ who counts on a record

    def hold(self, records: Iterable[Record], column: int | None = None) -> None:
        """Count on records once more: for a message to `column`, or for this process itself.

        Only who counts on them already may do so: `ValueError` for a record that is gone.
        """
        with self._lock:
            for record in records:
                self._ledger.hold(record)
                if column is not None:
                    self._ledger.take_off(record, column)

    def drop(self, records: Iterable[Record], column: int | None = None) -> None:
        """A message to `column` was acknowledged or lost, or this process no longer counts on them.

        `ValueError` when that was said before.
        """
        with self._lock:
            for record in records:
                if column is None:
                    self._ledger.let_go(record)
                else:
                    self._ledger.land(record, column)

    def lives(self, record: Record) -> bool:
        """Whether a record is still there, as of the last look; False once the ring is closed here."""
        with self._lock:
            return not self._closed and self._ledger.live.get(record.slot) is record

    def lend(self, record: Record, *, keep: bool = True) -> NDArray[np.uint8]:
        """A writable view that counts on the record until the last view of it is gone (a loan).

        `keep`: this process goes on counting on it, too.
        """
        with self._lock:
            self._usable()
            holder = np.frombuffer(self._segment.data, np.uint8, record.nbytes, record.offset)
            self._ledger.lend(record, keep=keep)
            loan = _Loan(holder, _return)
            loan.record, loan.returned, loan.tenure = record, self._ledger.returned, self._segment.tenure
            _loans[id(loan)] = loan
        return holder

    def check_share(self, columns: Collection[int], nbytes: int) -> None:
        """`RingFull` (what="share") if any of these readers would hold more than its share with so much more.

        For records that are there already, such as loans; `reserve` looks for itself. `RecordTooLarge` or
        `NoSpace` when that much can never be.
        """
        with self._lock:
            self._usable()
            self._shares.check(columns, nbytes)

    def find_loan(self, address: int, nbytes: int) -> tuple[Record, int] | None:
        """The loan that these bytes of this process's memory lie in, and where in it they begin."""
        offset = address - self._address
        if not 0 <= offset < self._layout.capacity:
            return None
        with self._lock:
            record = self._ledger.find_loan(offset, nbytes)
        return None if record is None else (record, offset - record.offset)

    # ------------------------------------------------------------------ readers

    def offer(self) -> Offer:
        """Name a free column and a fresh challenge for one reader. `RingFull` when none is free.

        `NoSpace` when /dev/shm has no pages for the column.
        """
        self.reap()
        with self._lock:
            self._usable()
            return self._columns.offer()

    def admit(self, offer: Offer, name: str, pid: int = 0) -> None:
        """Believe a reader that says it is ready, on the evidence of this process's own mapping.

        `AdmissionFailed` when the challenge is not in the column or nobody holds its lock.
        """
        with self._lock:
            self._usable()
            self._columns.admit(offer, name, pid)
        if self._trace:
            self._trace("admit", {"column": offer.column})

    def withdraw(self, offer: Offer) -> None:
        """The offer will not be taken up; its column is free again once its lock is."""
        with self._lock:
            if not self._closed:
                self._columns.withdraw(offer)

    def reader_alive(self, column: int) -> bool:
        """Whether a column's lock is held, by its reader or the last views of one that closed its end.

        False once the ring is closed here.
        """
        with self._lock:
            return not self._closed and self._segment.reader_alive(column)

    def reap(self) -> list[str]:
        """Stop scanning the columns whose lock is free; the names of who had them."""
        with self._lock:
            if self._closed:
                return []
            gone = self._columns.reap()
            for column in gone:
                self._ledger.charged.pop(column, None)
            return [tenant.name for tenant in gone.values()]

    def held(self, column: int) -> Holding:
        """What a reader has open or on its way, and how long the oldest of what it has open."""
        with self._lock:
            return Holding(0, 0, 0.0) if self._closed else self._shares.held(column)

    def linked(self) -> bool:
        """Whether its name is still in /dev/shm, so that others can attach. False once the ring is closed."""
        with self._lock:
            return not self._closed and self._segment.linked()

    # ------------------------------------------------------------------ looking and telling

    def look(self) -> int:
        """Free what nobody counts on and nobody has open, 256 at most; how many records that was."""
        with self._lock:
            return self._look()

    def statistics(self) -> RingStatistics:
        """What the ring holds now; the records that a look would free are freed first."""
        self.reap()
        while self.look():
            pass
        with self._lock:
            ledger, place = self._ledger, self._placement
            return RingStatistics(
                capacity=place.capacity,
                used=ledger.used,
                mark=self._segment.mark,
                high_water=place.highest,
                largest_free=place.largest_free,
                live=len(ledger.live),
                records=ledger.records,
                readers=self._shares.by_name(),
                oldest=self._shares.oldest(),
            )

    def describe(self) -> str:
        """One sentence for the person who must find out why there is no space."""
        now = self.statistics()
        with self._lock:
            accounts = self._shares.accounts()
        ring = (
            f"the ring of {memory.human(now.capacity)} has {now.live} records of"
            f" {memory.human(now.used)} in all, largest free block {memory.human(now.largest_free)}"
        )
        return "; ".join([ring, *accounts])

    def share_bytes(self) -> int:
        """How many bytes one reader may hold or be sent at a time."""
        return self._shares.limit

    def close(self) -> None:
        """Unlink the name. Readers keep what they have open or in flight; loans stay valid.

        Twice is fine; after an interrupt the second time does the rest.
        """
        if os.getpid() != self._pid:
            return
        self._closed = True
        self._placement.close()
        with self._lock, suppress(RingClosed):
            self._segment.unlink()
            self._columns.close()
            self._shares.close()
            self._header = memoryview(b"").cast("Q")
            self._array = np.empty(0, np.uint8)
            self._segment.close()

    # ------------------------------------------------------------------ inside

    def _usable(self) -> None:
        if self._closed:
            raise RingClosed("the ring is closed")
        if lineage() != self._lineage:
            raise RingClosed(f"the ring was made in process {self._pid}, this is a child of it")

    def _attempt(self, sizes: Sequence[int], columns: Collection[int], ticket: object) -> list[Record]:
        total = sizes[0] if len(sizes) == 1 else sum(sizes)
        with self._lock:
            self._usable()
            ledger = self._ledger
            for column in columns:
                if ledger.charged.get(column, 0) + total > self._placement.limit:
                    self._shares.check(columns, total)
            if self._waiting:
                self._wait_in_line(ticket)
            self._since_look += len(sizes)
            if self._since_look >= _LOOK_EVERY and self._since_look >= len(ledger.live) >> 6:
                self._look()
            if len(ledger.free_slots) < len(sizes) and not self._look_for_slots(len(sizes)):
                raise RingFull(f"all {self._layout.slots} slots are taken", what="slots")
            offsets = self._placement.place(sizes)
            records = list(map(self._start, offsets, sizes, repeat(columns)))
            self._count()
        if self._trace:
            self._trace("reserve", {"records": len(records), "nbytes": total})
        return records

    def _start(self, offset: int, nbytes: int, columns: Collection[int]) -> Record:
        ledger = self._ledger
        slot, generation = ledger.take_slot()
        line = self._first_line + slot * _LINE_WORDS
        record = Record(self.identity, slot, generation, offset, nbytes, line)
        ledger.add(record)
        for column in columns:
            record.count += 1
            ledger.take_off(record, column)
        return record

    def _store_line(self, record: Record, filled: int, message: int, now: int) -> None:
        if record.aborted:
            raise ValueError(f"{record} was given up")
        header, line = self._header, record.line
        header[line + at.S_OFFSET] = record.offset
        header[line + at.S_NBYTES] = record.nbytes
        header[line + at.S_FILLED] = filled
        header[line + at.S_PUBLISHED_NS] = now
        header[line + at.S_ADDRESSED] = record.addressed
        header[line + at.S_MESSAGE] = message
        if not TOTAL_STORE_ORDER:
            fence()
        header[line] = record.generation  # SYNC publish: last

    def _count(self) -> None:
        """For people who look from outside."""
        header, ledger = self._header, self._ledger
        header[at.H_RECORDS] = ledger.records
        header[at.H_LIVE] = len(ledger.live)
        header[at.H_USED] = ledger.used

    def _look(self) -> int:
        self._since_look = 0
        if self._closed:
            return 0
        ledger = self._ledger
        if ledger.returned:
            ledger.settle_loans()
        slots = self._columns.unopened(ledger.idle, most=_LOOK_AT_MOST)
        return self._reclaim(slots) if slots else 0

    def _look_for_slots(self, number: int) -> bool:
        while len(self._ledger.free_slots) < number:
            if not self._look():
                return False
        return True

    def _reclaim(self, slots: Sequence[int]) -> int:
        """Mark, fence, look again, free. The first look was only a filter."""
        if self._closed:
            return 0
        header, live = self._header, self._ledger.live
        marked = []
        for slot in slots:
            record = live[slot]
            # What was never published or was given up stands as 0, which no reader opens, and stays so.
            line = record.line if header[record.line] == record.generation else 0
            if line:
                header[line] = record.generation | at.CLOSING
            marked.append((record, line))
        fence()  # SYNC reclaim: the marks before the hazards, as `open` has its hazard before the line
        if self._trace:
            self._trace("closing", {"records": len(marked)})
        freed = 0
        has_reader, give_back = self._columns.has_reader, self._placement.give_back
        for record, line in marked:
            if has_reader(record.slot, record.generation):
                if line:
                    header[line] = record.generation
                continue
            if line:
                header[line] = 0
            self._ledger.remove(record)
            give_back(record.offset, record.nbytes)
            freed += 1
        self._count()
        if self._trace:
            self._trace("freed", {"records": freed})
        return freed

    # ------------------------------------------------------------------ waiting, shares

    def _wait_for_space(
        self,
        sizes: Sequence[int],
        columns: Collection[int],
        timeout: float,
        poll: Callable[[], object] | None,
    ) -> list[Record]:
        deadline = time.monotonic() + timeout
        ticket, nap, ask = object(), _FIRST_NAP, 0.0
        try:
            while True:
                now = time.monotonic()
                if now >= ask:
                    self.reap()
                    ask = now + _ASK_LOCKS_EVERY
                if poll is not None:
                    poll()
                try:
                    return self._attempt(sizes, columns, ticket)
                except RingFull as full:
                    self._placement.check(sizes)
                    if now >= deadline:
                        text = f"{full}; {self.describe()}"
                        raise RingFull(text, what=full.what, columns=full.columns) from None
                    self._stand_in_line(ticket, now, full.what)
                time.sleep(min(nap, max(0.0, deadline - now)))
                nap = min(2 * nap, _LONGEST_NAP)
        finally:
            with self._lock:
                self._waiting.pop(ticket, None)

    def _stand_in_line(self, ticket: object, now: float, what: str) -> None:
        with self._lock:
            if what == "share":  # waits for one reader, which is no reason for others to wait
                self._waiting.pop(ticket, None)
            else:
                self._waiting.setdefault(ticket, now)

    def _wait_in_line(self, ticket: object) -> None:
        """First come first served, within `_PRECEDENCE`: small ones pass, large ones do not starve."""
        now = time.monotonic()
        start, end = _PRECEDENCE
        for other, since in self._waiting.items():
            if other is ticket:
                return
            if start < now - since < end:
                raise RingFull("others have waited longer for space", what="bytes")
