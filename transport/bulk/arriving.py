"""What one link brings: transfers in their order, credit for them, where they landed.

For the thread of a hub, except where it says otherwise.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from transport.backends.base import Bytes, Peer
from transport.bulk.frames import MAX_TEXT, Damaged, Frame, Kind
from transport.bulk.landing import Landing
from transport.bulk.lodging import MOST_NEIGHBOURS
from transport.bulk.neighbours import Neighbours
from transport.bulk.transfer import Incoming
from transport.config import TransportConfig

_FIRST_LOOK, _LONGEST_LOOK = 2e-3, 50e-3  # seconds between two looks for room
_SAY_HELD_EVERY = 1.0


class Post(Protocol):
    """Sends a frame, if there is a connection."""

    def __call__(self, frame: Frame, body: bytes = b"") -> object: ...


class Arriving:
    """The incoming half of a channel. `wake` is called when something has landed.

    Read in any thread: landed (what has come, by transfer), done (every transfer up to this one has landed,
    or never will).
    """

    def __init__(
        self,
        peer: Peer,
        config: TransportConfig,
        landing: Landing,
        neighbours: Neighbours,
        post: Post,
        wake: Callable[[], object],
    ) -> None:
        self.landed: dict[int, list[Bytes]] = {}
        self.done = 0
        self.given_up: deque[int] = deque(
            maxlen=config.max_queued_messages
        )  # by the sender, before they landed
        self._peer = peer
        self._config = config
        self._landing = landing
        self._neighbours = neighbours
        self._post = post
        self._wake = wake
        self._incoming: dict[int, Incoming] = {}
        self._borrowed: set[int] = set()  # what landed in a neighbour's ring
        self._alive: set[int] = set()  # announced on this connection
        self._said_held = -_SAY_HELD_EVERY
        self._look_at = self._nap = 0.0

    # ------------------------------------------------------------------ for any thread

    @property
    def waits(self) -> bool:
        """Whether something that was announced has not landed."""
        return bool(self._incoming)

    @property
    def waits_for_room(self) -> bool:
        """Whether something that was announced has no credit."""
        return self._look_at > 0

    def progress(self, transfer: int) -> str:
        """How much has come of a transfer that has not landed, for people."""
        incoming = self._incoming.get(transfer)
        if incoming is None:
            return "nothing was announced of it"
        return f"{incoming.came} of {incoming.nbytes} bytes have come"

    def take(self, transfer: int) -> int | None:
        """What landed was taken: the bytes that leave the window; None when nothing had landed."""
        arrays = self.landed.pop(transfer, None)
        if arrays is None:
            return None
        if transfer in self._borrowed:
            self._borrowed.discard(transfer)
            return 0
        return sum(array.nbytes for array in arrays)

    # ------------------------------------------------------------------ connections

    def begin(self) -> None:
        """A new connection: what lives will be announced again."""
        self._alive.clear()

    def step_back(self) -> None:
        """Nobody looks for room for what waits, until there is another connection."""
        self._landing.withdraw(self._peer.link)

    def clear(self) -> None:
        """Nothing more comes; what landed stays."""
        self.step_back()
        self._incoming.clear()
        self._neighbours.host.forget(self._peer.link)

    def close(self) -> None:
        """Nothing that landed is left to take."""
        self.landed.clear()
        self._neighbours.guest.forget(self._peer.link)
        self._landing.forget(self._peer.link)

    # ------------------------------------------------------------------ frames

    def body_of(self, chunk: Frame) -> memoryview:
        """Where the bytes of a chunk go. `Damaged` when there must be no such chunk."""
        incoming = self._incoming.get(chunk.transfer)
        if incoming is None:
            raise Damaged(f"bytes of transfer {chunk.transfer}, which was not announced")
        return incoming.body_of(chunk)

    def arrived(self, frame: Frame, body: bytes) -> None:
        """A frame of the sender's; that of a chunk is where `body_of` said."""
        number = frame.transfer
        match frame.kind:
            case Kind.CHUNK:
                self._take_chunk(self._incoming[number], frame)
            case Kind.ANNOUNCE:
                self._take_announcement(frame, body)
            case Kind.PLACED:
                if number in self._incoming:
                    self._incoming[number].found_at(frame.start, body)
                    self._open_placed()
            case Kind.LET_GO:
                self._neighbours.host.let_go(self._peer.link, number)
            case Kind.CANCEL:
                self._forget(number)
            case Kind.ONLY:
                for known in [*self._incoming, *self.landed]:
                    if known <= number and known not in self._alive:
                        self._forget(known)
                self._neighbours.host.let_go_but(self._peer.link, self._alive)

    def _take_announcement(self, frame: Frame, body: bytes) -> None:
        number, behind = frame.transfer, bool(frame.start)
        self._alive.add(number)
        known = self._incoming.get(number)
        if number <= self.done:
            self._post(Frame(Kind.LANDED, number), self._neighbours.host.kept(self._peer.link, number))
        elif known is None:
            if frame.index > MOST_NEIGHBOURS:
                raise Damaged(f"{frame.index} neighbours")
            most = self._config.max_tensors
            incoming = Incoming(number, body, most, neighbours=frame.index, behind=behind)
            if incoming.nbytes > self._landing.limit:
                raise Damaged(f"{incoming.nbytes} bytes at once, where {self._landing.limit} may be")
            if len(self._incoming) > self._config.max_queued_messages:
                raise Damaged(f"{len(self._incoming)} transfers wait, and one more is announced")
            if number <= max(self._incoming, default=0):
                raise Damaged(f"transfer {number} is announced after later ones")
            self._incoming[number] = incoming
            self._nap = 0.0
            self.look_for_room(time.monotonic())
        elif known.arrays is not None:
            self._post(Frame(Kind.GRANT, number, *known.place))
        elif known.behind and not behind:
            known.behind = False
            self.look_for_room(time.monotonic())

    def look_for_room(self, now: float) -> None:
        """Grant credit, in the order of the transfers, as far as there is room."""
        for incoming in self._incoming.values():
            if incoming.arrays is not None:
                continue
            if incoming.behind:  # what comes after it must not land before it
                break
            place = self._landing.place(self._peer, incoming.sizes)
            if isinstance(place, str):
                self._nap = min(2 * self._nap or _FIRST_LOOK, _LONGEST_LOOK)
                self._look_at = now + self._nap
                if now - self._said_held > _SAY_HELD_EVERY:
                    self._said_held = now
                    text = place.encode()[:MAX_TEXT]
                    self._post(Frame(Kind.HELD, incoming.number), text)
                return
            incoming.arrays = place
            self._said_held = -_SAY_HELD_EVERY
            self._post(Frame(Kind.GRANT, incoming.number))
            self._config.emit("bulk.granted", peer=self._peer.name, transfer=incoming.number)
        self._look_at = 0.0
        self._landing.withdraw(self._peer.link)

    def _take_chunk(self, incoming: Incoming, frame: Frame) -> None:
        incoming.arrived(frame)
        self._config.emit("bulk.chunk", peer=self._peer.name, transfer=incoming.number)
        if not incoming.whole:
            return
        arrays = incoming.finished()
        places = b""
        if incoming.neighbours:
            self._config.emit("bulk.keeping", peer=self._peer.name, transfer=incoming.number)
            places = self._neighbours.host.keep(self._peer.link, incoming.number, arrays, incoming.neighbours)
        self._land(incoming, arrays, places)
        self._open_placed()

    def _land(self, incoming: Incoming, arrays: list[Bytes], places: bytes = b"") -> None:
        number = incoming.number
        del self._incoming[number]
        self.landed[number] = arrays
        self.done = number
        self._post(Frame(Kind.LANDED, number), places)
        self._config.emit("bulk.landed", peer=self._peer.name, transfer=number)
        self._wake()

    def _open_placed(self) -> None:
        """Take from neighbours what comes next, as far as they have it."""
        while (first := next(iter(self._incoming.values()), None)) and first.behind and first.placed:
            number, places = first.placed
            self._config.emit("bulk.opening", peer=self._peer.name, transfer=first.number)
            arrays = self._neighbours.guest.open(self._peer.link, number, places, first.sizes)
            self._config.emit("bulk.opened", peer=self._peer.name, transfer=first.number)
            if arrays is None:
                first.behind = False
            else:
                self._borrowed.add(first.number)
                self._neighbours.opened += 1
                self._land(first, arrays)
        self.look_for_room(time.monotonic())

    def _forget(self, number: int) -> None:
        """A transfer that the sender gave up, or was told to be taken."""
        if number in self._incoming:
            self.given_up.append(number)  # before who waits for it finds it gone
        incoming = self._incoming.pop(number, None)
        nbytes = self.take(number)
        if incoming is not None and incoming.arrays is not None:
            nbytes = incoming.nbytes
        if nbytes:
            self._landing.taken(self._peer.link, nbytes)
        if incoming is not None:
            if not self._incoming:
                self.done = max(self.done, number)
            self._open_placed()

    # ------------------------------------------------------------------ time

    def tick(self, now: float) -> float | None:
        """Look for room when it is time; in how many seconds again."""
        if not self._look_at:
            return None
        if now >= self._look_at:
            self.look_for_room(now)
        return max(0.0, self._look_at - now)
