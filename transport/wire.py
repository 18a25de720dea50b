"""The zmq sockets of one endpoint: bind, dial, post, drain, wait. No operation here blocks but `wait`.

One ROUTER for each address listened on, one DEALER for each connection made. A zmq socket is not safe
for two threads at a time, so every operation is non-blocking under one lock that nobody waits under.
zmq.FD is edge-triggered, and any operation on the socket may swallow the edge. So `fileno` is an epoll
descriptor over all zmq.FDs and one eventfd, which stays readable while there is something left to do.

A forked child inherits the connections, and would keep them open when its parent is killed: the peers would
not hear of it, and the address would stay taken. So a child closes them first of all.
"""

from __future__ import annotations

import errno
import os
import resource
import select
import socket as sockets
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import zmq
from zmq.utils.monitor import parse_monitor_message

from transport import addresses, curve
from transport.backends.base import Bytes
from transport.config import TransportConfig
from transport.curve import Doorkeeper
from transport.errors import Closed, TooLarge, TransportError

_ROUTER, _DEALER = zmq.SocketType.ROUTER, zmq.SocketType.DEALER
_MORE = zmq.SNDMORE | zmq.NOBLOCK
_POLLIN = int(zmq.POLLIN)
_EVENTS = 64  # descriptors at a glance; what is left fires again
_RECEIVE_QUEUE = 128  # messages of one peer that zmq itself keeps; what is unread beyond waits over there
_NEVER = 10 * 86_400_000  # ms; with -1, which is never, zmq throws away what came and was not read yet
_UNNUMBERED = 64  # messages without a number that may wait for one peer
READ_AHEAD = _RECEIVE_QUEUE // 2
"""Messages that a peer's zmq surely reads before its endpoint looks: it goes on at the half of its queue."""
# Seconds that zmq has at least for what is still to be sent when a socket closes, the goodbye among it.
# libzmq ends the process (4.3.5, its issue 3442) where a connection breaks in the middle of a message of
# several parts just as this time is over: with no time at all, when one closes because a peer was killed.
_LEAST_LINGER = 0.1
_GONE = zmq.Event.DISCONNECTED | zmq.Event.CLOSED
_TURNED_AWAY = (
    zmq.Event.HANDSHAKE_FAILED_AUTH
    | zmq.Event.HANDSHAKE_FAILED_PROTOCOL
    | zmq.Event.HANDSHAKE_FAILED_NO_DETAIL
)
_WATCHED = _GONE | _TURNED_AWAY | zmq.Event.CONNECTED


FRAME_BYTES = 512  # what a frame takes beside its bytes: zmq's message, an array, a view


class Route(NamedTuple):
    """Where a peer is: the number of the socket, and zmq's identity of the connection on a ROUTER."""

    socket: int
    identity: bytes = b""


class Arrived(NamedTuple):
    """One message as it came: from where, the control frame, the payload frames."""

    route: Route
    control: bytes
    frames: list[Bytes]
    excess: int = 0  # frames beyond what one message may have; none of them is kept then

    @property
    def nbytes(self) -> int:
        """What it takes up in memory."""
        return weight(self.control, self.frames)


def weight(control: bytes, frames: Sequence[Bytes]) -> int:
    """What a message takes up in memory, as both sides count it (`max_queued_bytes`)."""
    return len(control) + sum([frame.nbytes for frame in frames]) + FRAME_BYTES * len(frames)


_Name = tuple[
    bool, object
]  # whether it is one's own or the other side's, and a path, a port, or host and port
_wires: weakref.WeakSet[Wire] = weakref.WeakSet()  # a child closes what it inherits of them


class Unreachable(Exception):
    """The connection is not there any more."""


class Busy(Exception):
    """The queue to that peer is full."""


