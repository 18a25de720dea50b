"""The bulk traffic of one link, over one connection after the other: credit, chunks, what has landed.

Everything happens in the hub's thread, except where it says otherwise.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from transport.backends.base import Bytes, Peer
from transport.bulk.arriving import Arriving
from transport.bulk.connection import Connection, Lost
from transport.bulk.frames import HANDLE_BYTES, MAX_TEXT, Damaged, Frame, Kind, encode, with_body
from transport.bulk.landing import Landing
from transport.bulk.lodging import MOST_NEIGHBOURS
from transport.bulk.neighbours import INTRODUCTIONS, Neighbours
from transport.bulk.transfer import Outgoing
from transport.config import TransportConfig
from transport.waiting import Lasting

_STILL_COMING = 1.0  # seconds without a byte after which a link that ended has nothing more to come
_LOOK_EVERY, _LOOK_AT_THE_LOST_EVERY, _LOOK_AT_THE_END_EVERY = 1.0, 0.5, 0.1
_DAMAGES = 5  # connections in a row that brought no whole chunk


class Channel:
    """What one link sends and receives. `wake` is called when something has landed, or never will.

    Read in any thread: opened (how many connections there were), fault (why it cannot go on, "" while it
    can), held (why the peer grants no credit), over (nothing more comes), limit (bytes that the peer takes at
    once).
    """

    def __init__(
        self,
        peer: Peer,
        config: TransportConfig,
        landing: Landing,
        wake: Callable[[], object],
        neighbours: Neighbours,
    ) -> None:
        self.peer = peer
        self.slow = False  # its neighbours got for themselves what it was slow to take
        self.opened = 0
        self.fault = self.held = ""
        self.over = self.ended = False
        self.limit = 0
        self.arriving = Arriving(peer, config, landing, neighbours, self.post, wake)
        self.connection: Connection | None = None
        self._config = config
        self._wake = wake
        self._neighbours = neighbours
        self._outgoing: dict[int, Outgoing] = {}
        self._streaming: deque[Outgoing] = deque()
        self._on_its_way: Outgoing | None = None  # whose chunk the connection may be reading
        self._to_let_go: list[Outgoing] = []
        self._numbers = 0  # given out; under the hub's lock
        self._last = 0  # the number of the last transfer that was started
        self._scratch = bytearray()
        self._lost = Lasting(_LOOK_AT_THE_LOST_EVERY)  # the connection
        self._owing = Lasting(_LOOK_EVERY)  # the other host owes an acknowledgement
        self._silence = Lasting(_LOOK_AT_THE_END_EVERY)  # of a link that ended
        self._damages = self._received = self._sent_before = 0

    # ------------------------------------------------------------------ for any thread

    def is_ready(self, transfer: int) -> bool:
        """Whether `take` has an answer: it has landed, or never will."""
        arriving = self.arriving
        return transfer in arriving.landed or transfer <= arriving.done or self.over

    @property
    def sent(self) -> int:
        """The bytes that were sent, whatever for."""
        connection = self.connection
        return self._sent_before + (0 if connection is None else connection.sent)

    def next_number(self) -> int:
        """For one more transfer, which is to be started in this order."""
        self._numbers += 1
        return self._numbers

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
        self.arriving.begin()
        for outgoing in self._outgoing.values():
            self._announce(outgoing)
        self.post(Frame(Kind.ONLY, self._last))
        self._neighbours.introductions.attached(self)
        self._config.emit("bulk.attached", peer=self.peer.name, opened=self.opened)

    def detach(self, reason: str, *, damaged: bool = False) -> None:
        """The connection is lost; why, and whether what came over it was not what was sent."""
        if self.connection is None:
            return
        self._damages += damaged
        self._sent_before += self.connection.sent
        self.connection.close()
        self.connection = None
        self.arriving.step_back()
        self._lost.end()
        self._streaming.clear()
        self._let_go()
        self._neighbours.introductions.lost(self)
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
        self.arriving.step_back()
        self._drop_outgoing()
        self._streaming.clear()
        self._silence.end()
        if self.connection is None or not self.arriving.waits:
            self._finish("the link ended")

    def close(self) -> None:
        """The link ended and nothing that came is left: let go of everything."""
        self.ended = True
        self._finish("the link ended")
        self.arriving.close()

    def _finish(self, reason: str) -> None:
        self.over = True
        self._drop_outgoing()
        self.detach(reason)
        self.arriving.clear()
        self._neighbours.introductions.forget(self)
        self._wake()

    def _drop_outgoing(self) -> None:
        outgoings = list(self._outgoing.values())
        self._outgoing.clear()
        for outgoing in outgoings:
            _settled(outgoing)

    # ------------------------------------------------------------------ out

    def start(self, outgoing: Outgoing) -> None:
        """Send the tensors of one message; `outgoing` was made for this channel."""
        self._last = outgoing.number
        if self.over or self.ended:
            _settled(outgoing)
            return
        self._outgoing[outgoing.number] = outgoing
        self._announce(outgoing)

    def cancel(self, outgoing: Outgoing) -> None:
        """The peer is not to have it any more: let go of it as soon as nothing is read from it."""
        if outgoing.sent and outgoing.crossing is not None and outgoing.crossing.awaits(outgoing):
            outgoing.released = True  # it was taken before this side heard where it landed
            return
        self.forget(outgoing)
        self._to_let_go.append(outgoing)
        if not self._is_under_way(outgoing):
            self._let_go()

    def forget(self, outgoing: Outgoing) -> None:
        """The peer has it, or will not have it."""
        if self._outgoing.pop(outgoing.number, None) is not None:
            self.post(Frame(Kind.CANCEL, outgoing.number))
        if outgoing in self._streaming:
            self._streaming.remove(outgoing)
        _settled(outgoing)

    def place(self, outgoing: Outgoing, neighbour: int, places: bytes) -> None:
        """A neighbour has what is waited for: say where."""
        outgoing.placed = True
        self._config.emit("bulk.placed", peer=self.peer.name, transfer=outgoing.number)
        self.post(Frame(Kind.PLACED, outgoing.number, start=neighbour), places)

    def send_directly(self, outgoing: Outgoing) -> None:
        """No neighbour will have what is waited for."""
        outgoing.behind = False
        if self._outgoing.get(outgoing.number) is outgoing:
            self._announce(outgoing)

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
        index, start = len(outgoing.neighbours), int(outgoing.behind)
        self.post(Frame(Kind.ANNOUNCE, outgoing.number, index, start), outgoing.sizes())
        if outgoing.placed and not outgoing.landed and outgoing.crossing is not None:
            outgoing.crossing.say_again(outgoing)

    def _let_go(self) -> None:
        self._on_its_way = None
        for outgoing in self._to_let_go:
            outgoing.let_go()
        self._to_let_go.clear()

    # ------------------------------------------------------------------ in

    def body_of(self, frame: Frame) -> memoryview:
        if frame.kind is Kind.CHUNK:
            return self.arriving.body_of(frame)
        places = HANDLE_BYTES * self._config.max_tensors
        most = {
            Kind.ANNOUNCE: 8 * (self._config.max_tensors + MOST_NEIGHBOURS),
            Kind.HELD: MAX_TEXT,
            Kind.LANDED: places,
            Kind.PLACED: places,
            **dict.fromkeys(INTRODUCTIONS, MAX_TEXT),
        }.get(frame.kind, 0)
        if frame.nbytes > most:
            raise Damaged(f"a body of {frame.nbytes} bytes in a frame of kind {frame.kind.name}")
        self._scratch = bytearray(frame.nbytes)
        return memoryview(self._scratch)

    def arrived(self, frame: Frame, body: memoryview) -> None:
        match frame.kind:
            case Kind.CHUNK:
                self.arriving.arrived(frame, b"")
                self._damages = 0
            case Kind.HELD:
                self.held = bytes(body).decode(errors="replace")
            case Kind.GRANT | Kind.LANDED:
                self._take_answer(frame, self._outgoing.get(frame.transfer), bytes(body))
            case kind if kind in INTRODUCTIONS:
                self._neighbours.take(self, frame, bytes(body))
            case _:
                self.arriving.arrived(frame, bytes(body))

    def _take_answer(self, frame: Frame, outgoing: Outgoing | None, places: bytes) -> None:
        if outgoing is None or outgoing.landed:  # it was cancelled meanwhile
            if places and (outgoing is None or outgoing.crossing is None or outgoing.crossing.over):
                self.post(Frame(Kind.LET_GO, frame.transfer))
            return
        if frame.kind is Kind.GRANT:
            self.held = ""
            if outgoing in self._streaming:
                raise Damaged(f"credit was granted twice for transfer {frame.transfer}")
            outgoing.go_on_at(frame.index, frame.start)
            if outgoing.placed and outgoing.crossing is not None:
                outgoing.crossing.not_found(outgoing)
            outgoing.behind = outgoing.placed = False
            self._streaming.append(outgoing)
            return
        if not outgoing.placed and (not outgoing.sent or self._is_under_way(outgoing)):
            raise Damaged(f"transfer {frame.transfer} is said to have landed before it was sent")
        outgoing.landed = True
        self._damages = 0
        if outgoing.neighbours and outgoing.crossing is not None:
            outgoing.crossing.landed(places)
        else:
            _settled(outgoing)
        if outgoing.released:
            self.cancel(outgoing)

    def post(self, frame: Frame, body: bytes = b"") -> bool:
        """Send a frame, if there is a connection; whether there is."""
        if self.connection is not None:
            self.connection.post(with_body(frame, body) if body else encode(frame))
        return self.connection is not None

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
            if self._lost.look(now) > self._config.tcp_timeout:
                self.fail(f"the bulk connection is lost for {self._config.tcp_timeout:g} s")
                return None
            return _LOOK_AT_THE_LOST_EVERY
        wait = self.arriving.tick(now)
        owed = self._check_silence(self.connection, now)
        if not (owed or self._outgoing or self.arriving.waits):
            return wait  # keepalive looks after it, and the kernel tells
        return _LOOK_EVERY if wait is None else min(wait, _LOOK_EVERY)

    def _check_silence(self, connection: Connection, now: float) -> bool:
        """Whether the other host owes an acknowledgement, if only of a word; `Lost` when it is gone."""
        silent = connection.silent_for()
        if not silent:
            self._owing.end()
            return silent is not None
        if min(silent, self._owing.look(now)) > self._config.tcp_timeout:
            raise Lost(f"the other host acknowledged nothing for {silent:.0f} s")
        return True

    def _tick_at_the_end(self, now: float) -> float | None:
        connection = self.connection
        if connection is not None and connection.received != self._received:
            self._received = connection.received
            self._silence.end()
        if self._silence.look(now) > _STILL_COMING or not self.arriving.waits:
            self._finish("the link ended")
            return None
        return _LOOK_AT_THE_END_EVERY


def _settled(outgoing: Outgoing) -> None:
    """Who waits for others, or others for it, does so no longer."""
    if outgoing.crossing is not None:
        outgoing.crossing.gone(outgoing)
