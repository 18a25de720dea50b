"""Transfers: the tensors of one message (or part) for one peer, on their way out and on their way in."""

from __future__ import annotations

import struct
from typing import Protocol

from transport.backends.base import Bytes
from transport.bulk.cargo import Cargo
from transport.bulk.frames import CHUNK_BYTES, HANDLE_BYTES, Damaged, Frame, Kind, encode


class Group(Protocol):
    """What a transfer has to do with those of the same bytes to other peers: `transport.bulk.crossing`."""

    def landed(self, places: bytes) -> None:
        """The one that is read by others has landed; where, empty where they cannot read it."""

    def say_again(self, outgoing: Outgoing) -> None:
        """A follower may not have heard where it is."""

    def awaits(self, outgoing: Outgoing) -> bool:
        """Whether others wait for this one to land."""

    @property
    def over(self) -> bool:
        """Whether nobody waits."""

    def not_found(self, outgoing: Outgoing) -> None:
        """A follower did not find it where it was said to be."""

    def gone(self, outgoing: Outgoing) -> None:
        """One has landed, or never will."""


class Outgoing:
    """What a peer is sent.

    `landed` may be read in any thread: the peer has all of it, and nothing is read here any more.
    """

    __slots__ = (
        "_cargo",
        "_index",
        "_sizes",
        "_start",
        "behind",
        "crossing",
        "landed",
        "neighbours",
        "number",
        "placed",
        "released",
    )

    def __init__(self, number: int, cargo: Cargo) -> None:
        self.number = number
        self.landed = False
        self.crossing: Group | None = None
        self.neighbours: list[int] = []  # who shall read it where it lands, by the sender's links
        self.behind = self.placed = False  # waits for a neighbour to have it; was told where it is
        self.released = False  # nobody waits for it but the crossing
        self._cargo: Cargo | None = cargo
        self._sizes = [piece.nbytes for piece in cargo.pieces]
        self._index = self._start = 0

    def sizes(self) -> bytes:
        """The body of its announcement: the sizes, and who shall read it where it lands."""
        words = [*self._sizes, *self.neighbours]
        return struct.pack(f"<{len(words)}Q", *words)

    @property
    def writing(self) -> bool:
        """Whether what is sent next is still to be written here."""
        return not self.sent and not self.ready

    def go_on_at(self, index: int, start: int) -> None:
        """The peer has everything before this place. `Damaged` when no chunk begins there."""
        if (
            index > len(self._sizes)
            or start % CHUNK_BYTES
            or (start and (index == len(self._sizes) or start >= self._sizes[index]))
        ):
            raise Damaged(f"credit from byte {start} of tensor {index} on")
        self._index, self._start = index, start

    def let_go(self) -> None:
        """Keep the bytes no longer."""
        self._cargo = None

    @property
    def sent(self) -> bool:
        """Whether the last chunk is out."""
        return self._index >= len(self._sizes)

    @property
    def ready(self) -> bool:
        """Whether the next chunk is written; there must be one."""
        return self._cargo is not None and self._cargo.has(self._index, self._start)

    def next_chunk(self) -> tuple[bytes, Bytes]:
        """Header and bytes of the next chunk, which must be ready."""
        assert self._cargo is not None
        index, start = self._index, self._start
        body, check = self._cargo.chunk(index, start)
        self._start += body.nbytes
        if self._start == self._sizes[index]:
            self._index, self._start = index + 1, 0
        return encode(Frame(Kind.CHUNK, self.number, index, start, body.nbytes, check)), body


class Incoming:
    """What comes from a peer. arrays: where it goes, once credit was granted for all of it.

    neighbours: who is to read it here as well. behind: it waits until a neighbour has it.
    """

    __slots__ = ("_index", "_start", "arrays", "behind", "neighbours", "number", "placed", "sizes")

    def __init__(
        self, number: int, body: bytes | memoryview, most: int, *, neighbours: int = 0, behind: bool = False
    ) -> None:
        if len(body) % 8 or len(body) > 8 * (most + neighbours) or len(body) <= 8 * neighbours:
            raise Damaged(f"an announcement of {len(body)} bytes")
        self.number = number
        words: tuple[int, ...] = struct.unpack(f"<{len(body) // 8}Q", body)
        self.sizes, self.neighbours = words[: len(words) - neighbours], words[len(words) - neighbours :]
        self.behind = behind
        self.placed: tuple[int, bytes] | None = None  # the neighbour that has it, and where
        if not all(self.sizes):
            raise Damaged("an announcement of no bytes")
        self.arrays: list[Bytes] | None = None
        self._index = self._start = 0
        self._skip()

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors."""
        return sum(self.sizes)

    @property
    def came(self) -> int:
        """How many of these have come; read in any thread."""
        return sum(self.sizes[: self._index]) + self._start

    @property
    def place(self) -> tuple[int, int]:
        """Up to which tensor, and byte of it, everything has come."""
        return self._index, self._start

    @property
    def whole(self) -> bool:
        """Whether everything has come."""
        return self._index == len(self.sizes)

    def body_of(self, chunk: Frame) -> memoryview:
        """Where the bytes of a chunk go. `Damaged` unless it is the one that follows."""
        if self.arrays is None or (chunk.index, chunk.start) != self.place or self.whole:
            raise Damaged(f"bytes at {chunk.start} of tensor {chunk.index} where {self.place} follows")
        if chunk.nbytes != min(CHUNK_BYTES, self.sizes[self._index] - self._start):
            raise Damaged(f"{chunk.nbytes} bytes at {chunk.start} of {self.sizes[self._index]}")
        return self.arrays[chunk.index].data[chunk.start : chunk.start + chunk.nbytes]

    def arrived(self, chunk: Frame) -> None:
        """A chunk is there, and right."""
        self._start += chunk.nbytes
        self._skip()

    def found_at(self, neighbour: int, places: bytes) -> None:
        """A neighbour has it, and where. `Damaged` when these cannot be so many places."""
        if len(places) > HANDLE_BYTES * len(self.sizes):
            raise Damaged(f"{len(places)} bytes to say where {len(self.sizes)} tensors are")
        self.placed = neighbour, places

    def finished(self) -> list[Bytes]:
        """The tensors' bytes, from now on read-only."""
        assert self.arrays is not None
        for array in self.arrays:
            array.flags.writeable = False
        return self.arrays

    def _skip(self) -> None:
        while self._index < len(self.sizes) and self._start == self.sizes[self._index]:
            self._index, self._start = self._index + 1, 0
