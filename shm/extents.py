"""Free space of a ring: the lowest address that fits, in the writer's private memory.

Warm memory is most of what a copy costs (16 MiB into untouched pages took 8 to 29 ms, into warm ones
1 to 2), and the lowest address that fits keeps the part of the ring in use as small as what is held.
A circular append walks cold memory for ever once anything is held, and fragments.

Free extents lie in classes by size, four to each power of two as in TLSF (Masmano et al., ECRTS 2004),
each a sorted list of addresses, with one dict by start and one by end: neighbours merge at release and
no operation walks what is live. In every class above that of the wish the first extent fits, so only
the wish's own class (and what an alignment spoils) is searched, and only below the best one found.
"""

from __future__ import annotations

from bisect import bisect_left, insort


def _kind(nbytes: int) -> int:
    """The class of a size: its highest bit and the two below it."""
    bits = nbytes.bit_length()
    return (bits << 2) + (nbytes >> bits - 3 & 3)


class Extents:
    """Which byte ranges of `capacity` bytes are free. Sizes are multiples of 4. Not for several threads."""

    def __init__(self, capacity: int) -> None:
        self._classes: list[list[int]] = [[] for _ in range(_kind(capacity) + 1)]
        self._occupied = 0  # bit k: class k is not empty
        self._size: dict[int, int] = {}
        self._start: dict[int, int] = {}  # by end
        self.free = 0
        self.release(0, capacity)

    def allocate(self, nbytes: int, alignment: int) -> int | None:
        """The lowest address, a multiple of `alignment`, with that many free bytes; None without one."""
        found = self.find(nbytes, alignment)
        return None if found is None else self.take(found, nbytes, alignment)

    def find(self, nbytes: int, alignment: int) -> int | None:
        """The free extent that `allocate` would cut, by its start."""
        sizes = self._size
        found = -1
        for kind in self._large_enough(nbytes):
            for start in self._classes[kind]:
                if 0 <= found < start:
                    break
                if -start % alignment + nbytes <= sizes[start]:
                    found = start
                    break
        return None if found < 0 else found

    def take(self, start: int, nbytes: int, alignment: int) -> int:
        """Cut the free extent that begins at `start`, as `find` has found it; the address."""
        address = start + -start % alignment
        self.free -= nbytes
        end = start + self._remove(start)
        if start < address:
            self._insert(start, address - start)
        if address + nbytes < end:
            self._insert(address + nbytes, end - address - nbytes)
        return address

    def release(self, start: int, nbytes: int) -> None:
        """Give a range back; it merges with free neighbours."""
        self.free += nbytes
        before = self._start.get(start)
        if before is not None:
            nbytes += self._remove(before)
            start = before
        if start + nbytes in self._size:
            nbytes += self._remove(start + nbytes)
        self._insert(start, nbytes)

    def largest(self) -> int:
        """The size of the largest free extent, in bytes."""
        if not self._occupied:
            return 0
        return max(self._size[start] for start in self._classes[self._occupied.bit_length() - 1])

    def drop_above(self, address: int) -> None:
        """Forget the free space from `address` up; nothing there may be in use."""
        for start in [start for start, nbytes in self._size.items() if start + nbytes > address]:
            end = start + self._remove(start)
            self.free -= end - max(start, address)
            if start < address:
                self._insert(start, address - start)

    def _large_enough(self, nbytes: int) -> list[int]:
        """The classes that are not empty and may hold extents of that size, that of the size itself last."""
        smallest = _kind(nbytes)
        occupied = self._occupied >> smallest
        kinds = []
        above = occupied & ~1
        while above:
            kinds.append(smallest + (above & -above).bit_length() - 1)
            above &= above - 1
        if occupied & 1:
            kinds.append(smallest)
        return kinds

    def _insert(self, start: int, nbytes: int) -> None:
        kind = _kind(nbytes)
        insort(self._classes[kind], start)
        self._occupied |= 1 << kind
        self._size[start] = nbytes
        self._start[start + nbytes] = start

    def _remove(self, start: int) -> int:
        nbytes = self._size.pop(start)
        del self._start[start + nbytes]
        kind = _kind(nbytes)
        addresses = self._classes[kind]
        del addresses[bisect_left(addresses, start)]
        if not addresses:
            self._occupied &= ~(1 << kind)
        return nbytes
