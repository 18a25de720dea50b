"""All bulk connections of one endpoint and the one thread that serves them, made when the first is needed.

The thread sleeps in epoll; others give it commands and wake it by an eventfd. It is the only owner of
sockets and channels, so that nothing here needs a lock but the queue of commands.
"""

from __future__ import annotations

import hmac
import logging
import os
import secrets
import select
import socket as sockets
import ssl
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from transport.backends.base import Peer
from transport.bulk.cargo import Cargo
from transport.bulk.channel import Channel
from transport.bulk.connection import Connection, Lost
from transport.bulk.handshake import TOKEN_BYTES, Handshake, prepare
from transport.bulk.landing import Landing
from transport.bulk.tls import Identity, available
from transport.bulk.transfer import Outgoing
from transport.config import TransportConfig

_log = logging.getLogger("tensorferry.transport")

Command = Callable[[], object]
_EVENTS = 64
_STRANGERS = 32  # accepted connections that have not shown their secret
_DIAL_MAY_TAKE = 5.0
_FIRST_REDIAL, _LONGEST_REDIAL = 0.05, 1.0
_END_MAY_TAKE = 10.0
_LOOK_EVERY = 1e-3  # seconds between two looks at the clock while something goes on
_IN = select.EPOLLIN
_OUT = select.EPOLLOUT


@dataclass
class _Way:
    """Where a channel is dialled, and when again; port 0: the other side dials."""

    channel: Channel
    token: bytes
    until: float  # there must have been a connection by then
    secure: bool = False
    certificate: bytes = b""  # the other side's, pinned
    host: str = ""
    port: int = 0
    redial_at: float = 0.0
    nap: float = _FIRST_REDIAL
    trouble: str = ""