class Wire:
    """All sockets of one endpoint."""

    def __init__(self, config: TransportConfig) -> None:
        self._config = config
        self._context = zmq.Context()
        self._lock = threading.Lock()
        self._sockets: dict[int, zmq.Socket[bytes]] = {}
        self._monitors: dict[int, zmq.Socket[bytes]] = {}
        self._addresses: dict[int, str] = {}
        self._dialled: dict[int, str] = {}  # as the caller said it, with the name of a host perhaps
        self._lost: set[int] = set()
        self._reached: set[int] = set()
        self._turned_away: set[str] = set()  # addresses
        self._next = 1
        self._epoll = select.epoll()
        self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._event_lock = threading.Lock()  # a descriptor that is closed may be somebody else's already
        self._epoll.register(self._event, select.EPOLLIN)
        self._awake = False
        self._fired: list[tuple[int, int]] = []  # what `wait` saw, for `drain`; one that is lost fires again
        self._routers: set[int] = set()
        self._descriptors: dict[int, tuple[int, int]] = {}  # zmq.FD of each socket and of its monitor
        self._doorkeeper: Doorkeeper | None = None
        self._closed = False  # or about to be
        self._paths: list[Path] = []  # to be unlinked, once it is
        _wires.add(self)

    # ------------------------------------------------------------------ addresses

    def bind(self, address: str) -> str:
        """Listen there; the address as others reach it (a tcp port 0 or * is filled in).

        `TransportError` when the address is wrong, taken, or not allowed without encryption.
        """
        try:
            where = self._located(address, listening=True)
        except addresses.UnknownHost as error:
            raise TransportError(f"cannot listen at {address}: {error}") from error
        secure = self._check_keys(where, listening=True)
        with self._lock:
            socket = self._socket(_ROUTER, where)
            socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
            try:
                if secure:
                    self._doorkeeper = self._doorkeeper or Doorkeeper(
                        self._context, self._config.curve_clients
                    )
                    curve.listen(socket, self._config)
                # Whoever is not of our uid is sent away even before the file has its mode.
                socket.setsockopt(zmq.IPC_FILTER_UID, os.getuid())
                _allow_descriptors()
                socket.bind(addresses.bindable(where))
                if address.startswith("ipc://"):
                    os.chmod(address.removeprefix("ipc://"), 0o600)
            except (zmq.ZMQError, OSError) as error:
                socket.close(0)
                # Without the address, which pyzmq adds to its own text.
                why = zmq.strerror(error.errno) if error.errno else str(error)
                raise TransportError(f"cannot listen at {address}: {why}") from error
            actual = socket.getsockopt_string(zmq.LAST_ENDPOINT)
            self._routers.add(self._add(socket, actual))
            return actual

    def dial(self, address: str) -> int:
        """Connect a new socket; its number. It is not connected again when the connection is lost.

        `UnknownHost` when there is no such name (yet): zmq would not say so, and not look again for long.
        """
        where = self._located(address, listening=False)
        secure = self._check_keys(where, listening=False)
        with self._lock:
            socket = self._socket(_DEALER, where)
            socket.setsockopt(zmq.RECONNECT_IVL, _NEVER)
            if secure:
                curve.dial(socket, self._config)
            number = self._add(socket, where)
            self._dialled[number] = address
            try:
                socket.connect(where)
            except zmq.ZMQError as error:
                self._remove(number)
                raise TransportError(f"cannot connect to {address}: {error.strerror}") from error
            return number

    def _located(self, address: str, *, listening: bool) -> str:
        """An address with the host's address for its name; `TransportError` when it may not be used."""
        addresses.check(address, listening=listening)
        where = addresses.located(address, listening=listening)
        addresses.check_safety(where, self._config)
        return where

    def _check_keys(self, address: str, *, listening: bool) -> bool:
        """Whether links at an address are encrypted; `TransportError` when keys for that are missing."""
        secure = bool(self._config.curve_key) and address.startswith("tcp://")
        if secure:
            curve.check(self._config, listening=listening)
        return secure

    def hang_up(self, number: int) -> None:
        """Close a socket; what is still to be sent goes out within the linger time, or 0.1 s."""
        with self._lock:
            self._remove(number)

    def address(self, number: int) -> str:
        """The address of a socket; of one that dialled a name the address that it had then."""
        return self._addresses.get(number, "")

    def shown(self, number: int) -> str:
        """The same for people: as it was said to `dial`."""
        return self._dialled.get(number) or self.address(number)

    def names(self) -> set[_Name]:
        """Where these sockets listen and what they are connected with, as the kernel names it."""
        return {_name(address, number in self._routers) for number, address in self._addresses.items()}

    def _socket(self, kind: zmq.SocketType, address: str) -> zmq.Socket[bytes]:
        """A socket with its limits, which zmq takes over at bind and connect and not later."""
        if self._closed:  # by another thread, whose `close` would wait for this socket for ever
            raise Closed("this endpoint was closed meanwhile")
        config = self._config
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.IPV6, addresses.is_ipv6(address))
        socket.setsockopt(zmq.LINGER, int(max(config.linger, _LEAST_LINGER) * 1000))
        # Beyond our own count of unacknowledged messages: for answers to a peer that asks but never reads.
        socket.setsockopt(zmq.SNDHWM, 2 * config.max_queued_messages + _UNNUMBERED)
        socket.setsockopt(zmq.RCVHWM, _RECEIVE_QUEUE)
        socket.setsockopt(zmq.MAXMSGSIZE, max(config.max_control_bytes, config.detour_bytes))
        socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
        socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, max(1, int(config.tcp_timeout / 2)))
        socket.setsockopt(zmq.TCP_KEEPALIVE_INTVL, max(1, int(config.tcp_timeout / 8)))
        socket.setsockopt(zmq.TCP_KEEPALIVE_CNT, 4)
        return socket

    def _add(self, socket: zmq.Socket[bytes], address: str) -> int:
        number = self._next
        self._next += 1
        monitor = socket.get_monitor_socket(_WATCHED)
        self._sockets[number], self._monitors[number] = socket, monitor
        self._addresses[number] = address
        self._descriptors[number] = socket.FD, monitor.FD
        for descriptor in self._descriptors[number]:
            self._epoll.register(descriptor, select.EPOLLIN)
        self.wake()  # what came before EVENTS was first asked for never shows at zmq.FD
        return number

    def _remove(self, number: int) -> None:
        """Close a socket, then forget it: for one that is forgotten and open `close` would wait for ever."""
        socket = self._sockets.get(number)
        if socket is None:
            return
        for descriptor in self._descriptors.pop(number, ()):
            with suppress(OSError):
                self._epoll.unregister(descriptor)
        if not socket.closed:
            socket.disable_monitor()
            self._monitors[number].close(0)
            socket.close()
        self._addresses.pop(number, None)
        self._dialled.pop(number, None)
        self._reached.discard(number)
        self._routers.discard(number)
        self._monitors.pop(number, None)
        del self._sockets[number]

    # ------------------------------------------------------------------ messages

    def post(self, route: Route, control: bytes, frames: Sequence[Bytes] = ()) -> None:
        """Queue one message. `Unreachable`, `Busy` or `TooLarge`; nothing was queued then."""
        if len(control) > self._config.max_control_bytes:
            raise TooLarge(
                f"a control message of {len(control)} bytes exceeds max_control_bytes"
                f" ({self._config.max_control_bytes}); send fewer tensors at once or a smaller body"
            )
        with self._lock:
            socket = self._sockets.get(route.socket)
            if socket is None:
                raise Unreachable
            try:
                if route.identity:
                    socket.send(route.identity, _MORE)
                if frames:
                    socket.send_multipart(
                        [control, *(frame.data for frame in frames)], zmq.NOBLOCK, copy=False
                    )
                else:
                    socket.send(control, zmq.NOBLOCK)
            except zmq.Again as error:
                raise Busy from error
            except zmq.ZMQError as error:
                if error.errno in (errno.EHOSTUNREACH, errno.ENOTCONN):
                    raise Unreachable from error
                raise
            finally:
                if _readable(socket):  # the operation, failed or not, may have swallowed the edge of zmq.FD
                    self.wake()

    def drain(self, most: int) -> list[Arrived]:
        """What has come, `most` messages for each socket at a time; `fileno` stays readable for the rest."""
        arrived: list[Arrived] = []
        ready, self._fired = self._fired, []
        try:
            ready = ready or self._epoll.poll(0, _EVENTS)
        except (OSError, ValueError):  # closed by another thread, which the next check finds out
            return arrived
        if not ready:
            return arrived
        fired = {descriptor for descriptor, _ in ready}
        with self._lock:
            everywhere = self._rest()  # before looking, so that what comes meanwhile is seen or wakes again
            for number, socket in self._sockets.items():
                descriptor, watched = self._descriptors[number]
                if everywhere or descriptor in fired:
                    self._read(number, socket, most, arrived)
                if everywhere or watched in fired:
                    self._watch(number)
        return arrived

    def _read(self, number: int, socket: zmq.Socket[bytes], most: int, arrived: list[Arrived]) -> None:
        routed = number in self._routers
        for _ in range(most):
            if not _readable(socket):
                return
            parts = _receive(socket)
            arrived.append(_unpack(number, routed, parts, self._config.max_tensors))
        self.wake()

    def reached(self, number: int) -> bool:
        """Whether a socket that dialled found somebody who listens."""
        return number in self._reached

    def turned_away(self, address: str) -> bool:
        """Whether who listens at an address, as it was dialled, broke a handshake off."""
        return address in self._turned_away

    def lost(self) -> set[int]:
        """The sockets on which a connection ended or failed since the last call."""
        if not self._lost:
            return set()
        with self._lock:
            lost, self._lost = self._lost, set()
            return lost

    def _watch(self, number: int) -> None:
        monitor = self._monitors[number]
        while _readable(monitor):
            event = parse_monitor_message(monitor.recv_multipart(zmq.NOBLOCK))["event"]
            if event & _TURNED_AWAY:
                self._turned_away.add(self.shown(number))
            if event & (_GONE | _TURNED_AWAY):
                self._lost.add(number)
            else:
                self._reached.add(number)

    # ------------------------------------------------------------------ waiting

    def fileno(self) -> int:
        """Readable while there may be something to do; for poll, epoll and event loops. `Closed`."""
        with suppress(ValueError):
            return self._epoll.fileno()
        raise Closed("this endpoint was closed meanwhile")

    def wait(self, timeout: float) -> None:
        """Until something may have come, or `timeout` seconds are over."""
        with suppress(OSError, ValueError):  # interrupted, or closed by another thread
            self._fired = self._epoll.poll(max(0.0, timeout), _EVENTS)

    def wake(self) -> None:
        """Make `fileno` readable until the next `drain`."""
        with self._event_lock:
            if self._event >= 0 and not self._awake:
                self._awake = True
                os.eventfd_write(self._event, 1)

    def _rest(self) -> bool:
        """`fileno` is readable for what comes from now on; whether `wake` was called before."""
        with self._event_lock:
            awake, self._awake = self._awake, False
            if awake and self._event >= 0:
                os.eventfd_read(self._event)
            return awake

    def close(self, linger: float | None = None) -> None:
        """Close every socket; waits for what is still to be sent, for the linger time or 0.1 s at most.

        Twice is fine; after an interrupt the second time does the rest.
        """
        with self._lock:
            if not self._closed:
                bound = [self._addresses[number] for number in self._routers]
                self._paths = [Path(a.removeprefix("ipc://")) for a in bound if a.startswith("ipc://")]
                self._closed = True
            for socket in self._sockets.values():
                if linger is not None and not socket.closed:
                    socket.setsockopt(zmq.LINGER, int(max(linger, _LEAST_LINGER) * 1000))
            for number in list(self._sockets):
                self._remove(number)
        self._context.term()
        while self._paths:
            self._paths[-1].unlink(missing_ok=True)
            self._paths.pop()
        self.wake()
        self._epoll.close()
        with self._event_lock:
            event, self._event = self._event, -1
            if event >= 0:
                os.close(event)


