"""Where the bytes of peers come to lie: in this process's own ring, else beside it, within limits.

Each peer has a window (what is granted to it and not taken yet), a share of the ring (what its tensors
hold there until the last view of them is gone) and `detour_bytes` outside of it. What exceeds them waits
with its sender, and no other peer does. The window belongs to a link; what is held counts for the name, which
may come back. Who finds no room in the ring, though its own limits allow it, stands in a line: the ring
is given to the first of it alone, so that many small ones cannot keep a large one waiting for ever. Grants
are made in one thread; what they made is given back by the end of the views, in any thread.
"""

from __future__ import annotations

import weakref
from collections import Counter, deque
from collections.abc import Callable, Sequence

import numpy as np

from transport.backends.base import Bytes, Peer
from transport.backends.ring_messages import for_peer
from transport.config import TransportConfig
from transport.errors import Full, TooLarge

Land = Callable[[Sequence[int]], list[Bytes]]
_RING, _BESIDE = "the ring", "memory beside it"
_Held = tuple[str, str]  # the peer's name, and where


class Landing:
    """Memory for what arrives. `land` takes sizes (bytes) and returns arrays in the ring.

    It takes all or raises: `Full` later, `TooLarge` never.
    """

    def __init__(self, config: TransportConfig, land: Land) -> None:
        self._config = config
        self._land = land
        self._window: Counter[int] = Counter()  # by link: bytes granted and not taken
        self._held: Counter[_Held] = Counter()  # bytes that views of tensors hold
        self._line: dict[int, None] = {}  # links that wait for the ring alone, who came first before others
        self._returned: deque[tuple[_Held, int]] = deque()  # appended to by finalizers
        self.detours: Counter[str] = Counter()

    @property
    def share(self) -> int:
        """The bytes of the ring that the tensors of one peer may hold."""
        return int(self._config.ring_bytes * self._config.peer_share)

    @property
    def limit(self) -> int:
        """The bytes that one peer may be granted at once, at the best."""
        return max(1, min(self._config.tcp_window, self.share - self.share // 16))

    def place(self, peer: Peer, sizes: Sequence[int]) -> list[Bytes] | str:
        """Writable memory for tensors of these sizes, all of it; or why there is none for now.

        Who is told why asks again before long, or says `withdraw`: others may have to wait for it.
        """
        total, link = sum(sizes), peer.link
        self._settle()
        if self._window[link] + total > self._config.tcp_window:
            self.withdraw(link)
            limit = self._config.tcp_window
            return f"{self._window[link]} bytes were granted and not taken (tcp_window {limit})"
        never, why = False, self._share_used(peer, total)
        stands = not why
        if not why and next(iter(self._line), link) != link:
            why = "no room in the ring: another peer waits for it, and came first"
        elif not why:
            try:
                return self._counted(peer, _RING, self._land(sizes))
            except (Full, TooLarge) as error:
                never = isinstance(error, TooLarge)
                why = f"no room in the ring: {for_peer(error.__cause__ or error)}"
        beside = self._held[peer.name, _BESIDE]
        # What the ring can never hold may exceed the budget when nothing else does, so that it ends.
        if beside + total > self._config.detour_bytes and (beside or not never):
            if stands and not never:
                self._line.setdefault(link)
            else:
                self.withdraw(link)
            return f"{why}; beside it {beside} bytes are held (detour_bytes {self._config.detour_bytes})"
        self.detours["landing: " + why.partition(":")[0]] += 1
        return self._counted(peer, _BESIDE, [np.empty(size, np.uint8) for size in sizes])

    def withdraw(self, link: int) -> None:
        """Nobody asks for this link for now: it stands in nobody's way."""
        self._line.pop(link, None)

    def taken(self, link: int, nbytes: int) -> None:
        """A transfer was taken by `receive`, or will never be: its bytes leave the window."""
        if link in self._window:
            self._window[link] -= nbytes

    def forget(self, link: int) -> None:
        """The link ended: its credit dies with it. What its views hold counts until they are gone."""
        self.withdraw(link)
        del self._window[link]

    def _share_used(self, peer: Peer, total: int) -> str:
        held = self._held[peer.name, _RING]
        if held + total <= self.share:
            return ""
        return f"a peer's share of the ring is used up: {held} of {self.share} bytes"

    def _counted(self, peer: Peer, where: str, arrays: list[Bytes]) -> list[Bytes]:
        self.withdraw(peer.link)
        for array in arrays:
            self._held[peer.name, where] += array.nbytes
            self._window[peer.link] += array.nbytes
            finalizer = weakref.finalize(array, self._returned.append, ((peer.name, where), array.nbytes))
            finalizer.atexit = False
        return arrays

    def _settle(self) -> None:
        while self._returned:
            held, nbytes = self._returned.popleft()
            self._held[held] -= nbytes
            if not self._held[held]:
                del self._held[held]