class Hub:
    """Channels by link. `wake` is called when something has landed or never will."""

    def __init__(self, config: TransportConfig, landing: Landing) -> None:
        self.landing = landing
        self.wake: Callable[[], object] = lambda: None
        self._config = config
        self._lock = threading.Lock()
        self._commands: deque[Command] = deque()
        self._thread: threading.Thread | None = None
        self._epoll: select.epoll | None = None
        self._event = -1
        self._closed = False
        self._ways: dict[int, _Way] = {}  # by link
        self._identity: Identity | None = None
        self._listeners: dict[tuple[str, bool], sockets.socket] = {}  # by host, and whether with TLS
        self._accepting: dict[int, tuple[sockets.socket, bool]] = {}  # by descriptor, as those below
        self._handshakes: dict[int, Handshake] = {}
        self._connected: dict[int, tuple[Channel, Connection]] = {}
        self._interest: dict[int, int] = {}
        self._eager: set[int] = set()  # whose turn ended before there was nothing more to read
        _hubs.add(self)

    # ------------------------------------------------------------------ for any thread

    def channel(self, peer: Peer) -> Channel | None:
        """The channel of a link, None when there is none."""
        way = self._ways.get(peer.link)
        return None if way is None else way.channel

    def expect(self, peer: Peer, host: str) -> tuple[int, bytes]:
        """Let a peer dial; the port at which it reaches this host, and the secret that it must know.

        `OSError` when nothing can listen there.
        """
        with self._lock:
            way = self._way(peer, secrets.token_bytes(TOKEN_BYTES))
            listener = self._listeners.get((host, way.secure))
            if listener is None:
                family = sockets.AF_INET6 if ":" in host else sockets.AF_INET
                listener = sockets.create_server((host, self._config.tcp_port), family=family, backlog=128)
                listener.setblocking(False)
                self._listeners[host, way.secure] = listener
                self._queue(lambda: self._accept_at(listener, way.secure))
            return int(listener.getsockname()[1]), way.token

    def dial(self, peer: Peer, host: str, port: int, token: bytes) -> Channel:
        """Connect to a peer that expects it; tried again until `handshake_timeout` is over."""
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
            self._identity = self._identity or Identity()
            return self._identity.certificate

    def pin(self, peer: Peer, certificate: bytes) -> str:
        """What the peer will show; "" or what is wrong with it."""
        with self._lock:
            if self._is_secure(peer) != bool(certificate):
                return "only one side has keys"
            way = self._ways.get(peer.link)
            if way is not None and certificate:
                self._identity = self._identity or Identity()
                try:
                    self._identity.trust(certificate)
                except (ssl.SSLError, ValueError):
                    return "the certificate is none"
                way.certificate = certificate
                self._queue(_nothing)  # who dials was waiting for it
            return ""

    def lacks(self, peer: Peer) -> str:
        """Why there can be no bulk connection with a peer, "" in general."""
        return available() if self._is_secure(peer) else ""

    def _is_secure(self, peer: Peer) -> bool:
        return bool(self._config.curve_key) and peer.address.startswith("tcp://")

    def _way(self, peer: Peer, token: bytes) -> _Way:
        way = self._ways.get(peer.link)
        if way is None:
            channel = Channel(peer, self._config, self.landing, self._wake)
            until = time.monotonic() + self._config.handshake_timeout
            way = _Way(channel, token, until, secure=self._is_secure(peer))
            self._ways[peer.link] = way
        return way

    def drop(self, peer: Peer) -> None:
        """The link ended and nothing that came over it is left: close its connection."""
        way = self._ways.pop(peer.link, None)
        if way is not None:
            self.tell(way.channel.close)

    def tell(self, command: Command, *, now: bool = True) -> None:
        """Have the thread do something; `now`: wake it for that."""
        with self._lock:
            if not self._closed:
                self._queue(command, now=now)
                return
        command()  # the thread has ended: nobody else does anything

    def _queue(self, command: Command, *, now: bool = True) -> None:
        self._commands.append(command)
        if self._thread is None:
            self._epoll = select.epoll()
            self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self._epoll.register(self._event, _IN)
            self._thread = threading.Thread(target=self._run, name="tensorferry-bulk", daemon=True)
            self._thread.start()
        elif now:
            os.eventfd_write(self._event, 1)

    def start(self, channel: Channel, cargo: Cargo) -> Outgoing:
        """Send these bytes, of which some may still have to be written."""
        with self._lock:
            outgoing = Outgoing(channel.next_number(), cargo)
            if not self._closed:
                self._queue(lambda: channel.start(outgoing))
            return outgoing

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
        """Close every connection and end the thread. Twice is fine."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            thread = self._thread
            if thread is not None:
                os.eventfd_write(self._event, 1)
        if thread is not None and thread is not threading.current_thread():
            thread.join(_END_MAY_TAKE)
        self._release()

    def statistics(self) -> dict[str, object]:
        """Bytes sent and received, connections made, landings beside the ring by reason."""
        channels = [way.channel for way in list(self._ways.values())]
        return {
            "channels": len(channels),
            "connections": sum(channel.opened for channel in channels),
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
        epoll = self._epoll
        assert epoll is not None
        wait: float | None = 0.0
        looked = 0.0
        while not self._closed:
            for descriptor, events in epoll.poll(wait, _EVENTS):
                self._serve(descriptor, events)
            for descriptor in [*self._eager]:
                self._eager.discard(descriptor)
                self._serve(descriptor, _IN)
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
        if descriptor == self._event:
            os.eventfd_read(descriptor)
        elif descriptor in self._accepting:
            self._accept(*self._accepting[descriptor])
        elif descriptor in self._handshakes:
            self._shake(descriptor)
        elif descriptor in self._connected:
            channel, connection = self._connected[descriptor]
            if events & ~_OUT and self._guarded(channel, connection, connection.receive):
                self._eager.add(descriptor)  # TLS may hold what epoll does not see
            if events & _OUT:
                self._want(descriptor, _IN)

    def _guarded(self, channel: Channel, connection: Connection, step: Callable[[], bool]) -> bool:
        """One step of a connection, which may be its last; whether there is more to do at once."""
        try:
            return not connection.closed and step()
        except Lost as error:
            self._lose(channel, connection, str(error), damaged=error.damaged)
        except Exception as error:  # noqa: BLE001  # what one peer sent must not end the others' connections
            _log.exception("the bulk connection with %r failed", channel.peer.name)
            self._lose(channel, connection, f"{type(error).__name__} here", damaged=True)
        return False

    def _lose(self, channel: Channel, connection: Connection, reason: str, *, damaged: bool = False) -> None:
        if channel.connection is connection:
            channel.detach(reason, damaged=damaged)
        self._hang_up(connection.socket)
        way = self._ways.get(channel.peer.link)
        if way is not None:
            way.trouble = reason
            way.redial_at, way.nap = time.monotonic() + _FIRST_REDIAL, _FIRST_REDIAL

    def _send_all(self) -> bool:
        more = False
        for descriptor, (channel, connection) in list(self._connected.items()):
            if connection.closed:
                self._hang_up(connection.socket)
                continue
            if self._interest[descriptor] & _OUT:
                continue
            more |= self._guarded(channel, connection, connection.send)
            if connection.sending and descriptor in self._connected and not more:
                self._want(descriptor, _IN | _OUT)
        return more

    # ------------------------------------------------------------------ connections

    def _watch(self, socket: sockets.socket, events: int) -> int:
        assert self._epoll is not None
        descriptor = socket.fileno()
        self._epoll.register(descriptor, events)
        self._interest[descriptor] = events
        return descriptor

    def _want(self, descriptor: int, events: int) -> None:
        assert self._epoll is not None
        if self._interest.get(descriptor, events) != events:
            self._interest[descriptor] = events
            self._epoll.modify(descriptor, events)

    def _hang_up(self, socket: sockets.socket) -> None:
        assert self._epoll is not None
        descriptor = socket.fileno()
        for known in (self._interest, self._handshakes, self._connected):
            known.pop(descriptor, None)
        with suppress(OSError, ValueError):
            self._epoll.unregister(descriptor)
        socket.close()

    def _accept_at(self, listener: sockets.socket, secure: bool) -> None:
        self._accepting[self._watch(listener, _IN)] = listener, secure

    def _accept(self, listener: sockets.socket, secure: bool) -> None:
        try:
            socket, _ = listener.accept()
        except OSError:
            return
        if len(self._handshakes) >= _STRANGERS or (secure and self._identity is None):
            socket.close()
            return
        prepare(socket, self._config.tcp_timeout)
        deadline = time.monotonic() + self._config.handshake_timeout
        tls = self._identity.server if secure and self._identity is not None else None
        handshake = Handshake(socket, deadline, find=self._token_of, tls=tls)
        self._handshakes[self._watch(socket, _IN)] = handshake

    def _token_of(self, link: int) -> bytes | None:
        way = self._ways.get(link)
        return None if way is None or way.port or way.channel.over or way.channel.ended else way.token

    def _dial(self, way: _Way, now: float) -> None:
        way.redial_at = now + _DIAL_MAY_TAKE + 1.0  # unless this one ends before
        try:
            family, kind, protocol, _, address = sockets.getaddrinfo(
                way.host, way.port, type=sockets.SOCK_STREAM
            )[0]
            socket = sockets.socket(family, kind, protocol)
        except OSError as error:
            self._failed(way, error.strerror or str(error))
            return
        prepare(socket, self._config.tcp_timeout)
        try:
            socket.connect(address)
        except BlockingIOError:
            pass
        except OSError as error:
            socket.close()
            self._failed(way, error.strerror or str(error))
            return
        tls = self._identity.client(way.certificate) if way.secure and self._identity is not None else None
        link = way.channel.peer.link
        handshake = Handshake(socket, now + _DIAL_MAY_TAKE, link=link, token=way.token, tls=tls)
        self._handshakes[self._watch(socket, _OUT)] = handshake

    def _failed(self, way: _Way, reason: str) -> None:
        way.trouble = reason
        way.redial_at = time.monotonic() + way.nap
        way.nap = min(2 * way.nap, _LONGEST_REDIAL)

    def _shake(self, descriptor: int) -> None:
        handshake = self._handshakes[descriptor]
        try:
            handshake.step()
        except Lost as error:
            self._give_up(handshake, str(error))
            return
        if not handshake.done:
            self._want(descriptor, _OUT if handshake.writing else _IN)
            return
        way = self._ways.get(handshake.link)
        if way is None or way.channel.over or way.channel.ended:
            self._give_up(handshake, "the link has ended")
            return
        if way.secure and not hmac.compare_digest(handshake.certificate, way.certificate):
            self._give_up(handshake, "the certificate is not the one of the control link")
            return
        del self._handshakes[descriptor]
        self._want(descriptor, _IN)
        connection = Connection(handshake.socket, way.channel)
        self._connected[descriptor] = way.channel, connection
        way.redial_at, way.nap = 0.0, _FIRST_REDIAL
        way.channel.attach(connection)

    def _give_up(self, handshake: Handshake, reason: str) -> None:
        self._hang_up(handshake.socket)
        way = self._ways.get(handshake.link)
        if way is not None and way.port:
            self._failed(way, reason)

    # ------------------------------------------------------------------ time

    def _look_at_the_clock(self, now: float) -> float | None:
        """Do what is due; seconds until the next thing is, None: nothing is."""
        waits = []
        for handshake in list(self._handshakes.values()):
            if now >= handshake.deadline:
                self._give_up(handshake, "no answer in time")
            else:
                waits.append(handshake.deadline - now)
        for way in list(self._ways.values()):
            waits += self._tend(way, now)
        return min(waits, default=None)

    def _tend(self, way: _Way, now: float) -> list[float]:
        channel = way.channel
        if channel.over:
            return []
        waits = []
        if channel.connection is None and not channel.ended:
            if not channel.opened and now >= way.until:
                what = f"no connection to {way.host}:{way.port}" if way.port else "the peer did not connect"
                channel.fail(f"{what} in {self._config.handshake_timeout:g} s: {way.trouble or 'no answer'}")
                return []
            if way.port and now >= way.redial_at and (way.certificate or not way.secure):
                self._dial(way, now)
            waits.append(max(0.0, way.until - now) if not channel.opened else 1.0)
            if way.port:
                waits.append(max(0.0, way.redial_at - now))
        try:
            wait = channel.tick(now)
        except Lost as error:
            assert channel.connection is not None
            self._lose(channel, channel.connection, str(error))
            wait = 0.0
        return waits if wait is None else [*waits, wait]

    # ------------------------------------------------------------------ the end

    def _release(self) -> None:
        self._obey()
        for way in list(self._ways.values()):
            way.channel.close()
        self._close_descriptors()

    def _close_descriptors(self) -> None:
        for _, connection in self._connected.values():
            connection.socket.close()
        for handshake in self._handshakes.values():
            handshake.socket.close()
        for listener in self._listeners.values():
            listener.close()
        if self._epoll is not None:
            self._epoll.close()
            os.close(self._event)
            self._epoll = None


def _nothing() -> None:
    return


_hubs: weakref.WeakSet[Hub] = weakref.WeakSet()


def _in_child() -> None:
    """A forked child has no thread for its parent's connections, and must not keep them open."""
    for hub in list(_hubs):
        hub._closed = True
        hub._close_descriptors()


os.register_at_fork(after_in_child=_in_child)
