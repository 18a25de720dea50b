"""What each reader of a ring holds, open or on its way, and its share, which that may not exceed."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator

import numpy as np
from numpy.typing import NDArray

from shm import layout as at
from shm import memory
from shm.columns import Columns, Mask
from shm.errors import NoSpace, RecordTooLarge, RingFull
from shm.ledger import Ledger
from shm.placement import Placement
from shm.record import Holding, Lease
from shm.segment import WriterSegment


class Shares:
    """Who holds what of one ring. For the writer, under its lock."""

    def __init__(
        self, segment: WriterSegment, ledger: Ledger, columns: Columns, placement: Placement
    ) -> None:
        self._header = segment.header
        self._first_line = segment.layout.slot_word(0)
        self._ledger = ledger
        self._columns = columns
        self._placement = placement

    @property
    def limit(self) -> int:
        """How many bytes one reader may hold or be sent at a time."""
        return self._placement.limit

    def check(self, columns: Collection[int], nbytes: int) -> None:
        """`RingFull` (what="share") if any of these readers would hold more than its share with so much more.

        `RecordTooLarge` or `NoSpace` when that much can never be.
        """
        late = tuple(column for column in columns if self._is_over(column, nbytes))
        if not late:
            return
        text = f"a peer's share of the ring, {memory.human(self.limit)}"
        if nbytes > self.limit:
            if self._placement.short is not None:
                raise NoSpace(str(self._placement.short))
            raise RecordTooLarge(f"{memory.human(nbytes)} exceed {text}")
        names = ", ".join(map(self._columns.name, late))
        raise RingFull(f"{names} would hold more than {text}", what="share", columns=late)

    def _is_over(self, column: int, nbytes: int) -> bool:
        """What is counted is at least what the reader holds; only where that is too much it is looked at."""
        charged = self._ledger.charged
        if charged.get(column, 0) + nbytes <= self.limit:
            return False
        charged[column] = self._held(column, self._opened(column))
        return charged[column] + nbytes > self.limit

    def held(self, column: int) -> Holding:
        """What a reader has open or on its way, and how long the oldest of what it has open."""
        opened = self._opened(column)
        flying = [record for record in self._ledger.in_flight(column) if not opened[record.slot]]
        oldest = self._columns.oldest(column, opened)
        seconds = max(0, time.monotonic_ns() - oldest[1]) / 1e9 if oldest else 0.0
        return Holding(int(opened.sum()) + len(flying), self._held(column, opened), seconds)

    def accounts(self) -> list[str]:
        """What each reader that holds anything holds, and since when, for people."""
        found = []
        for column in self._columns.tenants:
            records, nbytes, seconds = self.held(column)
            if records:
                oldest = f", the oldest open for {seconds:.1f} s" if seconds else ""
                name = self._columns.name(column)
                found.append(f"{name} holds {records} records ({memory.human(nbytes)}){oldest}")
        return found

    def by_name(self) -> dict[str, int]:
        """What each reader holds, in bytes."""
        held: dict[str, int] = {}
        for column, tenant in self._columns.tenants.items():
            held[tenant.name] = held.get(tenant.name, 0) + self._held(column, self._opened(column))
        return held

    def oldest(self) -> Lease | None:
        """The record that has been open for longest."""
        return max(self._oldest(), key=lambda lease: lease.seconds, default=None)

    def _oldest(self) -> Iterator[Lease]:
        now = time.monotonic_ns()
        for column, tenant in self._columns.tenants.items():
            oldest = self._columns.oldest(column, self._opened(column))
            if oldest is not None:
                slot, since = oldest
                yield Lease(tenant.name, self._ledger.live[slot].nbytes, max(0, now - since) / 1e9)

    def _opened(self, column: int) -> Mask:
        return self._columns.opened(column, self._line_words(at.S_GENERATION))

    def _held(self, column: int, opened: Mask) -> int:
        flying = self._ledger.in_flight(column)
        return int(self._line_words(at.S_NBYTES)[opened].sum()) + sum(
            record.nbytes for record in flying if not opened[record.slot]
        )

    def _line_words(self, word: int) -> NDArray[np.uint64]:
        """One word of every slot line that was ever used."""
        first, used = self._first_line, self._ledger.looked_at * at.SLOT_WORDS
        lines: NDArray[np.uint64] = np.frombuffer(self._header, np.uint64)[first : first + used]
        return lines[word :: at.SLOT_WORDS]

    def close(self) -> None:
        """Let go of the mapping."""
        self._header = memoryview(b"").cast("Q")
