"""How bulk connections come about: whom a hub expects, whom it dials and when again, handshakes under way.

For the thread of the hub alone.
"""

from __future__ import annotations

import hmac
import socket as sockets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from transport.bulk.channel import Channel
from transport.bulk.connection import Lost
from transport.bulk.handshake import Handshake, prepare
from transport.bulk.poller import IN, OUT, Poller
from transport.bulk.tls import Identity
from transport.config import TransportConfig

_STRANGERS = 32  # accepted connections that have not shown their secret
_DIAL_MAY_TAKE = 5.0
_FIRST_REDIAL, _LONGEST_REDIAL = 0.05, 1.0


@dataclass
class Way:
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

    def dial_soon(self, reason: str) -> None:
        """Its connection was lost."""
        self.trouble = reason
        self.redial_at, self.nap = time.monotonic() + _FIRST_REDIAL, _FIRST_REDIAL


class Meeting:
    """Makes connections for the ways of a hub, by link; `made` gets each that is whole and proved.

    identity: this side's certificate, once there is one.
    """

    def __init__(
        self,
        config: TransportConfig,
        poller: Poller,
        ways: Mapping[int, Way],
        made: Callable[[Way, sockets.socket], object],
    ) -> None:
        self.identity: Identity | None = None
        self._config = config
        self._poller = poller
        self._ways = ways
        self._made = made
        self._accepting: dict[int, tuple[sockets.socket, bool]] = {}  # by descriptor, as those below
        self._handshakes: dict[int, Handshake] = {}

    def accept_at(self, listener: sockets.socket, secure: bool) -> None:
        """Let peers connect there; `secure`: with TLS."""
        self._accepting[self._poller.watch(listener, IN)] = listener, secure

    def serve(self, descriptor: int) -> bool:
        """Go on with a descriptor, if it is one of those here."""
        if descriptor in self._accepting:
            self._accept(*self._accepting[descriptor])
        elif descriptor in self._handshakes:
            self._shake(descriptor)
        else:
            return False
        return True

    def _accept(self, listener: sockets.socket, secure: bool) -> None:
        try:
            socket, _ = listener.accept()
        except OSError:
            return
        if secure and self.identity is None:
            socket.close()
            return
        strangers = [known for known, handshake in self._handshakes.items() if handshake.accepted]
        if len(strangers) >= _STRANGERS:  # who knows the secret shows it at once, the oldest did not
            self._give_up(strangers[0], "too many came after it")
        prepare(socket, self._config.tcp_timeout)
        deadline = time.monotonic() + self._config.handshake_timeout
        tls = self.identity.server if secure and self.identity is not None else None
        handshake = Handshake(socket, deadline, find=self._token_of, tls=tls)
        self._handshakes[self._poller.watch(socket, IN)] = handshake

    def _token_of(self, link: int) -> bytes | None:
        way = self._ways.get(link)
        return None if way is None or way.port or way.channel.over or way.channel.ended else way.token

    def _dial(self, way: Way, now: float) -> None:
        way.redial_at = now + _DIAL_MAY_TAKE + 1.0  # unless this one ends before
        try:
            family, kind, protocol, _, address = sockets.getaddrinfo(
                way.host, way.port, type=sockets.SOCK_STREAM
            )[0]
            socket = sockets.socket(family, kind, protocol)
        except OSError as error:
            _failed(way, error.strerror or str(error))
            return
        prepare(socket, self._config.tcp_timeout)
        try:
            socket.connect(address)
        except BlockingIOError:
            pass
        except OSError as error:
            socket.close()
            _failed(way, error.strerror or str(error))
            return
        tls = self.identity.client(way.certificate) if way.secure and self.identity is not None else None
        link = way.channel.peer.link
        handshake = Handshake(socket, now + _DIAL_MAY_TAKE, link=link, token=way.token, tls=tls)
        self._handshakes[self._poller.watch(socket, OUT)] = handshake

    def _shake(self, descriptor: int) -> None:
        handshake = self._handshakes[descriptor]
        try:
            handshake.step()
        except Lost as error:
            self._give_up(descriptor, str(error))
            return
        if not handshake.done:
            self._poller.want(descriptor, OUT if handshake.writing else IN)
            return
        way = self._ways.get(handshake.link)
        if way is None or way.channel.over or way.channel.ended:
            self._give_up(descriptor, "the link has ended")
            return
        if way.secure and not hmac.compare_digest(handshake.certificate, way.certificate):
            self._give_up(descriptor, "the certificate is not the one of the control link")
            return
        del self._handshakes[descriptor]
        self._poller.want(descriptor, IN)
        way.redial_at, way.nap = 0.0, _FIRST_REDIAL
        self._made(way, handshake.socket)

    def _give_up(self, descriptor: int, reason: str) -> None:
        handshake = self._handshakes.pop(descriptor)
        self._poller.hang_up(handshake.socket)
        way = self._ways.get(handshake.link)
        if way is not None and way.port:
            _failed(way, reason)

    # ------------------------------------------------------------------ time

    def overdue(self, now: float) -> list[float]:
        """Give up what took too long; in how many seconds to look at each of the others."""
        waits = []
        for descriptor, handshake in list(self._handshakes.items()):
            if now >= handshake.deadline:
                self._give_up(descriptor, "no answer in time")
            else:
                waits.append(handshake.deadline - now)
        return waits

    def tend(self, way: Way, now: float) -> list[float]:
        """Dial when it is time; a channel that never had a connection fails in the end."""
        channel = way.channel
        if channel.connection is not None or channel.ended:
            return []
        if not channel.opened and now >= way.until:
            what = f"no connection to {way.host}:{way.port}" if way.port else "the peer did not connect"
            channel.fail(f"{what} in {self._config.handshake_timeout:g} s: {way.trouble or 'no answer'}")
            return []
        if way.port and now >= way.redial_at and (way.certificate or not way.secure):
            self._dial(way, now)
        waits = [max(0.0, way.until - now) if not channel.opened else 1.0]
        return [*waits, max(0.0, way.redial_at - now)] if way.port else waits

    def close(self) -> None:
        """Close what is not a connection yet."""
        for handshake in self._handshakes.values():
            handshake.socket.close()


def _failed(way: Way, reason: str) -> None:
    way.trouble = reason
    way.redial_at = time.monotonic() + way.nap
    way.nap = min(2 * way.nap, _LONGEST_REDIAL)
