"""The bytes that are sent, with the checksum of each chunk; some may still be written while others leave."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from transport.backends.base import Bytes
from transport.bulk.frames import CHUNK_BYTES, checksum
from transport.tensors import Source


class Cargo:
    """The tensors of one message, for all peers that are sent it.

    pieces: their bytes. unwritten: the numbers of those that `write` is going to fill; the others are
    complete. One thread writes, the hub's reads: of what is not complete only what was reported.
    """

    __slots__ = ("_checks", "_complete", "_missed", "_wake", "pieces")

    def __init__(
        self, pieces: Sequence[Bytes], unwritten: Sequence[int] = (), wake: Callable[[], object] | None = None
    ) -> None:
        self.pieces = pieces
        self._complete = [piece.nbytes for piece in pieces]
        for index in unwritten:
            self._complete[index] = 0
        self._checks: dict[tuple[int, int], int] = {}
        self._wake = wake
        self._missed = False

    def write(self, index: int, source: Source) -> None:
        """Fill a piece, front to back, and say how far it is; raises what reading the source raises.

        In this thread alone: it keeps ahead of a connection, and each thread more is in the way of the hub's.
        """
        source.fill(self.pieces[index], progress=partial(self._written, index), step=CHUNK_BYTES)

    def has(self, index: int, start: int) -> bool:
        """Whether the chunk that begins there is complete; the hub is woken when it is, if it was not."""
        stop = min(start + CHUNK_BYTES, self.pieces[index].nbytes)
        if self._complete[index] >= stop:
            return True
        self._missed = True
        return self._complete[index] >= stop  # it may have been completed before that was said

    def chunk(self, index: int, start: int) -> tuple[Bytes, int]:
        """The chunk that begins there, which is complete, and its checksum."""
        body = self.pieces[index][start : start + CHUNK_BYTES]
        check = self._checks.get((index, start))
        if check is None:
            check = self._checks[index, start] = checksum(body)
        return body, check

    def _written(self, index: int, nbytes: int) -> None:
        piece, start = self.pieces[index], self._complete[index]
        while start < nbytes and (start + CHUNK_BYTES <= nbytes or nbytes == piece.nbytes):
            body = piece[start : start + CHUNK_BYTES]
            self._checks[index, start] = checksum(body)  # now, while it is in the cache
            start = self._complete[index] = start + body.nbytes
            if self._missed and self._wake is not None:
                self._missed = False
                self._wake()
