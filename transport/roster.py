"""Who is linked: links by name and by route, how they begin (hello, welcome, refusal) and who left."""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Sequence

from transport.addresses import on_this_host
from transport.backends.base import Peer
from transport.config import TransportConfig
from transport.errors import ProtocolError
from transport.link import Link
from transport.message import VERSION, Greeting, Hello, Refused, Welcome
from transport.process import own_mark, recognise
from transport.wire import Route, Wire

_REMEMBER = 256
_SAY = 8  # of them, in one text
_PATIENCE = 256 << 10


class Roster:
    """The links of one endpoint. A name has one living link; names travel in hello, never as zmq ids."""

    def __init__(self, wire: Wire, config: TransportConfig, name: str, accepts: Sequence[str]) -> None:
        self.name = name
        self._wire = wire
        self._config = config
        self._accepts = list(accepts)
        self._by_name: dict[str, Link] = {}
        self._by_route: dict[Route, Link] = {}
        self._ended: list[Link] = []  # with messages that were not received
        self._left: OrderedDict[str, tuple[str, float]] = OrderedDict()
        self._lock = threading.Lock()

    # ------------------------------------------------------------------ beginning

    def hello(self, nonce: int) -> Hello:
        """What a connecting endpoint says first."""
        return Hello(VERSION, nonce, self.name, os.getpid(), *self._terms())

    def judge(self, greeting: Greeting) -> str:
        """Why a greeting must be refused; "" when it need not be."""
        if greeting.version != VERSION:
            return f"this endpoint speaks version {VERSION}, not {greeting.version}"
        if isinstance(greeting, Hello) and greeting.name == self.name:
            return f"the name {greeting.name!r} is this endpoint's own"
        return ""

    def full(self) -> str:
        """Why there can be no more links; "" when there can.

        What an ended link left counts as one until it is received: a peer that comes and goes again and
        again would else leave the limits of a link each time.
        """
        most, linked = self._config.max_peers, len(self._by_name)
        ended = sum(link.waiting > 0 for link in self._ended)
        if linked + ended < most:
            return ""
        left = f", and {ended} links ended with messages that wait to be received" if ended else ""
        when = "they are received" if ended else "one has left"
        return f"there are {linked} peers{left} (max_peers is {most}); try again when {when}, or raise it"

    def taken(self, holder: Link) -> str:
        """Why a second peer of one name is refused while the first lives."""
        seconds = time.monotonic() - holder.since
        by = f"pid {holder.peer.pid} over {_way(holder.peer.address)}"
        return f"the name {holder.peer.name!r} is taken by {by} since {seconds:.0f} s"

    def welcome(self, route: Route, hello: Hello) -> tuple[Link, Welcome]:
        """Make the link of a hello that was judged good. The welcome is still to be sent, the link then to be
        entered: another thread that found it before could send in it what the peer does not know yet.
        """
        address = self._wire.address(route.socket)
        peer = Peer(secrets.randbits(63), hello.name, hello.pid, address)
        link = self._link(route, peer, hello)
        return link, Welcome(hello.nonce, peer.link, self.name, os.getpid(), *self._terms())

    def welcomed(self, route: Route, welcome: Welcome) -> Link:
        """Make the link of a welcome. `ProtocolError` when a living peer has that name already."""
        if welcome.name in self._by_name:
            raise ProtocolError(f"two peers call themselves {welcome.name!r}")
        if any(link.peer.link == welcome.link for link in self.links()):
            raise ProtocolError("the number of the link is not new")
        address = self._wire.address(route.socket)
        peer = Peer(welcome.link, welcome.name, welcome.pid, address, dialled=True)
        link = self._link(route, peer, welcome)
        self.enter(link)
        return link

    def enter(self, link: Link) -> None:
        """From now on it is found, by every thread."""
        name = link.peer.name
        with self._lock:
            self._by_name[name] = self._by_route[link.route] = link
            self._left.pop(name, None)

    @staticmethod
    def refusal(greeting: Greeting, reason: str) -> Refused:
        """The answer to a greeting that was judged bad."""
        return Refused(greeting.nonce, reason)

    def _terms(self) -> tuple[int, int, list[str], int, int, bytes]:
        """Window, patience, accepted backends, bytes in the window, patience in the ring, this process.

        What waits for an acknowledgement can't be used again: of the ring a 64th for each reader at most.
        """
        config = self._config
        in_ring = config.ring_bytes // 64
        patience = min(_PATIENCE, config.detour_bytes // 64)
        window, window_bytes = config.max_queued_messages, config.max_queued_bytes
        return window, patience, self._accepts, window_bytes, in_ring, own_mark()

    def _link(self, route: Route, peer: Peer, greeting: Hello | Welcome) -> Link:
        return Link(
            self._wire,
            route,
            peer,
            address=self._wire.shown(route.socket),
            window=min(greeting.window, self._config.max_queued_messages),
            window_bytes=min(greeting.window_bytes, self._config.max_queued_bytes),
            patience=greeting.patience,
            ring_patience=greeting.ring_patience,
            accepts=greeting.accepts,
            process=recognise(greeting.pid, greeting.process) if on_this_host(peer.address) else None,
        )

    # ------------------------------------------------------------------ finding

    def named(self, name: str) -> Link | None:
        """The living link of that name."""
        return self._by_name.get(name)

    def at(self, route: Route) -> Link | None:
        """The living link on that connection."""
        return self._by_route.get(route)

    def links(self) -> list[Link]:
        """All living links."""
        return list(self._by_name.values())

    def on(self, socket: int) -> list[Link]:
        """The living links on one socket."""
        return [link for link in self.links() if link.route.socket == socket]

    def missing(self, name: str) -> str:
        """Why there is no link of that name, and which there are, for a person."""
        there = ", ".join(sorted(self._by_name)) or "nobody"
        return f"{self.departed([name]) or f'no peer named {name!r} is linked'}; linked: {there}"

    def departed(self, names: Collection[str] | None = None) -> str:
        """Who left (of these names) and is not back, why and when, the last first, for a person."""
        now = time.monotonic()
        left = [
            f"{name!r} {reason} {now - when:.1f} s ago"
            for name, (reason, when) in reversed(list(self._left.items()))
            if names is None or name in names
        ]
        more = [f"and {len(left) - _SAY} more"] if len(left) > _SAY else []
        return "; ".join([*left[:_SAY], *more])

    def left(self) -> dict[str, str]:
        """The peers that left last and are not back, and why."""
        return {name: reason for name, (reason, _) in list(self._left.items())}

    # ------------------------------------------------------------------ ending

    def remove(self, link: Link, reason: str) -> None:
        """A link that has ended."""
        with self._lock:
            self._by_route.pop(link.route, None)
            if self._by_name.get(link.peer.name) is link:
                del self._by_name[link.peer.name]
            self._ended = [ended for ended in (*self._ended, link) if ended.waiting]
            self._left[link.peer.name] = (reason, time.monotonic())
            while len(self._left) > _REMEMBER:
                self._left.popitem(last=False)


def _way(address: str) -> str:
    """An address as another host may know it: no path of this one."""
    return "a Unix socket" if address.startswith("ipc://") else address
