"""One link: one handshake of one peer, the numbers of its messages, and what they keep alive.

Sending in a link and ending it share one lock, so that nothing is queued in a link that has ended: the
acknowledgement of a message, or the end of the link, lets go of what the message kept, once.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple

from transport import message as wire_types
from transport.backends.base import Bytes, Peer
from transport.errors import Full, PeerGone
from transport.process import Process
from transport.wire import Busy, Route, Unreachable, Wire, weight

Release = Callable[[], None]
Build = Callable[[int, int, int], wire_types.Control]
_FEW = 32  # messages that may wait for an acknowledgement that travels with something else


def _nothing() -> None:
    """What a message without content keeps."""


class _Sent(NamedTuple):
    """A message that was sent and not acknowledged: `nbytes` of tensors, `queued` bytes on the wire.

    place: how many messages, numbered or not, were posted in the link before it.
    """

    number: int
    place: int
    since: float
    nbytes: int
    queued: int
    keeps: Release


class Link:
    """The state of one link; `window` is how many messages may be unacknowledged, of `window_bytes` in all.

    A single message may exceed the bytes, which then go alone.
    """

    def __init__(
        self,
        wire: Wire,
        route: Route,
        peer: Peer,
        *,
        address: str,
        window: int,
        window_bytes: int,
        patience: int,
        ring_patience: int,
        accepts: Sequence[str],
        process: Process | None,
    ) -> None:
        self.peer = peer
        self.route = route
        self.address = address
        self.accepts = frozenset(accepts)
        self.process = process  # of the peer, where it is seen here
        self.since = time.monotonic()
        self.ended = ""  # why, once it has
        self.stores: frozenset[int] = frozenset()  # what the peer can open handles of
        self.arrived = 0  # the number of the last message that came
        self.taken = 0  # every message up to this number was taken
        # What these messages took up on the wire; each number has one thread that writes it.
        self.arrived_bytes = self.taken_bytes = 0
        self._wire = wire
        self._window = window
        self._window_bytes = window_bytes
        self._queued = 0  # bytes of messages that were not acknowledged
        self._patience, self._ring_patience = patience, ring_patience
        self._owed = self._owed_in_ring = 0  # bytes of messages that were taken and not acknowledged
        self._lock = threading.Lock()
        self._sent = 0
        self._posted = 0  # messages of all kinds; roughly, as several threads count
        self._pinged = 0  # the number of the last ping
        self._unacknowledged: deque[_Sent] = deque()
        self._acknowledged = 0  # what the peer was told of `taken`
        self._overtakers: set[int] = set()  # messages that were taken before others that came before them

    def send(
        self,
        build: Build,
        frames: Sequence[Bytes] = (),
        *,
        keeps: Release,
        nbytes: int = 0,
    ) -> int:
        """Number and send one message; `keeps` is called when it is acknowledged or the link ends.

        build: (link, number, seen) → the message. Returns the number. `PeerGone`, or `Full` when the window,
        in messages or bytes, is used up; the message was not sent then and `keeps` is not called.
        """
        with self._lock:
            if self.ended:
                raise PeerGone(f"{self} {self.ended}")
            if len(self._unacknowledged) >= self._window:
                raise Full(f"max_queued_messages ({self._window}) is used up; {self.overdue()}")
            number = self._sent + 1
            seen = self.taken
            control = wire_types.encode(build(self.peer.link, number, seen))
            queued = weight(control, frames)
            if self._queued and self._queued + queued > self._window_bytes:
                raise Full(f"{queued} bytes more would exceed max_queued_bytes; {self.overdue()}")
            self._unacknowledged.append(_Sent(number, self._posted, time.monotonic(), nbytes, queued, keeps))
            self._queued += queued
            try:
                self._post(control, frames)
            except BaseException as error:
                self._unacknowledged.pop()
                self._queued -= queued
                if isinstance(error, Busy):
                    raise Full(f"the queue to {self.peer.name!r} is full; {self.overdue()}") from error
                if isinstance(error, Unreachable):
                    raise PeerGone(f"the connection to {self} is lost") from error
                raise
            self._sent = number
            self._told(seen)
            return number

    def ping(self) -> None:
        """Ask for an acknowledgement of everything, where one is missing and was not asked for yet."""
        if self._unacknowledged and self._sent != self._pinged:
            with suppress(Full, PeerGone):
                self._pinged = self.send(wire_types.Ping, keeps=_nothing)

    def tell(self, message: wire_types.Control) -> bool:
        """Send a message without a number; whether it could be queued."""
        try:
            self._post(wire_types.encode(message))
        except (Busy, Unreachable):
            return False
        return True

    def reachable(self) -> bool:
        """Whether the connection is there, found out by repeating the last acknowledgement."""
        acknowledgement = wire_types.Acknowledgement(self.peer.link, self._acknowledged)
        try:
            self._post(wire_types.encode(acknowledgement))
        except Unreachable:
            return False
        except Busy:
            pass
        return True

    def _post(self, control: bytes, frames: Sequence[Bytes] = ()) -> None:
        self._wire.post(self.route, control, frames)
        self._posted += 1

    def settle(self, number: int) -> None:
        """The peer took every message up to `number`."""
        with self._lock:
            settled = []
            while self._unacknowledged and self._unacknowledged[0].number <= number:
                settled.append(self._unacknowledged.popleft())
                self._queued -= settled[-1].queued
        for sent in settled:
            sent.keeps()

    def take(self, number: int, nbytes: int, in_ring: int = 0) -> None:
        """A message of `nbytes` was taken, `in_ring` of which are read where they are.

        Many or large ones are acknowledged at once, others with what is sent next.
        """
        self._overtakers.add(number)
        while self.taken + 1 in self._overtakers:
            # In this order, so that who looks at `waiting` meanwhile never sees less than there is.
            self._overtakers.discard(self.taken + 1)
            self.taken += 1
        self._owed += nbytes - in_ring
        self._owed_in_ring += in_ring
        if (
            self._owed > self._patience
            or self._owed_in_ring > self._ring_patience
            or self.taken - self._acknowledged > _FEW
        ):
            self.acknowledge()

    def acknowledge(self) -> None:
        """Tell the peer what was taken since it was last told; tried again later when it cannot be."""
        if self.taken > self._acknowledged and not self.ended:
            taken = self.taken
            if self.tell(wire_types.Acknowledgement(self.peer.link, taken)):
                self._told(taken)

    def _told(self, seen: int) -> None:
        self._acknowledged = seen
        self._owed = self._owed_in_ring = 0

    def end(self, reason: str) -> bool:
        """The link ends: let go of what its messages kept. False when it had ended already."""
        with self._lock:
            if self.ended:
                return False
            self.ended = reason
            left = list(self._unacknowledged)
            self._unacknowledged.clear()
        for sent in left:
            sent.keeps()
        return True

    @property
    def waiting(self) -> int:
        """Messages that came and were not taken: the two numbers have different writers, one thread each."""
        return self.arrived - self.taken - len(self._overtakers)

    @property
    def waiting_bytes(self) -> int:
        """What the messages that came and were not taken take up."""
        return self.arrived_bytes - self.taken_bytes

    @property
    def unacknowledged(self) -> int:
        return len(self._unacknowledged)

    @property
    def unread(self) -> int:
        """Messages of all kinds that the peer may not have read; 0 when it took all numbered ones."""
        entries = list(self._unacknowledged)
        return self._posted - entries[0].place if entries else 0

    @property
    def oldest(self) -> float:
        """For how many seconds the oldest message has not been acknowledged; 0 when there is none."""
        entries = list(self._unacknowledged)
        return time.monotonic() - entries[0].since if entries else 0.0

    def overdue(self) -> str:
        """Who is late with what, since when, for a person."""
        entries = [entry for entry in list(self._unacknowledged) if entry.keeps is not _nothing]
        if not entries:
            return f"{self} has acknowledged everything"
        oldest = time.monotonic() - entries[0].since
        nbytes = sum(entry.nbytes for entry in entries)
        return (
            f"{self} has not acknowledged {len(entries)} messages ({nbytes} bytes),"
            f" the oldest {oldest:.1f} s old"
        )

    def __str__(self) -> str:
        return f"{self.peer} at {self.address}"
