"""`listen` and `connect`: endpoints that send and receive bodies with tensors."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from math import isnan
from typing import Any, Self

import numpy as np
import torch

from transport.addresses import UnknownHost, why_nobody
from transport.backends.base import Held
from transport.config import TransportConfig
from transport.errors import PeerGone, Timeout
from transport.exchange import Exchange
from transport.message import Refused, Welcome
from transport.received import Message
from transport.staging import Stage
from transport.tensors import Tensor, spec_for, view

_DIAL_NAP = 0.05
_NAME_NAP = 0.5  # who resolves names serves others, too
_MOMENT = 2e-3
_SLICE = 5e-3  # of the wait for a message that is being written; then others have their turn


@dataclass(frozen=True)
class PeerInfo:
    """One peer of an endpoint: who, where, by which backend and why, what it has not acknowledged.

    `connected`: seconds since the handshake. `unacknowledged`: messages, `oldest` the seconds that the
    first of them has waited, `slow` whether that is above `warn_after`. `held`: what it holds of memory
    here; None where it reads none.
    """

    name: str
    pid: int
    address: str
    backend: str
    connected: float
    unacknowledged: int
    oldest: float
    slow: bool
    held: Held | None


class _Loan:
    """What `Endpoint.loan` returns: it keeps the tensor until the end of the `with`."""

    __slots__ = ("_lend", "_tensor")
    instead = "; send what `with … as tensor:` gives"  # for the error of who sends the loan itself

    def __init__(self, lend: Callable[[], Tensor]) -> None:
        self._lend = lend
        self._tensor: Tensor | None = None

    def __enter__(self) -> Tensor:
        tensor = self._tensor = self._lend()
        return tensor

    def __exit__(self, *exception: object) -> None:
        self._tensor = None


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
        self._exchange = Exchange(name, self.config)
        self._listening: list[str] = []

    # ------------------------------------------------------------------ addresses and peers

    def listen(self, address: str) -> str:
        """Let peers connect at `ipc://PATH` or `tcp://HOST:PORT`; the address as they reach it."""
        self._exchange.check()
        actual = self._exchange.wire.bind(address)
        self._listening.append(actual)
        return actual

    @property
    def addresses(self) -> list[str]:
        """Where this endpoint listens, ports filled in."""
        return list(self._listening)

    def connect(self, address: str, *, timeout: float | None = None) -> str:
        """Make a link to who listens there; the peer's name.

        Tries until `timeout` seconds (default `handshake_timeout`) are over: the other side may start
        later, and so may its name be known, which is looked up for every try; of its addresses the first of
        IPv4 is taken, else of IPv6. `Timeout` says whether the name is unknown, nobody listens, or nobody
        answers; `PeerGone` that it refuses. The system's resolver may take longer than `timeout`.
        """
        seconds = _seconds(timeout, self.config.handshake_timeout)
        deadline = time.monotonic() + seconds
        while True:
            self._exchange.poll()
            try:
                answer, nap = self._dial(address, deadline), _DIAL_NAP
            except UnknownHost as error:
                answer, nap = str(error), _NAME_NAP
            if isinstance(answer, Welcome):
                return answer.name
            left = deadline - time.monotonic()
            if left <= 0:
                raise Timeout(f"{self.name!r} could not connect to {address} in {seconds:.4g} s: {answer}")
            time.sleep(min(nap, left))

    def _dial(self, address: str, deadline: float) -> Welcome | str:
        """One try to make a link: the answer, or why there is none. `PeerGone` when it is a refusal."""
        exchange = self._exchange
        number = exchange.wire.dial(address)
        answer = exchange.shake_hands(number, deadline)
        if isinstance(answer, Welcome):
            return answer
        reached = exchange.wire.reached(number)
        exchange.wire.hang_up(number)
        if isinstance(answer, Refused):
            raise PeerGone(f"{address} refuses {self.name!r}: {answer.reason}")
        if exchange.wire.turned_away(address):
            return f"who listens there closes the connection during the handshake: {self._turned_away()}"
        return "somebody listens there, but does not answer" if reached else why_nobody(address)

    def _turned_away(self) -> str:
        """What may be the reason that a handshake is broken off; zmq does not say which."""
        if self.config.curve_key:
            return (
                "it has no keys, or another one than curve_server says, or this curve_key is not among its"
                " curve_clients"
            )
        return "it serves only who has a key that it knows (curve_key), or it is no endpoint at all"

    def wait_for_peers(self, peers: int | str | Collection[str], *, timeout: float | None = None) -> None:
        """Until that many peers, or the peers of these names, are linked. `Timeout` says who is missing."""
        seconds = _seconds(timeout, self.config.timeout)
        deadline = time.monotonic() + seconds
        peers = [peers] if isinstance(peers, str) else peers
        while True:
            self._exchange.check()
            self._exchange.pump()
            there = {link.peer.name for link in self._exchange.roster.links()}
            if (len(there) >= peers) if isinstance(peers, int) else there.issuperset(peers):
                return
            left = deadline - time.monotonic()
            if left <= 0:
                missing = None if isinstance(peers, int) else sorted(set(peers) - there)
                what = f"{peers} peers" if missing is None else ", ".join(missing)
                linked = self._exchange.sender.lateness.linked()
                raise Timeout(f"waited {seconds:g} s for {what}; linked: {linked}{self._and_left(missing)}")
            self._exchange.wait(left)

    def account(self, name: str) -> str:
        """What a time-out says of the peer of that name: pid, what it has not acknowledged and holds, since
        when; of one that is not linked, why.
        """
        self._exchange.check()
        return self._exchange.sender.lateness.named(name)

    @property
    def peers(self) -> list[PeerInfo]:
        """The living links: who, where, by which backend and why, what is not acknowledged."""
        self._exchange.check()
        self._exchange.pump()
        now = time.monotonic()
        return [
            PeerInfo(
                link.peer.name,
                link.peer.pid,
                link.address,
                self._exchange.sender.outbound.explain(link.peer),
                now - link.since,
                link.unacknowledged,
                link.oldest,
                self._exchange.sender.lateness.is_slow(link),
                self._exchange.sender.outbound.held(link.peer),
            )
            for link in self._exchange.roster.links()
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
        exchange = self._exchange
        exchange.check()
        exchange.pump()
        try:
            exchange.sender.send(body, self._names(to), _seconds(timeout, self.config.timeout))
        except Exception:
            exchange.check()  # what goes wrong since another thread closed the endpoint is `Closed`
            raise

    def try_send(self, body: object, *, to: str | Sequence[str] | None = None) -> None:
        """`send` that never waits: `Full` at once where that would."""
        self.send(body, to=to, timeout=0.0)

    async def send_async(
        self, body: object, *, to: str | Sequence[str] | None = None, timeout: float | None = None
    ) -> None:
        """`send` in a thread, so that the loop goes on during the copy; cancelling does not undo it."""
        await asyncio.to_thread(partial(self.send, body, to=to, timeout=timeout))

    def forward(self, message: Message, *, to: str | Sequence[str], timeout: float | None = None) -> int:
        """Send a received message on to peers of this endpoint. Errors as `send`.

        A peer that maps the same ring gets the handle, and the view here is kept until it has opened it;
        for others the bytes are sent anew. How many handles were sent, one for each tensor and peer.
        """
        exchange = self._exchange
        exchange.check()
        exchange.pump()
        timeout = _seconds(timeout, self.config.timeout)
        try:
            return exchange.sender.forward(message, self._names(to), timeout)
        except Exception:
            exchange.check()  # as in `send`
            raise

    def loan(
        self, shape: Sequence[int], dtype: torch.dtype | np.dtype[Any] | type, *, timeout: float | None = None
    ) -> AbstractContextManager[Any]:
        """An uninitialised tensor of that shape in the ring, to be filled and sent without a copy.

        dtype: torch's for a torch tensor, numpy's for an array. Slices of it can be sent as well, and it
        can be sent more than once, but not be written after it was sent. Its memory is free again when
        the last view of it is gone. Where there is no room in shared memory it is a plain tensor. `Full`
        for a backend that must have room.
        """
        return _Loan(partial(self._lend, shape, dtype, timeout))

    def _lend(
        self, shape: Sequence[int], dtype: torch.dtype | np.dtype[Any] | type, timeout: float | None
    ) -> Tensor:
        exchange = self._exchange
        exchange.check()
        spec = spec_for(shape, dtype)
        timeout = _seconds(timeout, self.config.timeout)
        buffer = None
        nbytes = spec.nbytes
        if nbytes:
            try:
                buffer = exchange.sender.lend(nbytes, timeout)
                exchange.sender.introductions.offer_to_all()
            except Exception:
                exchange.check()  # as in `send`
                raise
        return view(np.empty(nbytes, np.uint8) if buffer is None else buffer, spec)

    # ------------------------------------------------------------------ receiving

    def receive(
        self,
        type: Any = Any,
        *,
        timeout: float | None = None,
        copy: bool = False,
        stage: Stage | None = None,
    ) -> Message:
        """The next message; its body decoded as `type` (a Struct, dataclass, dict[str, torch.Tensor] …).

        `copy`: tensors in memory of this process's own, writable. `stage`: brings torch tensors elsewhere as
        they come (`transport.staging`), and `message.staged` is what it made. `Timeout` names who was waited
        for; `PeerGone` when nobody is left who could send; `ProtocolError` for a message that is not what it
        must be, which is gone then.
        """
        exchange = self._exchange
        left = seconds = _seconds(timeout, self.config.timeout)
        deadline = time.monotonic() + seconds
        while True:
            patience = min(max(0.0, left), _SLICE)
            try:
                message = self._try_receive(type, copy=copy, stage=stage, patience=patience)
            except Timeout:  # of a peer that stopped in mid-step: what it sent is still there
                if time.monotonic() >= deadline:
                    raise
                continue
            if message is not None:
                return message
            self._check_anybody_there()
            left = deadline - time.monotonic()
            if left <= 0:
                raise Timeout(self._nothing_came(seconds))
            if exchange.receiver.is_being_written:
                exchange.acknowledge()  # as `wait` does; what is waited for wakes nobody
            else:
                exchange.wait(left)

    def try_receive(
        self, type: Any = Any, *, copy: bool = False, stage: Stage | None = None
    ) -> Message | None:
        """`receive` that never waits: None when nothing has come.

        But for the rest of a message that its sender is just writing, 2 ms at most.
        """
        return self._look(type, copy=copy, stage=stage, patience=_MOMENT)

    def _look(self, type_: Any, *, copy: bool, stage: Stage | None, patience: float) -> Message | None:
        message = self._try_receive(type_, copy=copy, stage=stage, patience=patience)
        if message is None:
            self._exchange.acknowledge()
            self._check_anybody_there()
        return message

    async def receive_async(
        self,
        type: Any = Any,
        *,
        timeout: float | None = None,
        copy: bool = False,
        stage: Stage | None = None,
    ) -> Message:
        """`receive` for an event loop; a message is taken only when it is returned."""
        seconds = _seconds(timeout, self.config.timeout)
        deadline = time.monotonic() + seconds
        loop = asyncio.get_running_loop()
        watched = os.dup(self.fileno())  # a loop watches a descriptor for one waiter only
        came = asyncio.Event()
        loop.add_reader(watched, came.set)
        try:
            while True:
                came.clear()
                message = self._look(type, copy=copy, stage=stage, patience=0.0)
                if message is not None:
                    return message
                left = deadline - time.monotonic()
                if left <= 0:
                    raise Timeout(self._nothing_came(seconds))
                if self._exchange.receiver.is_being_written:  # which wakes nobody when it is done
                    await asyncio.sleep(_MOMENT)
                    continue
                try:
                    await asyncio.wait_for(came.wait(), min(left, self._exchange.departures.looks_every))
                except TimeoutError:
                    continue
        finally:
            loop.remove_reader(watched)
            os.close(watched)

    def fileno(self) -> int:
        """A descriptor that is readable while there may be something to receive, for event loops."""
        self._exchange.check()
        return self._exchange.wire.fileno()

    # ------------------------------------------------------------------ state

    def statistics(self) -> dict[str, Any]:
        """Counters by name: sent and received, bytes by backend, detours by reason, the ring, drops.

        `slow`: peers that have not acknowledged a message for `warn_after`, and for how many seconds.
        """
        self._exchange.check()
        self._exchange.pump()
        return {
            "sent": dict(self._exchange.sender.counts),
            "received": dict(self._exchange.receiver.counts),
            "backend": self._exchange.sender.outbound.statistics(),
            "dropped": dict(self._exchange.dropped),
            "slow": {
                link.peer.name: link.oldest
                for link in self._exchange.roster.links()
                if self._exchange.sender.lateness.is_slow(link)
            },
            "left": self._exchange.roster.left(),
        }

    def close(self) -> None:
        """Wait until what was sent can be received (`linger` at most), say goodbye, give everything back.

        Twice is fine. A warning names the peers that were too slow to receive.
        """
        self._exchange.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._exchange.closed:
            return f"<Endpoint {self.name!r} closed>"
        where = ", ".join(self._listening) or ", ".join(
            sorted(link.address for link in self._exchange.roster.links())
        )
        names = ", ".join(sorted(link.peer.name for link in self._exchange.roster.links())) or "nobody"
        return (
            f"<Endpoint {self.name!r} at {where or 'no address'}, {self.config.backend}, linked with {names}>"
        )

    # ------------------------------------------------------------------ small things

    def _try_receive(self, type_: Any, *, copy: bool, stage: Stage | None, patience: float) -> Message | None:
        exchange = self._exchange
        exchange.check()
        receiver = exchange.receiver
        try:
            if receiver.queue:
                message = receiver.take(type_, copy=copy, stage=stage, patience=patience)
                if message is not None:
                    return message
                if receiver.is_being_written:
                    patience = 0.0
            exchange.pump(taking=True)
            if receiver.queue:
                return receiver.take(type_, copy=copy, stage=stage, patience=patience)
            return None
        except Timeout:  # of what came before; what comes from others is to be seen next time
            exchange.pump(taking=True)
            raise
        finally:
            exchange.wake_if_left()

    def _check_anybody_there(self) -> None:
        if not self._listening and not self._exchange.roster.links() and not self._exchange.receiver.queue:
            self._exchange.check()  # or they were left by this end, in another thread
            left = self._exchange.roster.departed() or "it never connected"
            raise PeerGone(f"nobody is left who could send to {self.name!r}: {left}")

    def _names(self, to: str | Sequence[str] | None) -> list[str]:
        if isinstance(to, str):
            return [to]
        if to is not None:
            if not to:
                raise ValueError("`to` names nobody")
            return list(dict.fromkeys(to))
        names = [link.peer.name for link in self._exchange.roster.links()]
        if len(names) > 1:
            raise ValueError(f"say to whom: {self.name!r} is linked with {', '.join(sorted(names))}")
        if not names:
            left = self._exchange.roster.departed()
            raise PeerGone(f"nobody is linked with {self.name!r}{': ' + left if left else ''}")
        return names

    def _nothing_came(self, seconds: float) -> str:
        exchange = self._exchange
        unfinished = exchange.receiver.what_is_unfinished()
        linked = exchange.sender.lateness.linked() if exchange.roster.links() else "somebody to connect"
        what = unfinished or f"it waited for {linked}{self._and_left()}"
        return f"{self.name!r} received nothing in {seconds:g} s; {what}"

    def _and_left(self, names: Collection[str] | None = None) -> str:
        """The end of a text on who is linked: who (of these names) was."""
        left = self._exchange.roster.departed(names)
        return f"; left: {left}" if left else ""


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
    Waits `timeout` seconds at most for each of them (default `handshake_timeout`). `Timeout`, or `PeerGone`
    when refused.
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


def _seconds(timeout: float | None, default: float) -> float:
    """What was asked for, or the default. NaN, which no clock reaches, would be a wait without an end."""
    if timeout is None:
        return default
    if isnan(timeout):
        raise ValueError("timeout must be a number of seconds, not nan")
    return timeout
