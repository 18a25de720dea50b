"""What comes in on the sockets of one endpoint, and what follows from it: greetings, proofs, ends of links.

No thread works in the background: every call of an endpoint first handles what has come (`pump`).
Nothing spins; who waits sleeps in epoll.
"""

from __future__ import annotations

import _thread
import logging
import os
import secrets
import threading
import time
import weakref
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack, suppress

from transport import message as wire_types
from transport import registry
from transport.backends.base import Inbound, Outbound, Proof, Refusal
from transport.config import TransportConfig
from transport.departures import Departures
from transport.errors import Closed, ProtocolError
from transport.link import Link
from transport.message import (
    Acknowledgement,
    Answered,
    Attached,
    Goodbye,
    Greeting,
    Hello,
    Offered,
    Refused,
    Settled,
    Welcome,
)
from transport.receiving import Receiver
from transport.roster import Roster
from transport.sending import Sender
from transport.waiting import take
from transport.wire import READ_AHEAD, Arrived, Busy, Route, Unreachable, Wire

_log = logging.getLogger("tensorferry.transport")

_DRAIN = 64
_READ_AT_AN_END = 64  # rounds
_PUMP_MAY_TAKE = 10.0
_CLOSE_MAY_TAKE = 1.0  # seconds beside `linger`
_LAST_WORDS = 2  # messages: an acknowledgement and the goodbye


