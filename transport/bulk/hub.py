"""All bulk connections of one endpoint and the one thread that serves them, made when the first is needed.

The thread sleeps in epoll; others give it commands and wake it by an eventfd. It is the only owner of
sockets and channels, so that nothing here needs a lock but the queue of commands.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket as sockets
import ssl
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from transport.backends.base import Peer
from transport.bulk.cargo import Cargo
from transport.bulk.channel import Channel
from transport.bulk.connection import Connection, Lost
from transport.bulk.crossing import Crossing, Line
from transport.bulk.handshake import TOKEN_BYTES
from transport.bulk.landing import Landing
from transport.bulk.meeting import Meeting, Way
from transport.bulk.neighbours import Neighbours
from transport.bulk.poller import IN, OUT, Poller
from transport.bulk.tls import Identity, available
from transport.bulk.transfer import Outgoing
from transport.config import TransportConfig
from transport.errors import Closed
from transport.waiting import RateLimit

_log = logging.getLogger("tensorferry.transport")

Command = Callable[[], object]
_END_MAY_TAKE = 10.0
_LOOK_EVERY = 1e-3  # seconds between two looks at the clock while something goes on


class Hub:
    """Channels by link. `wake` is called when something has landed or never will."""

    def __init__(self, config: TransportConfig, landing: Landing, neighbours: Neighbours) -> None:
        self.landing = landing
        self.neighbours = neighbours
        self.wake: Callable[[], object] = lambda: None
        self._config = config
        self._lock = threading.Lock()
        self._commands: deque[Command] = deque()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._ended = False  # the thread has, or there was none
        self._ways: dict[int, Way] = {}  # by link
        self._listeners: dict[tuple[str, bool], sockets.socket] = {}  # by host, and whether with TLS
        self._poller = Poller()
        self._meeting = Meeting(config, self._poller, self._ways, self._connect)
        self._connected: dict[int, tuple[Channel, Connection]] = {}  # by descriptor
        self._warnings = RateLimit()
        self._eager: set[int] = set()  # whose turn ended before there was nothing more to read
        _hubs.add(self)

    # ------------------------------------------------------------------ for any thread

    def channel(self, peer: Peer) -> Channel | None:
        """The channel of a link, None when there is none."""
        way = self._ways.get(peer.link)
        return None if way is None else way.channel

    def expect(self, peer: Peer, host: str) -> tuple[int, bytes]:
        """Let a peer dial; the port at which it reaches this host, and the secret that it must know.

        `OSError` when nothing can listen there, `Closed`.
        """
        with self._lock:
            way = self._way(peer, secrets.token_bytes(TOKEN_BYTES))
            listener = self._listeners.get((host, way.secure))
            if listener is None:
                family = sockets.AF_INET6 if ":" in host else sockets.AF_INET
                listener = sockets.create_server(
                    (host, self._config.tcp_port),
                    family=family,
                    backlog=128,
                    dualstack_ipv6=family == sockets.AF_INET6,  # as zmq's own at [::]
                )
                listener.setblocking(False)
                self._listeners[host, way.secure] = listener
                self._queue(partial(self._meeting.accept_at, listener, way.secure))
            else:
                self._queue(_nothing)  # it has to look at the time of this one, too
            return int(listener.getsockname()[1]), way.token

    def dial(self, peer: Peer, host: str, port: int, token: bytes) -> Channel:
        """Connect to a peer that expects it; tried again until `handshake_timeout` is over. `Closed`."""
        with self._lock:
            way = self._way(peer, token)
            if not way.port:
                way.host, way.port, way.token = host, port, token
                self._queue(_nothing)
            return way.channel

    def certificate(self, peer: Peer) -> bytes:
        """What this side shows to a peer (DER); empty where the link is not encrypted."""
        with self._lock:
            if not self._is_secure(peer):
                return b""
            return self._own().certificate

    def pin(self, peer: Peer, certificate: bytes) -> str:
        """What the peer will show; "" or what is wrong with it."""
        with self._lock:
            if self._is_secure(peer) != bool(certificate):
                return "only one side has keys"
            way = self._ways.get(peer.link)
            if way is not None and certificate:
                try:
                    self._own().trust(certificate)
                except (ssl.SSLError, ValueError):
                    return "the certificate is none"
                way.certificate = certificate
                self._check()
                self._queue(_nothing)  # who dials was waiting for it
            return ""

    def _own(self) -> Identity:
        """This side's identity, made when it is needed."""
        self._meeting.identity = self._meeting.identity or Identity()
        return self._meeting.identity

    def lacks(self, peer: Peer) -> str:
        """Why there can be no bulk connection with a peer, "" in general."""
        return available() if self._is_secure(peer) else ""

    def _is_secure(self, peer: Peer) -> bool:
        return bool(self._config.curve_key) and peer.address.startswith("tcp://")

    def _check(self) -> None:
        """Nothing is made any more that nobody would close; and the event's descriptor may be another's."""
        if self._closed:
            raise Closed("this endpoint was closed meanwhile")

    def _way(self, peer: Peer, token: bytes) -> Way:
        self._check()
        way = self._ways.get(peer.link)
        if way is None:
            channel = Channel(peer, self._config, self.landing, self._wake, self.neighbours)
            until = time.monotonic() + self._config.handshake_timeout
            way = Way(channel, token, until, secure=self._is_secure(peer))
            self._ways[peer.link] = way
        return way

    def trouble(self, peer: Peer) -> str:
        """Why the last try to connect to a peer failed, "" where none has, or the peer is who dials."""
        way = self._ways.get(peer.link)
        return "" if way is None else way.trouble

    def drop(self, peer: Peer) -> None:
        """The link ended and nothing that came over it is left: close its connection."""
        way = self._ways.pop(peer.link, None)
        if way is not None:
            self.tell(way.channel.close)

    def tell(self, command: Command, *, now: bool = True) -> None:
        """Have the thread do something; `now`: wake it for that."""
        with self._lock:
            if not self._ended:
                self._queue(command, now=now)
                return
        command()  # nobody else does anything

    def _queue(self, command: Command, *, now: bool = True) -> None:
        self._commands.append(command)
        if self._closed:  # who closes obeys it, when the thread has ended
            return
        if self._thread is None:
            self._poller.open()
            self._thread = threading.Thread(target=self._run, name="tensorferry-bulk", daemon=True)
            self._thread.start()
        elif now:
            self._poller.wake()

    def start(self, channels: Sequence[Channel], cargo: Cargo) -> list[Outgoing]:
        """Send these bytes, of which some may still have to be written, by all these channels.

        Where several peers share a host, by proof, one of them gets the bytes and the others read them there.
        """
        nbytes = sum(piece.nbytes for piece in cargo.pieces)
        with self._lock:
            outgoings = [Outgoing(channel.next_number(), cargo) for channel in channels]
            transfers = list(zip(channels, outgoings, strict=True))
            crossings, unknown = self.neighbours.introductions.plan(transfers, nbytes)
            if not self._closed:
                self._queue(partial(self._start, transfers, crossings, unknown))
            return outgoings

    def _start(
        self,
        transfers: Sequence[tuple[Channel, Outgoing]],
        crossings: Sequence[Crossing],
        unknown: Sequence[tuple[Line, Line]],
    ) -> None:
        for crossing in crossings:
            self.neighbours.begin(crossing)
        for channel, outgoing in transfers:
            channel.start(outgoing)
        for leader, follower in unknown:
            self.neighbours.introductions.introduce(leader, follower)

    def go_on(self) -> None:
        """More of what is to be sent was written."""
        self.tell(_nothing)

    def _wake(self) -> None:
        self.wake()

    def flush(self, timeout: float) -> bool:
        """Wait until everything that was put has landed; False when it has not in `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while not all(way.channel.idle for way in list(self._ways.values())):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.001)
        return True

    def close(self) -> None:
        """Close every connection and end the thread. Twice is fine; after an interrupt it does the rest."""
        with self._lock:
            self._closed = True
            thread = self._thread
            if thread is not None and not self._ended:
                self._poller.wake()
        if thread is not None and thread is not threading.current_thread():
            thread.join(_END_MAY_TAKE)
        self._release()

    def statistics(self) -> dict[str, object]:
        """Bytes sent and received, connections made, landings beside the ring by reason."""
        channels = [way.channel for way in list(self._ways.values())]
        return {
            "channels": len(channels),
            "connections": sum(channel.opened for channel in channels),
            "sent bytes": {channel.peer.name: channel.sent for channel in channels},
            "neighbours": self.neighbours.introductions.proved,
            "crossed once": self.neighbours.crossed,
            "read at a neighbour": self.neighbours.opened,
            "landed beside the ring": dict(self.landing.detours),
        }

    # ------------------------------------------------------------------ the thread

    def _run(self) -> None:
        try:
            self._loop()
        except Exception as error:  # noqa: BLE001  # nobody else would hear of it
            _log.exception("the bulk connections of this endpoint failed")
            for way in list(self._ways.values()):
                way.channel.fail(f"{type(error).__name__} in the thread of the bulk connections")

    def _loop(self) -> None:
        wait: float | None = 0.0
        looked = 0.0
        while not self._closed:
            for descriptor, events in self._poller.ready(wait):
                self._serve(descriptor, events)
            for descriptor in [*self._eager]:
                self._eager.discard(descriptor)
                self._serve(descriptor, IN)
            self._obey()
            more = self._send_all() or bool(self._eager)
            now = time.monotonic()
            if now - looked >= _LOOK_EVERY:  # not after each piece of what comes
                looked, left = now, self._look_at_the_clock(now)
            else:
                left = _LOOK_EVERY
            wait = 0.0 if more else left

    def _obey(self) -> None:
        while self._commands:
            self._commands.popleft()()

    def _serve(self, descriptor: int, events: int) -> None:
        if descriptor in self._connected:
            channel, connection = self._connected[descriptor]
            if events & ~OUT and self._guarded(channel, connection, connection.receive):
                self._eager.add(descriptor)  # TLS may hold what epoll does not see
            if events & OUT:
                self._poller.want(descriptor, IN)
        else:
            self._meeting.serve(descriptor)

    def _guarded(self, channel: Channel, connection: Connection, step: Callable[[], bool]) -> bool:
        """One step of a connection, which may be its last; whether there is more to do at once."""
        try:
            return not connection.closed and step()
        except Lost as error:
            self._lose(channel, connection, str(error), damaged=error.damaged)
        except Exception as error:  # noqa: BLE001  # what one peer sent must not end the others' connections
            text = f"the bulk connection with {channel.peer} failed"
            self._warnings.tell(_log.exception, text, channel.peer.name)
            self._lose(channel, connection, f"{type(error).__name__} here", damaged=True)
        return False

    def _lose(self, channel: Channel, connection: Connection, reason: str, *, damaged: bool = False) -> None:
        if channel.connection is connection:
            channel.detach(reason, damaged=damaged)
        self._hang_up(connection.socket)
        way = self._ways.get(channel.peer.link)
        if way is not None:
            way.dial_soon(reason)

    def _send_all(self) -> bool:
        more = False
        for descriptor, (channel, connection) in list(self._connected.items()):
            if connection.closed:
                self._hang_up(connection.socket)
                continue
            if self._poller.wants(descriptor) & OUT:
                continue
            more |= self._guarded(channel, connection, connection.send)
            if connection.sending and descriptor in self._connected and not more:
                self._poller.want(descriptor, IN | OUT)
        return more

    def _connect(self, way: Way, socket: sockets.socket) -> None:
        """A connection was made and is who it must be."""
        connection = Connection(socket, way.channel)
        self._connected[socket.fileno()] = way.channel, connection
        way.channel.attach(connection)

    def _hang_up(self, socket: sockets.socket) -> None:
        self._connected.pop(socket.fileno(), None)
        self._poller.hang_up(socket)

    # ------------------------------------------------------------------ time

    def _look_at_the_clock(self, now: float) -> float | None:
        """Do what is due; seconds until the next thing is, None: nothing is."""
        waits = self._meeting.overdue(now)
        for way in list(self._ways.values()):
            waits += self._tend(way, now)
        waits += self.neighbours.look(now)
        return min(waits, default=None)

    def _tend(self, way: Way, now: float) -> list[float]:
        channel = way.channel
        if channel.over:
            return []
        waits = self._meeting.tend(way, now)
        try:
            wait = channel.tick(now)
        except Lost as error:
            assert channel.connection is not None
            self._lose(channel, channel.connection, str(error))
            wait = 0.0
        return waits if wait is None else [*waits, wait]

    # ------------------------------------------------------------------ the end

    def _release(self) -> None:
        with self._lock:
            self._ended = True
        self._obey()
        for way in list(self._ways.values()):
            way.channel.close()
        self.neighbours.guest.close()
        self._close_descriptors()

    def _close_descriptors(self) -> None:
        for _, connection in self._connected.values():
            connection.socket.close()
        self._meeting.close()
        for listener in self._listeners.values():
            listener.close()
        self._poller.close()


def _nothing() -> None:
    return


_hubs: weakref.WeakSet[Hub] = weakref.WeakSet()


def _in_child() -> None:
    """A forked child has no thread for its parent's connections, and must not keep them open."""
    for hub in list(_hubs):
        hub._closed = True
        hub._close_descriptors()


os.register_at_fork(after_in_child=_in_child)
