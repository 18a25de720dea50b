"""The bulk traffic of one link, over one connection after the other: credit, chunks, what has landed.

Everything happens in the hub's thread, except where it says otherwise.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from transport.backends.base import Bytes, Peer
from transport.bulk.connection import Connection, Lost
from transport.bulk.frames import MAX_TEXT, Damaged, Frame, Kind, encode, with_body
from transport.bulk.landing import Landing
from transport.bulk.transfer import Incoming, Outgoing
from transport.config import TransportConfig

_FIRST_LOOK, _LONGEST_LOOK = 2e-3, 50e-3  # seconds between two looks for room
_SAY_HELD_EVERY = 1.0
_STILL_COMING = 1.0  # seconds without a byte after which a link that ended has nothing more to come
_DAMAGES = 5  # connections in a row that brought no whole chunk


class Channel:
    """What one link sends and receives. `wake` is called when something has landed, or never will.

    Read in any thread: opened (how many connections there were), fault (why it cannot go on, "" while it
    can), held (why the peer grants no credit), landed (what has come, by transfer), over (nothing more
    comes), limit (bytes that the peer takes at once).
    """

    def __init__(
        self, peer: Peer, config: TransportConfig, landing: Landing, wake: Callable[[], object]
    ) -> None:
        self.peer = peer
        self.opened = 0
        self.fault = self.held = ""
        self.over = self.ended = False
        self.limit = 0
        self.landed: dict[int, list[Bytes]] = {}
        self.done = 0  # every transfer up to this one has landed, or never will
        self.connection: Connection | None = None
        self._config = config
        self._landing = landing
        self._wake = wake
        self._outgoing: dict[int, Outgoing] = {}
        self._streaming: deque[Outgoing] = deque()
        self._on_its_way: Outgoing | None = None  # whose chunk the connection may be reading
        self._to_let_go: list[Outgoing] = []
        self._incoming: dict[int, Incoming] = {}
        self._alive: set[int] = set()  # announced on this connection
        self._numbers = 0  # given out; under the hub's lock
        self._last = 0  # the number of the last transfer that was started
        self._scratch = bytearray()
        self._lost_at = self._last_byte = time.monotonic()
        self._said_held = -_SAY_HELD_EVERY
        self._look_at = self._nap = 0.0
        self._owing_since: float | None = None
        self._damages = self._received = 0

    # ------------------------------------------------------------------ for any thread

    def is_ready(self, transfer: int) -> bool:
        """Whether `take` has an answer: it has landed, or never will."""
        return transfer in self.landed or transfer <= self.done or self.over

    def next_number(self) -> int:
        """For one more transfer, which is to be started in this order."""
        self._numbers += 1
        return self._numbers

    @property
    def waits_for_room(self) -> bool:
        """Whether something that was announced has no credit."""
        return self._look_at > 0

    @property
    def idle(self) -> bool:
        """Whether all that was put has landed."""
        started = self._last == self._numbers
        return self.over or (started and all(out.landed for out in list(self._outgoing.values())))

    # ------------------------------------------------------------------ connections

    def attach(self, connection: Connection) -> None:
        """A connection was made: say what there is, go on where the last one ended."""
        if self.connection is not None:
            self.detach("it was made again")
        self.connection = connection
        self.opened += 1
        self._alive.clear()
        for outgoing in self._outgoing.values():
            self._announce(outgoing)
        connection.post(encode(Frame(Kind.ONLY, self._last)))
        self._config.emit("bulk.attached", peer=self.peer.name, opened=self.opened)

    def detach(self, reason: str, *, damaged: bool = False) -> None:
        """The connection is lost; why, and whether what came over it was not what was sent."""
        if self.connection is None:
            return
        self._damages += damaged
        self.connection.close()
        self.connection = None
        self._lost_at = time.monotonic()
        self._streaming.clear()
        self._let_go()
        if self.ended:
            self._finish(reason)
        elif self._damages > _DAMAGES:
            self.fail(f"{self._damages} bulk connections in a row brought nothing but damage: {reason}")

    def fail(self, reason: str) -> None:
        """It cannot go on: the link has to end."""
        self.fault = self.fault or reason
        self._finish(reason)

    def end(self) -> None:
        """The link has ended: send nothing any more; what is still coming may come."""
        self.ended = True
        self._outgoing.clear()
        self._streaming.clear()
        self._last_byte = time.monotonic()
        if self.connection is None or not self._incoming:
            self._finish("the link ended")

    def close(self) -> None:
        """The link ended and nothing that came is left: let go of everything."""
        self.ended = True
        self._outgoing.clear()
        self._finish("the link ended")
        self.landed.clear()
        self._landing.forget(self.peer.link)

    def _finish(self, reason: str) -> None:
        self.over = True
        self.detach(reason)
        self._incoming.clear()
        self._wake()

    # ------------------------------------------------------------------ out

    def start(self, outgoing: Outgoing) -> None:
        """Send the tensors of one message; `outgoing` was made for this channel."""
        self._last = outgoing.number
        if not self.over and not self.ended:
            self._outgoing[outgoing.number] = outgoing
            self._announce(outgoing)

    def cancel(self, outgoing: Outgoing) -> None:
        """The peer is not to have it any more: let go of it as soon as nothing is read from it."""
        self.forget(outgoing)
        self._to_let_go.append(outgoing)
        if not self._is_under_way(outgoing):
            self._let_go()

    def forget(self, outgoing: Outgoing) -> None:
        """The peer has it, or will not have it."""
        if self._outgoing.pop(outgoing.number, None) is not None:
            self._post(Frame(Kind.CANCEL, outgoing.number))
        if outgoing in self._streaming:
            self._streaming.remove(outgoing)

    def next_chunk(self) -> tuple[bytes, Bytes] | None:
        self._let_go()
        while self._streaming and self._streaming[0].sent:
            self._streaming.popleft()
        if not self._streaming or not self._streaming[0].ready:
            return None
        self._on_its_way = self._streaming[0]
        self._config.emit("bulk.sending", peer=self.peer.name, transfer=self._on_its_way.number)
        return self._on_its_way.next_chunk()

    def _is_under_way(self, outgoing: Outgoing) -> bool:
        """Whether the connection may be reading a chunk of it."""
        return self.connection is not None and self.connection.sending and self._on_its_way is outgoing

    def _announce(self, outgoing: Outgoing) -> None:
        if self.connection is not None:
            self.connection.post(with_body(Kind.ANNOUNCE, outgoing.number, outgoing.sizes()))

    def _let_go(self) -> None:
        self._on_its_way = None
        for outgoing in self._to_let_go:
            outgoing.let_go()
        self._to_let_go.clear()

    # ------------------------------------------------------------------ in

    def body_of(self, frame: Frame) -> memoryview:
        if frame.kind is Kind.CHUNK:
            incoming = self._incoming.get(frame.transfer)
            if incoming is None:
                raise Damaged(f"bytes of transfer {frame.transfer}, which was not announced")
            return incoming.body_of(frame)
        most = {Kind.ANNOUNCE: 8 * self._config.max_tensors, Kind.HELD: MAX_TEXT}.get(frame.kind, 0)
        if frame.nbytes > most:
            raise Damaged(f"a body of {frame.nbytes} bytes in a frame of kind {frame.kind.name}")
        self._scratch = bytearray(frame.nbytes)
        return memoryview(self._scratch)

    def arrived(self, frame: Frame, body: memoryview) -> None:
        number = frame.transfer
        match frame.kind:
            case Kind.CHUNK:
                self._take_chunk(self._incoming[number], frame)
            case Kind.ANNOUNCE:
                self._take_announcement(number, body)
            case Kind.CANCEL:
                self._forget(number)
            case Kind.ONLY:
                for known in [*self._incoming, *self.landed]:
                    if known <= number and known not in self._alive:
                        self._forget(known)
            case Kind.HELD:
                self.held = bytes(body).decode(errors="replace")
            case Kind.GRANT | Kind.LANDED:
                self._take_answer(frame, self._outgoing.get(number))

    def _take_answer(self, frame: Frame, outgoing: Outgoing | None) -> None:
        if outgoing is None or outgoing.landed:  # it was cancelled meanwhile
            return
        if frame.kind is Kind.GRANT:
            self.held = ""
            if outgoing in self._streaming:
                raise Damaged(f"credit was granted twice for transfer {frame.transfer}")
            outgoing.go_on_at(frame.index, frame.start)
            self._streaming.append(outgoing)
            return
        if not outgoing.sent or self._is_under_way(outgoing):
            raise Damaged(f"transfer {frame.transfer} is said to have landed before it was sent")
        outgoing.landed = True
        self._damages = 0

    def _take_announcement(self, number: int, body: memoryview) -> None:
        self._alive.add(number)
        known = self._incoming.get(number)
        if number <= self.done:
            self._post(Frame(Kind.LANDED, number))
        elif known is None:
            incoming = Incoming(number, body, self._config.max_tensors)
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

    def look_for_room(self, now: float) -> None:
        """Grant credit, first come first served, as far as there is room."""
        for incoming in self._incoming.values():
            if incoming.arrays is not None:
                continue
            place = self._landing.place(self.peer.link, incoming.sizes)
            if isinstance(place, str):
                self._nap = min(2 * self._nap or _FIRST_LOOK, _LONGEST_LOOK)
                self._look_at = now + self._nap
                if now - self._said_held > _SAY_HELD_EVERY and self.connection is not None:
                    self._said_held = now
                    text = place.encode()[:MAX_TEXT]
                    self.connection.post(with_body(Kind.HELD, incoming.number, text))
                return
            incoming.arrays = place
            self._said_held = -_SAY_HELD_EVERY
            self._post(Frame(Kind.GRANT, incoming.number))
            self._config.emit("bulk.granted", peer=self.peer.name, transfer=incoming.number)
        self._look_at = 0.0

    def _take_chunk(self, incoming: Incoming, frame: Frame) -> None:
        incoming.arrived(frame)
        self._damages = 0
        self._config.emit("bulk.chunk", peer=self.peer.name, transfer=incoming.number)
        if not incoming.whole:
            return
        del self._incoming[incoming.number]
        self.landed[incoming.number] = incoming.finished()
        self.done = incoming.number
        self._post(Frame(Kind.LANDED, incoming.number))
        self._config.emit("bulk.landed", peer=self.peer.name, transfer=incoming.number)
        self._wake()

    def _forget(self, number: int) -> None:
        """A transfer that the sender gave up, or was told to be taken."""
        incoming = self._incoming.pop(number, None)
        arrays = self.landed.pop(number, None) or (incoming.arrays if incoming is not None else None)
        if arrays is not None:
            self._landing.taken(self.peer.link, sum(array.nbytes for array in arrays))
        if incoming is not None and not self._incoming:
            self.done = max(self.done, number)

    def _post(self, frame: Frame) -> None:
        if self.connection is not None:
            self.connection.post(encode(frame))

    # ------------------------------------------------------------------ time

    def tick(self, now: float) -> float | None:
        """Look at what waits; in how many seconds to look again, None: not before something comes."""
        if self.over:
            return None
        if self.ended:
            return self._tick_at_the_end(now)
        if self.connection is None:
            if not self.opened:
                return None
            if now - self._lost_at > self._config.tcp_timeout:
                self.fail(f"the bulk connection is lost for {self._config.tcp_timeout:g} s")
                return None
            return 0.5
        waits = []
        if self._look_at:
            if now >= self._look_at:
                self.look_for_room(now)
            waits.append(max(0.0, self._look_at - now))
        if self._outgoing or self._incoming:
            self._check_silence(now)
            waits.append(1.0)
        else:
            self._owing_since = None
        return min(waits, default=None)

    def _check_silence(self, now: float) -> None:
        connection = self.connection
        silent = connection.silent_for() if connection is not None else 0.0
        if not silent:
            self._owing_since = None
            return
        self._owing_since = self._owing_since if self._owing_since is not None else now
        if min(silent, now - self._owing_since) > self._config.tcp_timeout:
            raise Lost(f"the other host acknowledged nothing for {silent:.0f} s")

    def _tick_at_the_end(self, now: float) -> float | None:
        connection = self.connection
        if connection is not None and connection.received != self._received:
            self._received, self._last_byte = connection.received, now
        if now - self._last_byte > _STILL_COMING or not self._incoming:
            self._finish("the link ended")
            return None
        return 0.1
