"""Who counts on which record: this process, messages in flight to readers, views of loans.

Pure bookkeeping in private memory: nothing here touches the segment. A record that nobody counts on
is idle, which is the writer's side of being free; the readers' side is their hazard words.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import deque

import numpy as np
from numpy.typing import NDArray

from shm import layout as at
from shm.record import Record

_LOOKED_AT_FIRST = 64


class Ledger:
    """The live records of one ring and their counts. For the writer, under its lock."""

    def __init__(self, slots: int) -> None:
        self.live: dict[int, Record] = {}
        self.used = 0  # bytes of live records
        self.records = 0  # ever
        self.free_slots = list(range(slots - 1, -1, -1))
        self.looked_at = min(slots, _LOOKED_AT_FIRST)  # slots from here up were never used
        self.charged: dict[int, int] = {}  # by column: at least the bytes that its reader holds
        self.returned: deque[Record] = deque()  # a loan's view is gone; appended by its finalizer
        self._slots = slots
        self._generations = [0] * slots  # the last one of each slot
        self._flying: dict[int, dict[int, int]] = {}  # column → slot → messages under way
        self._loans: dict[int, Record] = {}  # by offset
        self._loan_offsets: list[int] = []  # sorted
        words = bytearray(slots * at.WORD)
        self._idle = memoryview(words).cast("Q")
        self._idle_array: NDArray[np.uint64] = np.frombuffer(words, np.uint64)

    @property
    def idle(self) -> NDArray[np.uint64]:
        """For each slot that was ever used, the generation of its record if nobody counts on it, else 0."""
        return self._idle_array[: self.looked_at]

    def take_slot(self) -> tuple[int, int]:
        """A free slot and the generation of its next record."""
        slot = self.free_slots.pop()
        if slot >= self.looked_at:
            self.looked_at = min(self._slots, 2 * self.looked_at)
        generation = self._generations[slot] = self._generations[slot] + 1
        return slot, generation

    def add(self, record: Record) -> None:
        """A new record, which this process counts on."""
        self.live[record.slot] = record
        self.used += record.nbytes
        self.records += 1

    def remove(self, record: Record) -> None:
        """A record is no more."""
        slot = record.slot
        del self.live[slot]
        self._idle[slot] = 0
        self.free_slots.append(slot)
        self.used -= record.nbytes

    def hold(self, record: Record) -> None:
        """Count on a record once more. `ValueError` when it is gone: whoever holds must hold already."""
        if self.live.get(record.slot) is not record:
            raise ValueError(f"{record} is not live: only who counts on a record may count once more")
        record.count += 1
        self._idle[record.slot] = 0

    def let_go(self, record: Record) -> None:
        """Count once less. `ValueError` when nobody but living views of a loan counts."""
        if record.count <= record.loans:
            raise ValueError(f"{record} was dropped more often than it was held")
        record.count -= 1
        if not record.count:
            self._idle[record.slot] = record.generation

    def take_off(self, record: Record, column: int) -> None:
        """A message to a column carries the record; its count is the caller's."""
        record.addressed |= 1 << column
        flying = self._flying.setdefault(column, {})
        flying[record.slot] = flying.get(record.slot, 0) + 1
        self.charged[column] = self.charged.get(column, 0) + record.nbytes

    def land(self, record: Record, column: int) -> None:
        """A message to a column was acknowledged or lost. `ValueError` when none was under way."""
        flying = self._flying.get(column, {})
        number = flying.get(record.slot, 0)
        if not number or self.live.get(record.slot) is not record:
            raise ValueError(f"{record} is not in flight to column {column}")
        if number == 1:
            del flying[record.slot]
        else:
            flying[record.slot] = number - 1
        self.let_go(record)

    def land_everywhere(self, record: Record) -> None:
        """No message that carries the record counts any more."""
        for column, flying in self._flying.items():
            while record.slot in flying:
                self.land(record, column)

    def in_flight(self, column: int) -> list[Record]:
        """The records that messages to a column carry now."""
        return [self.live[slot] for slot in self._flying.get(column, ())]

    # ------------------------------------------------------------------ loans

    def lend(self, record: Record, *, keep: bool) -> None:
        """One more writable view of a record is made; it counts until `returned` has it.

        `keep`: beside who lends, else in its place.
        """
        if keep:
            self.hold(record)
        if not record.loans:
            self._loans[record.offset] = record
            insort(self._loan_offsets, record.offset)
        record.loans += 1

    def settle_loans(self) -> None:
        """Let go for the views that are gone."""
        while self.returned:
            record = self.returned.popleft()
            record.loans -= 1
            if not record.loans:
                del self._loans[record.offset]
                del self._loan_offsets[bisect_left(self._loan_offsets, record.offset)]
            self.let_go(record)

    def find_loan(self, offset: int, nbytes: int) -> Record | None:
        """The lent record that holds these bytes of the ring."""
        index = bisect_right(self._loan_offsets, offset) - 1
        if index < 0:
            return None
        record = self._loans[self._loan_offsets[index]]
        return record if offset + nbytes <= record.offset + record.nbytes else None