def _readable(socket: zmq.Socket[bytes]) -> bool:
    return bool(socket.getsockopt(zmq.EVENTS) & _POLLIN)  # type: ignore[operator]  # typed for all options


def _receive(socket: zmq.Socket[bytes]) -> list[zmq.Frame]:
    """The next message. `recv_multipart` asks the socket after every part what the part itself says."""
    parts = [socket.recv(zmq.NOBLOCK, copy=False)]
    while parts[-1].more:
        parts.append(socket.recv(zmq.NOBLOCK, copy=False))
    return parts


def _unpack(number: int, routed: bool, parts: Sequence[zmq.Frame], most: int) -> Arrived:
    """A message of zmq's, with `most` frames beside its control message at most."""
    route = Route(number, parts[0].bytes) if routed else Route(number)
    rest = parts[1:] if routed else parts
    if len(rest) > 1 + most:
        return Arrived(route, b"", [], len(rest) - 1 - most)
    control = rest[0].bytes if rest else b""
    return Arrived(route, control, [np.frombuffer(frame.buffer, np.uint8) for frame in rest[1:]])


def _allow_descriptors() -> None:
    """As many as this process may have: zmq aborts it when an ipc connection comes and none is left."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(OSError, ValueError):  # a hard limit from before the kernel's own was lowered
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


# ------------------------------------------------------------------------------------ forks


def _in_child() -> None:
    """Close the inherited connections and listening sockets, told from others by their names."""
    ours: set[_Name] = set().union(*(wire.names() for wire in list(_wires)))
    _wires.clear()
    for entry in os.listdir("/proc/self/fd") if ours else ():
        if ours & _names_of(int(entry)):
            os.close(int(entry))


def _names_of(descriptor: int) -> set[_Name]:
    """What a socket is bound to and connected with; nothing for what is no socket of these kinds."""
    names: set[_Name] = set()
    try:
        socket = sockets.socket(fileno=descriptor)
    except OSError:
        return names
    try:
        for is_own, ask in ((True, socket.getsockname), (False, socket.getpeername)):
            with suppress(OSError):  # not connected
                name = ask()
                if isinstance(name, str) and name:
                    names.add((is_own, os.path.realpath(name)))
                elif isinstance(name, tuple) and socket.family in (sockets.AF_INET, sockets.AF_INET6):
                    names.add((is_own, name[1] if is_own else name[:2]))
    finally:
        socket.detach()
    return names


def _name(address: str, is_own: bool) -> _Name:
    """The same of an address; of one's own on tcp the port, since hosts may be bound as all of them."""
    scheme, _, rest = address.partition("://")
    if scheme == "ipc":
        return is_own, os.path.realpath(rest)
    host, _, port = rest.rpartition(":")
    return is_own, int(port) if is_own else (host.strip("[]"), int(port))


os.register_at_fork(after_in_child=_in_child)
