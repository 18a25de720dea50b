"""Values out of a fuzzer's bytes: the same bytes give the same values, and no bytes give the smallest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

_EDGES = (0, 1, 2, 3, 7, 63, 64, 65, 255, 4095, 4096, 4097, 1 << 16, 1 << 20, (1 << 31) - 1, 1 << 31, 1 << 32)
_FAR_EDGES = ((1 << 46) + 4096, (1 << 62) - 1, 1 << 62, (1 << 62) + 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
_T = TypeVar("_T")


class Draw:
    """Reads an input from its beginning; at its end everything is 0."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def left(self) -> bool:
        """Whether there is anything left."""
        return self._at < len(self._data)

    def byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1] if self._at <= len(self._data) else 0

    def take(self, most: int) -> bytes:
        """Some bytes, `most` (255) at most."""
        start, length = self._at + 1, min(self.byte(), most)
        self._at += length
        return self._data[start : start + length]

    def pick(self, choices: Sequence[_T]) -> _T:
        return choices[self.byte() % len(choices)]

    def chance(self, one_in: int) -> bool:
        """True for one byte in so many, and not for 0."""
        return self.byte() % one_in == 1

    def word(self) -> int:
        """A number of 64 bits: an edge of some kind, a small one, or any."""
        kind = self.byte()
        if kind < 96:
            return self.pick(_EDGES)
        if kind < 128:
            return self.pick(_FAR_EDGES)
        if kind < 192:
            return self.byte()
        return int.from_bytes(bytes(self.byte() for _ in range(8)), "little")

    def number(self) -> int:
        """The same with a sign, as msgpack can carry it."""
        word = self.word()
        return -min(word, 1 << 63) if self.chance(8) else word

    def text(self) -> str:
        return self.take(80).decode(errors="replace")

    def spoilt(self, good: bytes) -> bytes:
        """`good` with some of its bytes replaced, cut off or doubled."""
        spoilt = bytearray(good)
        for _ in range(self.byte() % 4 if good else 0):
            at = int.from_bytes(bytes((self.byte(), self.byte())), "little") % max(1, len(spoilt))
            match self.byte() % 4:
                case 0:
                    spoilt[at : at + 1] = bytes((self.byte(),))
                case 1:
                    spoilt[at:at] = self.take(8)
                case 2:
                    del spoilt[at:]
                case 3:
                    spoilt[at:at] = spoilt[at : at + 16]
        return bytes(spoilt)
