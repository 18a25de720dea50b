"""What the writer knows of a record and of a reader, and what it tells about its ring."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from shm.handle import Handle

Trace = Callable[[str, Mapping[str, object]], None]


class Record:
    """Space in the ring that this process reserved; after `commit` others open it by `handle`."""

    __slots__ = (
        "aborted",
        "addressed",
        "count",
        "generation",
        "line",
        "loans",
        "nbytes",
        "offset",
        "segment",
        "slot",
    )

    def __init__(self, segment: int, slot: int, generation: int, offset: int, nbytes: int, line: int) -> None:
        self.segment = segment
        self.slot = slot
        self.generation = generation
        self.offset = offset
        self.nbytes = nbytes
        self.line = line  # the index of its slot line's first word in the header
        self.count = 1  # this process, which fills it
        self.addressed = 0  # a bit for each column that a message ever carried it to
        self.loans = 0  # views that `lend` made and that still live
        self.aborted = False

    @property
    def handle(self) -> Handle:
        """What a reader opens it by."""
        return Handle(self.segment, self.slot, self.generation, self.offset, self.nbytes)

    def __repr__(self) -> str:
        where = f"slot {self.slot}, generation {self.generation}"
        return f"<Record {where}, {self.nbytes} bytes at {self.offset}>"


@dataclass(frozen=True)
class Tenant:
    """Who has a column: the peer's name, its pid (0: unknown), when it was admitted (monotonic s)."""

    name: str
    pid: int
    since: float


class Lease(NamedTuple):
    """An open record: who has it open, how large it is, for how many seconds."""

    reader: str
    nbytes: int
    seconds: float


class Holding(NamedTuple):
    """What one reader has open or on its way: records, bytes, seconds that the oldest is open (0: none)."""

    records: int
    nbytes: int
    oldest: float


@dataclass(frozen=True)
class RingStatistics:
    """Bytes and counts of one ring, at one moment; `capacity` may be lower than asked for.

    `used` is what live records take, `mark` what pages are reserved for, `high_water` the highest byte
    ever used, `live` and `records` count the records now and ever, `readers` the bytes that each reader
    has open or on their way.
    """

    capacity: int
    used: int
    mark: int
    high_water: int
    largest_free: int
    live: int
    records: int
    readers: dict[str, int]
    oldest: Lease | None
