"""The budget of bytes outside the ring: per peer, counted from `put` until acknowledged."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from transport.backends.base import Load, Parcel, Peer, Poll
from transport.errors import Full, TooLarge
from transport.waiting import attempts


class Budget:
    """At most `limit` bytes for each peer. What a slow reader leaves in queues cannot grow beyond it.

    name: what limits it, for errors.
    """

    def __init__(self, limit: int, name: str = "detour_bytes") -> None:
        self.limit = limit
        self._name = name
        self._taken: dict[int, int] = {}
        self._lock = threading.Lock()

    def take(self, readers: Sequence[Peer], nbytes: int, *, timeout: float, poll: Poll) -> None:
        """Count `nbytes` for every reader or for none. `Full` names who has not acknowledged enough."""
        if nbytes > self.limit:
            raise TooLarge(f"{nbytes} bytes at once exceed {self._name} ({self.limit})")
        for last in attempts(timeout, poll):
            late = self._try(readers, nbytes)
            if not late:
                return
            if last:
                reason = f"{nbytes} bytes more would exceed {self._name} ({self.limit})"
                held = {p.name: f"{self.taken(p)} bytes unacknowledged; {reason}" for p in late}
                raise Full("; ".join(f"{name} has {text}" for name, text in held.items()), failed=held)

    @contextmanager
    def taken_for(
        self, readers: Sequence[Peer], nbytes: int, *, timeout: float, poll: Poll
    ) -> Iterator[None]:
        """`take`, and given back when the body of the `with` fails."""
        self.take(readers, nbytes, timeout=timeout, poll=poll)
        try:
            yield
        except BaseException:
            for reader in readers:
                self.give(reader, nbytes)
            raise

    def give(self, peer: Peer, nbytes: int) -> None:
        """The peer acknowledged, or is gone."""
        if not nbytes:
            return
        with self._lock:
            left = self._taken[peer.link] - nbytes
            if left:
                self._taken[peer.link] = left
            else:
                del self._taken[peer.link]

    def taken(self, peer: Peer) -> int:
        """The bytes counted for a peer now."""
        return self._taken.get(peer.link, 0)

    def _try(self, readers: Sequence[Peer], nbytes: int) -> list[Peer]:
        with self._lock:
            late = [peer for peer in readers if self.taken(peer) + nbytes > self.limit]
            if not late and nbytes:
                for peer in readers:
                    self._taken[peer.link] = self.taken(peer) + nbytes
            return late


class CountedParcel(Parcel):
    """Bytes outside the ring, the same for all readers, that count until each has let go."""

    def __init__(self, load: Load, nbytes: int, budget: Budget) -> None:
        self._load = load
        self._nbytes = nbytes
        self._budget = budget

    def load(self, reader: Peer) -> Load:
        return self._load

    def release(self, reader: Peer) -> None:
        self._budget.give(reader, self._nbytes)