class Exchange:
    """The working parts of an endpoint: wire, roster, sender, receiver, and what connects them.

    Safe for several threads; one at a time handles what has come.
    """

    def __init__(self, name: str, config: TransportConfig) -> None:
        outbound = registry.load(config.backend).outbound(config)
        inbounds = registry.inbounds(config)
        self.name = name
        self.config = config
        self.wire = Wire(config)
        for inbound in inbounds.values():
            inbound.begin(outbound, self.wire.wake)
        self.roster = Roster(self.wire, config, name, list(inbounds))
        self.receiver = Receiver(config, inbounds)
        self.sender = Sender(config, self.roster, outbound, self.poll, self.wait)
        self.dropped: Counter[str] = Counter()
        self.closed = False
        self._pid = os.getpid()
        self._dialling: dict[int, tuple[int, Welcome | Refused | None]] = {}
        self.departures = Departures(
            self.wire,
            self.roster,
            outbound,
            inbounds,
            dialling=self._dialling,
            read_all=self._read_all,
            finish=self._finish,
            fail=self._fail,
        )
        self._successors: list[tuple[Route, Hello]] = []  # of the dead, by name, who greeted
        self._announced: set[int] = set()
        self._pumping = threading.Lock()
        self._closing = threading.Lock()
        self._closer = 0  # the thread that is at it
        self._abandoned = weakref.finalize(
            self, _abandon, self._pid, config.linger, self.wire, outbound, inbounds
        )

    def check(self) -> None:
        """`Closed` unless this endpoint is open and this process made it."""
        if os.getpid() != self._pid:
            raise Closed(f"this endpoint was made in process {self._pid}; make one in this process")
        if self.closed:
            raise Closed(f"endpoint {self.name!r} is closed")

    def close(self) -> None:
        """Wait until what was sent can be received, say goodbye, give everything back. Twice is fine.

        Who comes while another thread is at it comes back when everything is given back, too.
        """
        thread = threading.get_ident()
        if os.getpid() != self._pid or self._closer == thread:  # a finalizer in the middle of this very call
            return
        self.closed = True
        self.wire.wake()
        took: list[bool] = []
        try:
            most = 2 * (self.config.linger + _PUMP_MAY_TAKE)  # what it takes who is at it
            if take(self._closing, took, most) and self._abandoned.alive:
                self._closer = thread
                self._close_all()
        finally:
            if True in took:
                self._closer = 0
                self._closing.release()

    def _close_all(self) -> None:
        deadline = time.monotonic() + self.config.linger
        with ExitStack() as parts:  # each of them, the last one first, whatever another raises
            # At the very last: a thread that closes may be a daemon, and its process end meanwhile.
            parts.push(self._is_over)
            parts.callback(self._close_wire, deadline)
            parts.callback(self.receiver.close)
            parts.callback(self.sender.outbound.close)
            parts.callback(self._say_goodbye)
            took: list[bool] = []
            try:
                take(self._pumping, took, _PUMP_MAY_TAKE)
                self.sender.outbound.flush(self.config.linger)
                self._await_readers(deadline)
            finally:
                if True in took:
                    self._pumping.release()

    def _is_over(self, kind: type[BaseException] | None, *_: object) -> None:
        """Unless it was interrupted: then another call, or the end of the process, does the rest."""
        if kind is None or issubclass(kind, Exception):
            self._abandoned.detach()

    def _say_goodbye(self) -> None:
        for link in self.roster.links():
            link.acknowledge()
            link.tell(Goodbye(link.peer.link))
            self._finish(link, "was left: this endpoint closed")

    def _close_wire(self, deadline: float) -> None:
        self.wire.close(deadline - time.monotonic())

    def _await_readers(self, deadline: float) -> None:
        """Until what no peer has taken yet can all lie at its side.

        zmq over there reads no more than that ahead, and of a connection that ends it reads no more at all.
        """
        while behind := [link for link in self.roster.links() if link.unread > READ_AHEAD - _LAST_WORDS]:
            left = deadline - time.monotonic()
            if left <= 0:
                for link in behind:
                    _log.warning(
                        "closed before it was read (raise linger to wait longer): %s", link.overdue()
                    )
                return
            self.wire.wait(min(left, self.departures.nap))
            self._read_all()
            self.departures.look()

    # ------------------------------------------------------------------ waiting

    def poll(self) -> None:
        """For who waits inside of a backend: not beyond the end of this endpoint."""
        self.check()
        self.pump()

    def wait(self, left: float) -> None:
        """Sleep until something may have come, `left` seconds at most, or until it is time to look."""
        self.acknowledge()
        self.wire.wait(min(left, self.departures.nap))

    def acknowledge(self) -> None:
        """Tell every peer what was taken; before sleeping, since nothing else may go there soon."""
        for link in self.roster.links():
            link.acknowledge()

    def shake_hands(self, number: int, deadline: float) -> Welcome | Refused | None:
        """Say hello on a new socket; the answer, None when there is none in time or no connection."""
        nonce = secrets.randbits(63)
        self._dialling[number] = nonce, None
        try:
            with suppress(Unreachable, Busy):  # the connection has ended already, which `pump` will find
                self.wire.post(Route(number), wire_types.encode(self.roster.hello(nonce)))
            while True:
                self.pump()
                answer = self._dialling[number][1]
                if answer is not None or self.departures.has_failed(number):
                    break
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                # As often as others look: another thread may have handled what this one goes to sleep for.
                self.wire.wait(min(left, self.departures.nap))
                self.check()
        finally:
            with self._pumping:  # another thread may just be handling the answer
                _, answer = self._dialling.pop(number)
        return answer

    # ------------------------------------------------------------------ what came

    def pump(self, *, taking: bool = False) -> None:
        """Handle what has come, unless another thread is at it.

        Who is `taking` messages afterwards calls `wake_if_left` when done.
        """
        took: list[bool] = []
        try:
            if not take(self._pumping, took) or self.closed:
                return
            for arrived in self.wire.drain(_DRAIN):
                self._handle(arrived)
            if self.departures.look():
                self._announce_changes()
            if self._successors:
                self._greet_successors()
        finally:
            if True in took:
                self._pumping.release()
        if not taking:
            self.wake_if_left()

    def wake_if_left(self) -> None:
        """Let others know that there are messages to take."""
        if self.receiver.has_next():
            self.wire.wake()

    def _handle(self, arrived: Arrived) -> None:
        if arrived.excess:
            self._drop("too many frames")
            link = self.roster.at(arrived.route)
            if link is not None:
                self._break_off(link, f"{arrived.excess} frames more than max_tensors in one message")
            return
        if len(arrived.control) > self.config.max_control_bytes:
            self._drop("too large")  # decoded it would be many times as large
            return
        try:
            message = wire_types.decode(arrived.control)
        except ProtocolError:
            greeting = wire_types.decode_greeting(arrived.control)
            if greeting is None:
                self._drop("not a message")
            else:
                self._greet(arrived.route, greeting)
            return
        if isinstance(message, Hello):
            self._greet(arrived.route, message)
        elif isinstance(message, Welcome | Refused):
            self._answered(arrived.route, message)
        else:
            link = self.roster.at(arrived.route)
            if link is None or link.peer.link != message.link:
                self._drop("of another link")
                return
            try:
                self._handle_in_link(link, message, arrived)
            except ProtocolError as error:
                self._drop("against the protocol")
                self._break_off(link, str(error))

    def _break_off(self, link: Link, reason: str) -> None:
        link.tell(Goodbye(link.peer.link, reason[:500]))
        self._finish(link, f"broke the protocol: {reason}")

    def _handle_in_link(self, link: Link, message: wire_types.Control, arrived: Arrived) -> None:
        if isinstance(message, wire_types.Numbered):
            link.settle(message.seen)
            self.config.emit("receive.arrived", peer=link.peer.name, number=message.number)
            self.receiver.arrive(link, message, arrived.frames, arrived.nbytes)
        elif isinstance(message, Acknowledgement):
            link.settle(message.seen)
        elif isinstance(message, Offered):
            self._accept(link, message)
        elif isinstance(message, Answered):
            answer = Refusal(message.reason) if message.proof is None else Proof(message.proof)
            reason = self.sender.outbound.admit(link.peer, answer)
            self.config.emit("admission.judged", peer=link.peer.name, reason=reason)
            link.tell(Settled(link.peer.link, message.backend, reason[:500]))
        elif isinstance(message, Settled):
            self._inbound_settled(link, message)
        elif isinstance(message, Attached):
            link.stores = frozenset(message.stores)
        elif isinstance(message, Goodbye):
            self._finish(link, f"said goodbye{': ' + message.reason if message.reason else ''}")

    def _greet(self, route: Route, greeting: Greeting, *, replacing: bool = False) -> None:
        if not route.identity or self.roster.at(route) is not None:
            self._drop("a second greeting")
            return
        reason = self.roster.judge(greeting)
        if isinstance(greeting, Hello) and not reason:
            holder = self.roster.named(greeting.name)
            if holder is not None and self.departures.is_alive(holder):
                reason = self.roster.taken(holder)
            elif holder is not None and not replacing:  # what the dead one sent may lie behind this greeting
                self._successors.append((route, greeting))
                self.wire.wake()
                return
            else:
                if holder is not None:
                    self._finish(holder, "was replaced by a new peer of its name")
                reason = self.roster.full()
        if reason or not isinstance(greeting, Hello):
            self._drop("refused")
            self._post(route, self.roster.refusal(greeting, reason))
            return
        link, welcome = self.roster.welcome(route, greeting)
        self._post(route, welcome)
        self.roster.enter(link)
        self._begin(link)

    def _greet_successors(self) -> None:
        """Those whose names the dead have, once nothing more comes of these."""
        self._read_all()
        waiting, self._successors = self._successors, []
        for route, hello in waiting:
            holder = self.roster.named(hello.name)
            if holder is None or not holder.reachable() or self.departures.is_silent(holder):
                self._greet(route, hello, replacing=True)
            else:
                self._successors.append((route, hello))

    def _answered(self, route: Route, answer: Welcome | Refused) -> None:
        nonce, answered = self._dialling.get(route.socket, (None, None))
        if answer.nonce != nonce or answered is not None:
            self._drop("of another link")
            return
        if isinstance(answer, Welcome):
            try:
                self._begin(self.roster.welcomed(route, answer))
            except ProtocolError as error:
                answer = Refused(answer.nonce, str(error))
        self._dialling[route.socket] = answer.nonce, answer
        self.wire.wake()  # another thread may be the one that dialled

    def _begin(self, link: Link) -> None:
        self.config.emit("link.begun", peer=link.peer.name)
        if self._announced:
            link.tell(Attached(link.peer.link, list(self._announced)))
        self.sender.introductions.greet(link)

    def _accept(self, link: Link, offered: Offered) -> None:
        inbound = self.receiver.inbounds.get(offered.backend)
        answer: Proof | Refusal = Refusal(f"this endpoint does not read {offered.backend}")
        if inbound is not None:
            answer = inbound.accept(link.peer, offered.offer, self.name)
        proof, reason = (answer.data, "") if isinstance(answer, Proof) else (None, answer.reason[:500])
        if reason:
            self._drop("offer refused")
        self.config.emit("admission.proved", peer=link.peer.name, reason=reason)
        link.tell(Answered(link.peer.link, offered.backend, proof, reason))

    def _inbound_settled(self, link: Link, settled: Settled) -> None:
        inbound = self.receiver.inbounds.get(settled.backend)
        if inbound is not None:
            inbound.settle(link.peer, settled.reason)
            self._announce_changes()

    def _announce_changes(self) -> None:
        """Tell peers which stores this endpoint reads now, so that they hand on handles of no others."""
        stores = {store for inbound in self.receiver.inbounds.values() for store in inbound.stores()}
        if stores != self._announced:
            self._announced = stores
            for link in self.roster.links():
                link.tell(Attached(link.peer.link, list(stores)))

    def _post(self, route: Route, message: wire_types.Control) -> None:
        with suppress(Unreachable, Busy):  # who asked is gone already
            self.wire.post(route, wire_types.encode(message))

    def _read_all(self) -> None:
        # Not for ever: on a socket that serves several, somebody else may go on sending.
        for _ in range(_READ_AT_AN_END):
            came = self.wire.drain(_DRAIN)
            for arrived in came:
                self._handle(arrived)
            if not came:
                return

    # ------------------------------------------------------------------ the ends of links

    def _fail(self, link: Link, fault: str) -> None:
        """A backend's tensors do not get there, or were lost."""
        self._drop("bulk connection failed")
        link.tell(Goodbye(link.peer.link, fault[:500]))
        self._finish(link, f"is not reached: {fault}")

    def _finish(self, link: Link, reason: str) -> None:
        """The link has ended: let go of everything that it kept."""
        if not link.end(reason):
            return
        self.config.emit("link.ended", peer=link.peer.name, reason=reason)
        self.roster.remove(link, reason)
        self.departures.forget(link)
        self.sender.forget(link)
        if not link.waiting:
            self.receiver.forget(link)
        if link.peer.dialled:
            self.wire.hang_up(link.route.socket)
        self.wire.wake()

    def _drop(self, reason: str) -> None:
        self.dropped[reason] += 1


def _abandon(
    pid: int, linger: float, wire: Wire, outbound: Outbound, inbounds: Mapping[str, Inbound]
) -> None:
    """An endpoint was dropped, or the interpreter exits, without `close`: leave no name and no socket.

    A collection may run in any thread, in the middle of anything and under any lock, also in a thread of
    these very parts. So another thread closes them, and is waited for as long as that takes by itself.
    """
    if os.getpid() != pid:
        return
    closed = threading.Lock()
    closed.acquire()

    def close() -> None:
        with ExitStack() as parts:  # each of them, the last one first, whatever another raises
            parts.callback(closed.release)
            parts.callback(wire.close)
            for inbound in inbounds.values():
                parts.callback(inbound.close)
            parts.callback(outbound.close)

    try:
        # Not `threading.Thread`, which takes locks that who was interrupted may hold.
        _thread.start_new_thread(close, ())
    except RuntimeError:  # there can be no more threads
        close()
    closed.acquire(timeout=linger + _CLOSE_MAY_TAKE)
