"""What crosses between processes: the handle of a record, the offer of a segment."""

from __future__ import annotations

from typing import NamedTuple


class Handle(NamedTuple):
    """One record: segment identity, slot, generation, offset into the data, length in bytes."""

    segment: int
    slot: int
    generation: int
    offset: int
    nbytes: int


class Offer(NamedTuple):
    """What a reader needs to prove that it maps a segment: its name, a free column, a fresh challenge."""

    name: str
    column: int
    challenge: int
