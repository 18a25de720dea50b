"""Where records go: addresses for a message all at once, warm ones first, in pages that are reserved.

What lies above the highest byte used so far is cold: to take it when a look would find something free
below costs a first touch of every page. So a look comes first, but only when enough cold bytes were
taken since the last one to be worth it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

from shm import layout as at
from shm import memory
from shm.errors import NoSpace, RecordTooLarge, RingFull
from shm.extents import Extents
from shm.mapping import address_of
from shm.record import Trace
from shm.segment import WriterSegment

_LOOK_FOR = 1 << 20  # cold bytes that are worth a look, which takes some 4 µs

_LINE, _PAGE, _SMALL = at.LINE, at.PAGE, at.SMALL  # of the hot path

_log = logging.getLogger("tensorferry.shm")


def space_for(nbytes: int) -> int:
    """The bytes of the ring that a record takes, what its alignment may waste included."""
    return at.round_up(nbytes, at.alignment(nbytes))


class Placement:
    """The free space of one ring, and how far its pages are reserved. For the writer, under its lock.

    `look` frees what nobody has open and says how many records that was.
    """

    def __init__(
        self,
        segment: WriterSegment,
        *,
        share: float,
        growth: int,
        spare: int,
        look: Callable[[], int],
        trace: Trace | None,
    ) -> None:
        self.capacity = segment.layout.capacity
        self.limit = int(self.capacity * share)  # of one reader, in bytes
        self.highest = 0
        self.short: NoSpace | None = None  # why the capacity is lower than asked for
        self._segment = segment
        self._share = share
        self._growth = at.round_up(growth, at.PAGE)
        self._spare = spare  # bytes of /dev/shm that growing leaves free
        self._look = look
        self._trace = trace
        self._extents = Extents(self.capacity)
        self._cold = 0  # bytes placed above `highest` since the last look
        self._ahead: threading.Thread | None = None
        self._tried_from = -1  # the mark from which a step ahead was tried
        self._address = address_of(segment.data)

    @property
    def largest_free(self) -> int:
        return self._extents.largest()

    def place(self, sizes: Sequence[int]) -> list[int]:
        """Addresses for records of all these sizes. `RingFull` or `NoSpace`, and nothing is taken."""
        offsets = self._place_one(sizes[0]) if len(sizes) == 1 else self._place_all(sizes)
        if offsets is None:
            what = "hole" if self._extents.free >= sum(sizes) else "bytes"
            raise RingFull(f"no room for {memory.human(sum(sizes))}", what=what)
        end = _end(offsets, sizes)
        if end > self.highest:
            try:
                self._grow(end)
            except NoSpace as error:
                self._take_back(offsets, sizes)
                self._shrink(error, sizes)
                return self.place(sizes)
            self.highest = end
        return offsets

    def give_back(self, offset: int, nbytes: int) -> None:
        """The bytes of a record are free."""
        self._extents.release(offset, nbytes + -nbytes % _LINE)

    def check(self, sizes: Sequence[int]) -> None:
        """`RecordTooLarge` or `NoSpace` if these sizes can never be placed, however empty the ring is."""
        total = sum(map(space_for, sizes))
        layout = self._segment.layout
        if total > layout.capacity or len(sizes) > layout.slots:
            raise RecordTooLarge(
                f"{len(sizes)} records of {memory.human(total)} in all exceed the ring of"
                f" {memory.human(layout.capacity)} and {layout.slots} slots"
            )
        if total > self.capacity and self.short is not None:
            raise NoSpace(str(self.short))

    def close(self) -> None:
        """Wait for the thread that reserves the next step."""
        if self._ahead is not None:
            self._ahead.join(10)

    def _place_one(self, nbytes: int) -> list[int] | None:
        """One is taken where it stays: a large one's first place is mostly cold, behind the last one's."""
        extents, size, alignment = self._extents, *_taken(nbytes)
        start = extents.find(size, alignment)
        while start is None or self._is_cold(start + nbytes):
            if not self._look():
                break
            start = extents.find(size, alignment)
        return None if start is None else [extents.take(start, size, alignment)]

    def _place_all(self, sizes: Sequence[int]) -> list[int] | None:
        offsets = self._allocate(sizes)
        while offsets is None or self._is_cold(_end(offsets, sizes)):
            if not self._look():
                break
            if offsets is not None:
                self._take_back(offsets, sizes)
            offsets = self._allocate(sizes)
        return offsets

    def _allocate(self, sizes: Sequence[int]) -> list[int] | None:
        offsets = [-1] * len(sizes)
        # The largest first: pages beside pages, so that what fits by its sum fits an empty ring.
        for index in sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True):
            offset = self._extents.allocate(*_taken(sizes[index]))
            if offset is None:
                self._take_back(offsets, sizes)
                return None
            offsets[index] = offset
        return offsets

    def _take_back(self, offsets: Sequence[int], sizes: Sequence[int]) -> None:
        for offset, nbytes in zip(offsets, sizes, strict=True):
            if offset >= 0:
                self.give_back(offset, nbytes)

    def _is_cold(self, end: int) -> bool:
        """Whether with what ends there enough was placed above the highest byte used, since the last look."""
        above = end - self.highest
        if above <= 0:
            return False
        self._cold += above
        if self._cold < _LOOK_FOR:
            return False
        self._cold = 0
        return True

    def _grow(self, end: int) -> None:
        """Reserve pages up to `end`, and let a thread reserve and touch the step after it."""
        if end > self._segment.mark:
            step = min(at.round_up(end, self._growth), self.capacity)
            try:
                self._reserve(step)
            except NoSpace:  # perhaps less than a step is left
                if at.round_up(end, at.PAGE) == step:
                    raise
                self._reserve(at.round_up(end, at.PAGE))
        mark = self._segment.mark
        if end + self._growth // 2 > mark and mark < self.capacity and mark != self._tried_from:
            self._tried_from = mark
            self._ahead = threading.Thread(target=self._step_ahead, name="tensorferry-grow", daemon=True)
            self._ahead.start()

    def _reserve(self, mark: int) -> None:
        if self._segment.grow(mark, self._spare) and self._trace:
            self._trace("grow", {"mark": mark})

    def _step_ahead(self) -> None:
        try:
            self._reserve(min(self._segment.mark + self._growth, self.capacity))
        except NoSpace:
            return  # whoever needs the step is told
        start = at.round_up(self.highest, at.PAGE)
        memory.populate(self._address + start, self._segment.mark - start, writing=True)

    def _shrink(self, error: NoSpace, sizes: Sequence[int]) -> None:
        """Go on with the pages there are; `error` is raised where they can never suffice."""
        mark = self._segment.mark
        if not mark:
            raise error
        told, self.short = self.short, NoSpace(str(error))  # not the error, which leads to what callers hold
        if told is None:
            _log.warning("the ring stays at %s: %s", memory.human(mark), self.short)
        self.capacity = self._segment.header[at.H_LIMIT] = mark
        self.limit = int(mark * self._share)
        self._extents.drop_above(mark)
        self.check(sizes)


def _taken(nbytes: int) -> tuple[int, int]:
    """The bytes that a record takes, and their alignment."""
    return nbytes + -nbytes % _LINE, _PAGE if nbytes >= _SMALL else _LINE


def _end(offsets: Sequence[int], sizes: Sequence[int]) -> int:
    if len(offsets) == 1:
        return offsets[0] + sizes[0]
    return max(offset + nbytes for offset, nbytes in zip(offsets, sizes, strict=True))
