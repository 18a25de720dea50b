"""`listen` and `connect`: endpoints that send and receive bodies with tensors.

No thread works in the background: every call first handles what has come (`_pump`). Nothing spins;
who waits sleeps in epoll.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import threading
import time
import weakref
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import numpy as np
import torch

from transport import message as wire_types
from transport import registry
from transport.backends.base import Outbound, Proof, Refusal
from transport.config import TransportConfig
from transport.errors import Closed, PeerGone, ProtocolError, Timeout
from transport.link import Link
from transport.message import (
    Acknowledgement,
    Answered,
    Attached,
    Goodbye,
    Hello,
    Offered,
    Refused,
    Settled,
    Welcome,
)
from transport.receiving import Message, Receiver
from transport.roster import Roster
from transport.sending import Sender
from transport.tensors import spec_for, view
from transport.wire import Arrived, Busy, Route, Unreachable, Wire

_DRAIN = 64
_READ_AT_AN_END = 64  # rounds
_LOOK_AT_LOCKS_EVERY = 0.5
_CONNECTION_OUTLIVES_LOCK = 1.0  # seconds that what a dying peer still sent may take to come
_SUSPECT_FOR, _SUSPECT_NAP = 1.0, 0.01
_DIAL_NAP = 0.05


@dataclass(frozen=True)
class PeerInfo:
    """One peer of an endpoint: who, where, by which backend and why, what it has not acknowledged."""

    name: str
    pid: int
    address: str
    backend: str
    connected: float
    unacknowledged: int


class Endpoint:
    """One party to the exchange: it listens, connects, or both. Made by `listen` and `connect`.

    Safe for several threads. After a fork the child's copy raises `Closed`. Use it in `with`, or call
    `close`. Calls from signal handlers are not supported.
    """

    def __init__(self, name: str, config: TransportConfig | None = None) -> None:
        if not 0 < len(name) <= 64:
            raise ValueError(f"a name has 1 to 64 characters, not {len(name)}")
        self.name = name
        self.config = config or TransportConfig()
        outbound = registry.load(self.config.backend).outbound(self.config)
        inbounds = registry.inbounds(self.config)
        self._pid = os.getpid()
        self._closed = False
        self._wire = Wire(self.config)
        self._roster = Roster(self._wire, self.config, name, list(inbounds))
        self._receiver = Receiver(self.config, inbounds, self._finish)
        self._sender = Sender(self.config, self._roster, outbound, self._poll, self._wait)
        self._listening: list[str] = []
        self._dialling: dict[int, tuple[int, Welcome | Refused | None]] = {}
        self._suspects: dict[int, float] = {}
        self._dead_since: dict[int, float] = {}
        self._looked = 0.0
        self._announced: set[int] = set()
        self._pumping = threading.Lock()
        self._dropped: dict[str, int] = {}
        self._abandoned = weakref.finalize(self, _abandon, self._pid, self._wire, outbound)

    # ------------------------------------------------------------------ addresses and peers

    def listen(self, address: str) -> str:
        """Let peers connect at `ipc://PATH` or `tcp://HOST:PORT`; the address as they reach it."""
        self._check()
        actual = self._wire.bind(address)
        self._listening.append(actual)
        return actual

    @property
    def addresses(self) -> list[str]:
        """Where this endpoint listens, ports filled in."""
        return list(self._listening)

    def connect(self, address: str, *, timeout: float | None = None) -> str:
        """Make a link to who listens there; the peer's name.

        Tries until `timeout` seconds (default `handshake_timeout`) are over: the other side may start
        later. `Timeout` says whether nobody listens or nobody answers; `PeerGone` that it refuses.
        """
        self._check()
        deadline = time.monotonic() + (self.config.handshake_timeout if timeout is None else timeout)
        while True:
            number = self._wire.dial(address)
            answer = self._shake_hands(number, deadline)
            if isinstance(answer, Welcome):
                return answer.name
            reached = self._wire.reached(number)
            self._wire.hang_up(number)
            if isinstance(answer, Refused):
                raise PeerGone(f"{address} refuses {self.name!r}: {answer.reason}")
            if time.monotonic() >= deadline:
                why = "somebody listens there, but does not answer" if reached else "nobody listens there"
                raise Timeout(f"{self.name!r} could not connect to {address}: {why}")
            time.sleep(_DIAL_NAP)

    def _shake_hands(self, number: int, deadline: float) -> Welcome | Refused | None:
        """Say hello on a new socket; the answer, None when there is none in time or no connection."""
        nonce = secrets.randbits(63)
        self._dialling[number] = nonce, None
        try:
            self._wire.post(Route(number), wire_types.encode(self._roster.hello(nonce)))
            while True:
                self._pump()
                answer = self._dialling[number][1]
                if answer is not None or self._suspects.pop(number, None) is not None:
                    break
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                self._wire.wait(left)
                self._check()
        finally:
            with self._pumping:  # another thread may just be handling the answer
                _, answer = self._dialling.pop(number)
        return answer

    def wait_for_peers(self, peers: int | str | Collection[str], *, timeout: float | None = None) -> None:
        """Until that many peers, or the peers of these names, are linked. `Timeout` says who is missing."""
        deadline = self._deadline(timeout)
        peers = [peers] if isinstance(peers, str) else peers
        while True:
            self._check()
            self._pump()
            there = {link.peer.name for link in self._roster.links()}
            if (len(there) >= peers) if isinstance(peers, int) else there.issuperset(peers):
                return
            left = deadline - time.monotonic()
            if left <= 0:
                missing = (
                    f"{peers} peers" if isinstance(peers, int) else ", ".join(sorted(set(peers) - there))
                )
                raise Timeout(f"waited for {missing}; linked: {', '.join(sorted(there)) or 'nobody'}")
            self._wait(left)

    @property
    def peers(self) -> list[PeerInfo]:
        """The living links: who, where, by which backend and why, what is not acknowledged."""
        self._check()
        self._pump()
        now = time.monotonic()
        return [
            PeerInfo(
                link.peer.name,
                link.peer.pid,
                link.address,
                self._sender.outbound.explain(link.peer),
                now - link.since,
                link.unacknowledged,
            )
            for link in self._roster.links()
        ]

    # ------------------------------------------------------------------ sending

    def send(
        self, body: object, *, to: str | Sequence[str] | None = None, timeout: float | None = None
    ) -> None:
        """Send a body with tensors to one peer or several (one copy in memory for all of them).

        When this returns the caller may overwrite its tensors, a loan excepted. `to` may be left out when
        there is one peer. Waits `timeout` seconds at most (default: config). `Full`: try later. `PeerGone`:
        no such peer, or it died. Both say in `.delivered` and `.failed` who has the message. `TooLarge`:
        never. `TypeError`: the path of what cannot be sent.
        """
        self._check()
        self._pump()
        with self._closed_first():
            self._sender.send(body, self._names(to), self.config.timeout if timeout is None else timeout)

    def try_send(self, body: object, *, to: str | Sequence[str] | None = None) -> None:
        """`send` that never waits: `Full` at once where that would."""
        self.send(body, to=to, timeout=0.0)

    async def send_async(
        self, body: object, *, to: str | Sequence[str] | None = None, timeout: float | None = None
    ) -> None:
        """`send` in a thread, so that the loop goes on during the copy; cancelling does not undo it."""
        await asyncio.to_thread(partial(self.send, body, to=to, timeout=timeout))

    def forward(self, message: Message, *, to: str | Sequence[str], timeout: float | None = None) -> None:
        """Send a received message on to peers of this endpoint. Errors as `send`.

        A peer that maps the same ring gets the handle, and the view here is kept until it has opened it;
        for others the bytes are sent anew.
        """
        self._check()
        self._pump()
        with self._closed_first():
            timeout = self.config.timeout if timeout is None else timeout
            self._sender.forward(message, self._names(to), timeout)

    @contextmanager
    def loan(
        self, shape: Sequence[int], dtype: torch.dtype | np.dtype[Any] | type, *, timeout: float | None = None
    ) -> Iterator[Any]:
        """An uninitialised tensor of that shape in the ring, to be filled and sent without a copy.

        dtype: torch's for a torch tensor, numpy's for an array. Slices of it can be sent as well, and it
        can be sent more than once, but not be written after it was sent. Its memory is free again when
        the last view of it is gone. Where there is no room in shared memory it is a plain tensor. `Full`
        for a backend that must have room.
        """
        self._check()
        spec = spec_for(shape, dtype)
        timeout = self.config.timeout if timeout is None else timeout
        buffer = None
        if spec.nbytes:
            with self._closed_first():
                buffer = self._sender.outbound.lend(spec.nbytes, timeout, self._poll)
                self._sender.offer_to_all()
        yield view(np.empty(spec.nbytes, np.uint8) if buffer is None else buffer, spec)

    # ------------------------------------------------------------------ receiving

    def receive(self, type: Any = Any, *, timeout: float | None = None, copy: bool = False) -> Message:
        """The next message; its body decoded as `type` (a Struct, dataclass, dict[str, torch.Tensor] …).

        `copy`: tensors in memory of this process's own, writable. `Timeout` names who was waited for;
        `PeerGone` when nobody is left who could send; `ProtocolError` for a message that is not what it
        must be, which is gone then.
        """
        deadline = self._deadline(timeout)
        while True:
            message = self._try_receive(type, copy=copy)
            if message is not None:
                return message
            self._check_anybody_there()
            left = deadline - time.monotonic()
            if left <= 0:
                raise Timeout(self._nothing_came())
            self._wait(left)

    def try_receive(self, type: Any = Any, *, copy: bool = False) -> Message | None:
        """`receive` that never waits: None when nothing has come."""
        message = self._try_receive(type, copy=copy)
        if message is None:
            self._acknowledge()
            self._check_anybody_there()
        return message

    async def receive_async(
        self, type: Any = Any, *, timeout: float | None = None, copy: bool = False
    ) -> Message:
        """`receive` for an event loop; a message is taken only when it is returned."""
        deadline = self._deadline(timeout)
        loop = asyncio.get_running_loop()
        watched = os.dup(self.fileno())  # a loop watches a descriptor for one waiter only
        came = asyncio.Event()
        loop.add_reader(watched, came.set)
        try:
            while True:
                came.clear()
                message = self.try_receive(type, copy=copy)
                if message is not None:
                    return message
                left = deadline - time.monotonic()
                if left <= 0:
                    raise Timeout(self._nothing_came())
                try:
                    await asyncio.wait_for(came.wait(), min(left, _LOOK_AT_LOCKS_EVERY))
                except TimeoutError:
                    continue
        finally:
            loop.remove_reader(watched)
            os.close(watched)

    def fileno(self) -> int:
        """A descriptor that is readable while there may be something to receive, for event loops."""
        self._check()
        return self._wire.fileno()

    # ------------------------------------------------------------------ state

    def statistics(self) -> dict[str, Any]:
        """Counters by name: sent and received, bytes by backend, detours by reason, the ring, drops."""
        self._check()
        self._pump()
        return {
            "sent": dict(self._sender.counts),
            "received": dict(self._receiver.counts),
            "backend": self._sender.outbound.statistics(),
            "dropped": dict(self._dropped),
            "left": self._roster.left(),
        }

    def close(self) -> None:
        """Say goodbye, wait for what is still to be sent (`linger`), give everything back. Twice is fine."""
        if self._closed or os.getpid() != self._pid:
            return
        self._closed = True
        self._abandoned.detach()
        self._wire.wake()
        with self._pumping:
            for link in self._roster.links():
                link.acknowledge()
                link.tell(Goodbye(link.peer.link))
                self._finish(link, "was left: this endpoint closed")
            self._sender.outbound.close()
            self._receiver.close()
            self._wire.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._closed:
            return f"<Endpoint {self.name!r} closed>"
        where = ", ".join(self._listening) or ", ".join(sorted(link.address for link in self._roster.links()))
        names = ", ".join(sorted(link.peer.name for link in self._roster.links())) or "nobody"
        return (
            f"<Endpoint {self.name!r} at {where or 'no address'}, {self.config.backend}, linked with {names}>"
        )

    # ------------------------------------------------------------------ what came

    def _pump(self) -> None:
        """Handle what has come, unless another thread is at it."""
        if not self._pumping.acquire(blocking=False):
            return
        try:
            if self._closed or not (self._wire.ready() or self._suspects or self._is_time_to_look()):
                return
            self._wire.rest()
            for arrived in self._wire.drain(_DRAIN):
                self._handle(arrived)
            for socket in self._wire.lost():
                self._suspects[socket] = time.monotonic() + _SUSPECT_FOR
            if self._suspects:
                self._examine()
            self._look_at_locks()
            self._announce_changes()
        finally:
            self._pumping.release()
        if len(self._receiver):
            self._wire.wake()

    def _poll(self) -> None:
        """For who waits inside of a backend: not beyond the end of this endpoint."""
        self._check()
        self._pump()

    def _handle(self, arrived: Arrived) -> None:
        if len(arrived.control) > self.config.max_control_bytes:
            self._drop("too large")  # decoded it would be many times as large
            return
        try:
            message = wire_types.decode(arrived.control)
        except ProtocolError:
            self._drop("not a message")
            return
        if isinstance(message, Hello):
            self._greet(arrived.route, message)
        elif isinstance(message, Welcome | Refused):
            self._answered(arrived.route, message)
        else:
            link = self._roster.at(arrived.route)
            if link is None or link.peer.link != message.link:
                self._drop("of another link")
                return
            try:
                self._handle_in_link(link, message, arrived)
            except ProtocolError as error:
                link.tell(Goodbye(link.peer.link, str(error)[:500]))
                self._drop("against the protocol")
                self._finish(link, f"broke the protocol: {error}")

    def _handle_in_link(self, link: Link, message: wire_types.Control, arrived: Arrived) -> None:
        if isinstance(message, wire_types.Numbered):
            link.settle(message.seen)
            self.config.emit("receive.arrived", peer=link.peer.name, number=message.number)
            self._receiver.arrive(link, message, arrived.frames)
        elif isinstance(message, Acknowledgement):
            link.settle(message.seen)
        elif isinstance(message, Offered):
            self._accept(link, message)
        elif isinstance(message, Answered):
            answer = Refusal(message.reason) if message.proof is None else Proof(message.proof)
            reason = self._sender.outbound.admit(link.peer, answer)
            self.config.emit("admission.judged", peer=link.peer.name, reason=reason)
            link.tell(Settled(link.peer.link, message.backend, reason[:500]))
        elif isinstance(message, Settled):
            self._inbound_settled(link, message)
        elif isinstance(message, Attached):
            link.stores = frozenset(message.stores)
        elif isinstance(message, Goodbye):
            self._finish(link, f"said goodbye{': ' + message.reason if message.reason else ''}")

    def _greet(self, route: Route, hello: Hello) -> None:
        if not route.identity or self._roster.at(route) is not None:
            self._drop("a second greeting")
            return
        reason = self._roster.judge(hello)
        holder = self._roster.named(hello.name)
        if not reason and holder is not None:
            if self._lives(holder):
                reason = self._roster.taken(holder)
            else:
                self._finish(holder, "was replaced by a new peer of its name")
        if reason:
            self._drop("refused")
            self._post(route, self._roster.refusal(hello, reason))
            return
        link, welcome = self._roster.welcome(route, hello)
        self._post(route, welcome)
        self._begin(link)

    def _answered(self, route: Route, answer: Welcome | Refused) -> None:
        nonce, answered = self._dialling.get(route.socket, (None, None))
        if answer.nonce != nonce or answered is not None:
            self._drop("of another link")
            return
        if isinstance(answer, Welcome):
            try:
                self._begin(self._roster.welcomed(route, answer))
            except ProtocolError as error:
                answer = Refused(answer.nonce, str(error))
        self._dialling[route.socket] = answer.nonce, answer

    def _begin(self, link: Link) -> None:
        self.config.emit("link.begun", peer=link.peer.name)
        if self._announced:
            link.tell(Attached(link.peer.link, list(self._announced)))
        self._sender.greet(link)

    def _accept(self, link: Link, offered: Offered) -> None:
        inbound = self._receiver.inbounds.get(offered.backend)
        answer: Proof | Refusal = Refusal(f"this endpoint does not read {offered.backend}")
        if inbound is not None:
            answer = inbound.accept(link.peer, offered.offer, self.name)
        proof, reason = (answer.data, "") if isinstance(answer, Proof) else (None, answer.reason[:500])
        self.config.emit("admission.proved", peer=link.peer.name, reason=reason)
        link.tell(Answered(link.peer.link, offered.backend, proof, reason))

    def _inbound_settled(self, link: Link, settled: Settled) -> None:
        inbound = self._receiver.inbounds.get(settled.backend)
        if inbound is not None:
            inbound.settle(link.peer, settled.reason)

    def _announce_changes(self) -> None:
        """Tell peers which stores this endpoint reads now, so that they hand on handles of no others."""
        stores = {store for inbound in self._receiver.inbounds.values() for store in inbound.stores()}
        if stores != self._announced:
            self._announced = stores
            for link in self._roster.links():
                link.tell(Attached(link.peer.link, list(stores)))

    def _post(self, route: Route, message: wire_types.Control) -> None:
        with suppress(Unreachable, Busy):  # who asked is gone already
            self._wire.post(route, wire_types.encode(message))

    # ------------------------------------------------------------------ who left

    def _examine(self) -> None:
        """A connection ended on some sockets: find out whose, after reading what it still sent."""
        now = time.monotonic()
        for socket, until in list(self._suspects.items()):
            if socket in self._dialling:
                continue
            links = self._roster.on(socket)
            gone = [link for link in links if socket_is_one_peer(link) or not link.reachable()]
            if gone:
                self._read_all()
            for link in gone:
                self._finish(link, "is gone: the connection ended")
            if now > until or not links:
                self._suspects.pop(socket, None)

    def _read_all(self) -> None:
        # Not for ever: on a socket that serves several, somebody else may go on sending.
        for _ in range(_READ_AT_AN_END):
            came = self._wire.drain(_DRAIN)
            for arrived in came:
                self._handle(arrived)
            if not came:
                return

    def _look_at_locks(self) -> None:
        """Peers whose kernel lock is free are dead, though a child of theirs may keep the connection."""
        if not self._is_time_to_look():
            return
        self._looked = now = time.monotonic()
        for link in self._roster.links():
            if self._lock_held(link) is not False:
                self._dead_since.pop(link.peer.link, None)
            elif now - self._dead_since.setdefault(link.peer.link, now) > _CONNECTION_OUTLIVES_LOCK:
                self._finish(link, "died: its lock is free")

    def _is_time_to_look(self) -> bool:
        return time.monotonic() - self._looked >= _LOOK_AT_LOCKS_EVERY

    def _lock_held(self, link: Link) -> bool | None:
        answers = [self._sender.outbound.alive(link.peer)]
        answers += [inbound.alive(link.peer) for inbound in self._receiver.inbounds.values()]
        known = [answer for answer in answers if answer is not None]
        return all(known) if known else None

    def _lives(self, link: Link) -> bool:
        return self._lock_held(link) is not False and link.reachable()

    def _finish(self, link: Link, reason: str) -> None:
        """The link has ended: let go of everything that it kept."""
        if not link.end(reason):
            return
        self.config.emit("link.ended", peer=link.peer.name, reason=reason)
        self._roster.remove(link, reason)
        self._dead_since.pop(link.peer.link, None)
        self._sender.forget(link)
        if not link.waiting:
            self._receiver.forget(link)
        if socket_is_one_peer(link):
            self._wire.hang_up(link.route.socket)
        self._wire.wake()

    # ------------------------------------------------------------------ small things

    def _try_receive(self, type_: Any, *, copy: bool) -> Message | None:
        self._check()
        message = self._receiver.take(type_, copy=copy)
        if message is None:
            self._pump()
            message = self._receiver.take(type_, copy=copy)
        return message

    def _check(self) -> None:
        if os.getpid() != self._pid:
            raise Closed(f"this endpoint was made in process {self._pid}; make one in this process")
        if self._closed:
            raise Closed(f"endpoint {self.name!r} is closed")

    @contextmanager
    def _closed_first(self) -> Iterator[None]:
        """Whatever else goes wrong when another thread closes the endpoint, it is `Closed`."""
        try:
            yield
        except Exception:
            self._check()
            raise

    def _check_anybody_there(self) -> None:
        if not self._listening and not self._roster.links() and not len(self._receiver):
            left = "; ".join(f"{name!r} {reason}" for name, reason in self._roster.left().items())
            raise PeerGone(f"nobody is left who could send to {self.name!r}: {left or 'it never connected'}")

    def _wait(self, left: float) -> None:
        self._acknowledge()
        self._wire.wait(min(left, _SUSPECT_NAP if self._suspects else _LOOK_AT_LOCKS_EVERY))

    def _acknowledge(self) -> None:
        """Tell every peer what was taken; before sleeping, since nothing else may go there soon."""
        for link in self._roster.links():
            link.acknowledge()

    def _deadline(self, timeout: float | None) -> float:
        return time.monotonic() + (self.config.timeout if timeout is None else timeout)

    def _names(self, to: str | Sequence[str] | None) -> list[str]:
        if isinstance(to, str):
            return [to]
        if to is not None:
            if not to:
                raise ValueError("`to` names nobody")
            return list(dict.fromkeys(to))
        names = [link.peer.name for link in self._roster.links()]
        if len(names) > 1:
            raise ValueError(f"say to whom: {self.name!r} is linked with {', '.join(sorted(names))}")
        if not names:
            left = "; ".join(f"{name!r} {reason}" for name, reason in self._roster.left().items())
            raise PeerGone(f"nobody is linked with {self.name!r}{': ' + left if left else ''}")
        return names

    def _nothing_came(self) -> str:
        now = time.monotonic()
        peers = ", ".join(f"{link} linked for {now - link.since:.1f} s" for link in self._roster.links())
        return f"{self.name!r} received nothing in time; it waited for {peers or 'somebody to connect'}"

    def _drop(self, reason: str) -> None:
        self._dropped[reason] = self._dropped.get(reason, 0) + 1


def _abandon(pid: int, wire: Wire, outbound: Outbound) -> None:
    """An endpoint was dropped, or the interpreter exits, without `close`: leave no name and no socket."""
    if os.getpid() == pid:
        outbound.close()
        wire.close()


def socket_is_one_peer(link: Link) -> bool:
    """Whether this endpoint dialled the link, so that its socket serves nobody else."""
    return not link.route.identity


def listen(
    addresses: str | Sequence[str], *, name: str = "front", config: TransportConfig | None = None
) -> Endpoint:
    """An endpoint that listens at these addresses (`ipc://PATH`, `tcp://HOST:PORT`, any mix)."""
    return _make(name, config, [addresses] if isinstance(addresses, str) else addresses, (), None)


def connect(
    addresses: str | Sequence[str],
    *,
    name: str,
    config: TransportConfig | None = None,
    listen: str | Sequence[str] = (),
    timeout: float | None = None,
) -> Endpoint:
    """An endpoint called `name`, linked with who listens at these addresses.

    listen: addresses at which other peers may connect to this one, for instance to be forwarded to.
    Waits `timeout` seconds at most (default `handshake_timeout`). `Timeout`, or `PeerGone` when refused.
    """
    own = [listen] if isinstance(listen, str) else listen
    return _make(name, config, own, [addresses] if isinstance(addresses, str) else addresses, timeout)


def _make(
    name: str,
    config: TransportConfig | None,
    own: Sequence[str],
    others: Sequence[str],
    timeout: float | None,
) -> Endpoint:
    endpoint = Endpoint(name, config)
    try:
        for address in own:
            endpoint.listen(address)
        for address in others:
            endpoint.connect(address, timeout=timeout)
    except BaseException:
        endpoint.close()
        raise
    return endpoint
