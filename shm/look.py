"""One look at a segment that may be living: its header, slot table and columns, for people.

Looking stores nothing and takes no page: everything is read with pread, which gives zeros for pages that
nobody reserved where a mapping would take them, and cannot end in SIGBUS. The words of a slot line belong
together (a line that changes while it is read is read again); lines among themselves may be some
microseconds apart.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from shm import layout as at
from shm.liveness import is_held, started
from shm.segment import WRITER

_READ_AGAIN = 8  # how often a line that changes is read; what changes for longer is about to go


@dataclass(frozen=True)
class ReaderInfo:
    """A living reader: `opened` records of `nbytes` bytes, the `oldest` for that many seconds (None: none).

    `pending`: records that were sent to it and that it has not opened so far, of `pending_nbytes` bytes,
    the `pending_oldest` published for that many seconds (None: none).
    """

    name: str
    pid: int
    opened: int
    nbytes: int
    oldest: float | None
    pending: int
    pending_nbytes: int
    pending_oldest: float | None

    def __str__(self) -> str:
        return f"{self.name} (pid {self.pid})"


@dataclass(frozen=True)
class RecordReader:
    """What one reader does with one record: state is open, released, not opened or gone.

    `seconds` since it was opened, for the state open; else 0.
    """

    name: str
    pid: int
    state: str
    seconds: float = 0.0


@dataclass(frozen=True)
class RecordInfo:
    """A record that stands in the slot table; bytes, and seconds since it was published."""

    slot: int
    generation: int
    offset: int
    nbytes: int
    filled: int
    age: float
    readers: tuple[RecordReader, ...]


@dataclass(frozen=True)
class SegmentInfo:
    """One name in /dev/shm. Sizes in bytes, times in seconds; zero where the header is unusable.

    `nbytes`: pages taken. `capacity`: bytes of data, fewer than asked for once there were no more pages;
    of these `mark` are reserved and `used` in `live` records, those counted that wait for the writer to
    look (it reclaims when it needs space). `unpublished`: those of them, of `unpublished_nbytes` bytes,
    that no line of the slot table has: loans that are not sent yet, tensors that are being written, go to
    another host or came from one. `made`: records ever. `largest_free`: the largest gap between records of
    the slot table, and no more than is left beside the unpublished, whose places cannot be seen: it is
    exact where there are none. `program`: the owner's, as far as it can be told in this pid namespace.
    `oldest`: the longest that any reader has had a record open, None when nobody has.
    """

    name: str
    alive: bool
    pid: int
    nbytes: int
    program: str = ""
    age: float = 0.0
    capacity: int = 0
    mark: int = 0
    live: int = 0
    used: int = 0
    unpublished: int = 0
    unpublished_nbytes: int = 0
    made: int = 0
    largest_free: int = 0
    oldest: float | None = None
    readers: tuple[ReaderInfo, ...] = ()


@dataclass(frozen=True)
class _Line:
    """The words of a slot line, read together."""

    slot: int
    generation: int
    offset: int
    nbytes: int
    filled: int
    published: int
    addressed: int


@dataclass(frozen=True)
class _Column:
    """A column at one moment; `attached` in monotonic ns."""

    index: int
    held: bool
    name: str
    pid: int
    attached: int
    hazards: memoryview
    opened: memoryview


class Look:
    """One look at an open segment."""

    def __init__(self, fd: int, layout: at.Layout) -> None:
        self._fd = fd
        self._layout = layout
        self._now = time.monotonic_ns()
        self._ahead = time.time_ns() - self._now  # of Unix time before monotonic time

    def segment(self, name: str) -> SegmentInfo:
        """What stands in all of it, under that name."""
        header = self._words(0, at.H_CHALLENGE)
        lines = self._lines()
        readers = tuple(self._reader(column, lines) for column in self._columns() if column.held)
        pid, live, used = header[at.H_PID], header[at.H_LIVE], header[at.H_USED]
        alive = is_held(self._fd, WRITER)
        # Never negative: the lines were read after the header, and either may be planted.
        unpublished = max(0, live - len(lines))
        published_nbytes = sum(line.nbytes for line in lines)
        capacity = min(header[at.H_LIMIT] or self._layout.capacity, self._layout.capacity)
        largest_free = _largest_gap(lines, capacity)
        if unpublished:
            largest_free = min(largest_free, max(0, capacity - used))
        return SegmentInfo(
            name=name,
            alive=alive,
            pid=pid,
            nbytes=os.fstat(self._fd).st_blocks * 512,
            program=_program(pid, header[at.H_STARTED]) if alive else "",
            age=max(0, self._now + self._ahead - header[at.H_CREATED_NS]) / 1e9,
            capacity=capacity,
            mark=header[at.H_MARK],
            live=live,
            used=used,
            unpublished=unpublished,
            unpublished_nbytes=max(0, used - published_nbytes) if unpublished else 0,
            made=header[at.H_RECORDS],
            largest_free=largest_free,
            oldest=max((r.oldest for r in readers if r.oldest is not None), default=None),
            readers=readers,
        )

    def records(self) -> list[RecordInfo]:
        """What stands in the slot table, by address."""
        lines = sorted(self._lines(), key=lambda line: line.offset)
        columns = self._columns({bit for line in lines for bit in _bits(line.addressed)})
        return [self._record(line, columns) for line in lines]

    def _record(self, line: _Line, columns: Sequence[_Column]) -> RecordInfo:
        readers = []
        for column in columns:
            state = self._state(line, column)
            if state:
                seconds = self._since(line, column) if state == "open" else 0.0
                readers.append(RecordReader(column.name, column.pid, state, seconds))
        place = line.slot, line.generation, line.offset, line.nbytes, line.filled
        return RecordInfo(*place, self._age(line), tuple(readers))

    def _reader(self, column: _Column, lines: Sequence[_Line]) -> ReaderInfo:
        states = [(line, self._state(line, column)) for line in lines]
        opened = [line for line, state in states if state == "open"]
        pending = [line for line, state in states if state == "not opened"]
        return ReaderInfo(
            name=column.name,
            pid=column.pid,
            opened=len(opened),
            nbytes=sum(line.nbytes for line in opened),
            oldest=max((self._since(line, column) for line in opened), default=None),
            pending=len(pending),
            pending_nbytes=sum(line.nbytes for line in pending),
            pending_oldest=max(map(self._age, pending), default=None),
        )

    def _state(self, line: _Line, column: _Column) -> str:
        """What the tenant of a column does with a record; "" when it has nothing to do with it."""
        if column.held and column.hazards[line.slot] == line.generation:
            return "open"
        # The bit is of the column's tenant at that time, who may have gone and been followed by another.
        if not line.addressed >> column.index & 1 or column.attached > line.published:
            return ""
        if not column.held:
            return "gone"
        return "released" if column.opened[line.slot] >= line.published else "not opened"

    def _age(self, line: _Line) -> float:
        """Seconds since a record was published."""
        return max(0, self._now - line.published) / 1e9

    def _since(self, line: _Line, column: _Column) -> float:
        """Seconds that a record has been open; the reader says when, a little after it is."""
        opened = column.opened[line.slot]
        return max(0, self._now - opened) / 1e9 if opened >= line.published else 0.0

    # ------------------------------------------------------------------ reading

    def _words(self, first: int, count: int) -> memoryview:
        return memoryview(os.pread(self._fd, count * at.WORD, first * at.WORD)).cast("Q")

    def _lines(self) -> list[_Line]:
        table = self._words(self._layout.slot_word(0), self._layout.slots * at.SLOT_WORDS)
        generations = table[at.S_GENERATION :: at.SLOT_WORDS].tolist()
        lines = (self._line(slot) for slot, generation in enumerate(generations) if generation)
        return [line for line in lines if line is not None]

    def _line(self, slot: int) -> _Line | None:
        """One slot line; None when there is no record, or not the same one twice."""
        word = self._layout.slot_word(slot)
        for _ in range(_READ_AGAIN):
            before, after = (self._words(word, at.SLOT_WORDS).tolist() for _ in range(2))
            before[at.S_GENERATION] &= ~at.CLOSING  # it stays until it is 0
            after[at.S_GENERATION] &= ~at.CLOSING
            if not after[at.S_GENERATION]:
                return None
            if before == after:
                return _Line(slot, *after[: at.S_MESSAGE])
        return None

    def _columns(self, also: Iterable[int] = ()) -> list[_Column]:
        """The columns that have a living tenant, and those in `also`."""
        wanted = {column for column in range(self._layout.columns) if is_held(self._fd, 1 + column)}
        return [self._column(index, index in wanted) for index in sorted(wanted | set(also))]

    def _column(self, index: int, held: bool) -> _Column:
        slots = self._layout.slots
        words = self._words(self._layout.column_offset(index) // at.WORD, at.C_HAZARD + 2 * slots)
        name = words[at.C_NAME : at.C_NAME + at.NAME_BYTES // at.WORD].tobytes()
        return _Column(
            index=index,
            held=held,
            name=_printable(name.rstrip(b"\0").decode(errors="replace")),
            pid=words[at.C_PID],
            attached=words[at.C_ATTACHED_NS] - self._ahead,
            hazards=words[at.C_HAZARD : at.C_HAZARD + slots],
            opened=words[at.C_HAZARD + slots :],
        )


def _largest_gap(lines: Sequence[_Line], capacity: int) -> int:
    """The largest part of the data that no record of the slot table takes, in bytes."""
    largest = end = 0
    for line in sorted(lines, key=lambda line: line.offset):
        largest = max(largest, min(line.offset, capacity) - end)  # what a planted line says may be anywhere
        end = max(end, at.round_up(line.offset + line.nbytes, at.LINE))
    return max(largest, capacity - end)


def _bits(mask: int) -> list[int]:
    return [bit for bit in range(at.MAX_COLUMNS) if mask >> bit & 1]


def _program(pid: int, start: int) -> str:
    """The name of the process of that number, if it is the one that started then; else ""."""
    if not start or started(pid) != start:
        return ""
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            return _printable(file.read().rstrip("\n"))
    except OSError:
        return ""


def _printable(text: str) -> str:
    """Anybody who can attach chose it, and it is shown on a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)
