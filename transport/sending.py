"""The sending side of an endpoint: encode, introduce, put, deliver; in parts when need be; hand on."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Protocol

import msgspec

from transport import codec
from transport.assembly import Slice, Span, plan
from transport.backends.base import Bytes, Load, NoParcel, Outbound, Parcel, Peer
from transport.config import TransportConfig
from transport.errors import Full, PeerGone, Timeout, TooLarge, TransportError, detached
from transport.introducing import Introductions
from transport.lateness import Lateness
from transport.link import Build, Link
from transport.message import Abandon, Data, Part, Piece, Reference
from transport.roster import Roster
from transport.tensors import Source, TensorSpec
from transport.waiting import Poll, attempts, take

PARTS = "parts"  # the backend name of a tensor that came in parts
_NOTHING = NoParcel(Load([]))
_PARTS_AT_LEAST = 4  # of what may be put at once, so that parts pass beside what the peer still holds
_PING_EVERY = 1.0


class Received(Protocol):
    """What `forward` needs to know of a received message."""

    encoded: bytes
    references: list[Reference]
    arrays: list[Bytes]

    def store_of(self, reference: Reference) -> int | None:
        """The store whose other readers can open this tensor's handle themselves."""

    def source(self, index: int) -> Source:
        """A tensor as something to be sent again."""


class Sender:
    """Sends bodies over links. `pump` handles what has come while this one waits; `wait` sleeps."""

    def __init__(
        self,
        config: TransportConfig,
        roster: Roster,
        outbound: Outbound,
        pump: Callable[[], None],
        wait: Callable[[float], None],
    ) -> None:
        self._config = config
        self._roster = roster
        self.outbound = outbound
        self._pump = pump
        self._parting: dict[int, threading.Lock] = {}
        self._pinged = 0.0
        self.lateness = Lateness(config, roster, outbound)
        self.introductions = Introductions(config, roster, outbound, self.lateness, pump, wait)
        self.counts: Counter[str] = Counter()

    def send(self, body: object, names: Sequence[str], timeout: float) -> None:
        """Send to every name. `PeerGone` and `Full` tell by name who has the message and who has not."""
        deadline = time.monotonic() + timeout
        encoded = codec.encode(body)
        self._config.emit("send.encoded", tensors=len(encoded.sources))
        self._check_size(encoded)
        failed: dict[str, TransportError] = {}
        links = self._find(names, failed)
        if links:
            self._send_to(encoded, links, deadline, failed)
            self.counts["messages"] += 1
        if failed:
            _report(names, failed)

    def _send_to(
        self, encoded: codec.Encoded, links: list[Link], deadline: float, failed: dict[str, TransportError]
    ) -> None:
        sources, nbytes = encoded.sources, encoded.nbytes
        parcel: Parcel = _NOTHING
        if sources:
            self.introductions.introduce(links, _sizes(sources), deadline)
            if nbytes > self._limit(links):
                self._send_in_parts(encoded, links, deadline, failed)
                return
            parcel = self._put(sources, links, deadline, failed)
        make = partial(_data, encoded.body, [source.spec for source in sources])
        self._deliver(parcel, links, make, nbytes, deadline, failed)

    def forward(self, message: Received, names: Sequence[str], timeout: float) -> int:
        """Send a received message on: handles where the peer can open them itself, bytes elsewhere.

        How many handles were sent, one for each tensor and peer.
        """
        deadline = time.monotonic() + timeout
        failed: dict[str, TransportError] = {}
        handles = 0
        for link in self._find(names, failed):
            handles += self._forward_to(message, link, deadline, failed)
            self.counts["forwarded"] += 1
        self.counts["handed on"] += handles
        _report(names, failed)
        return handles

    # ------------------------------------------------------------------ put and deliver

    def lend(self, nbytes: int, timeout: float) -> Bytes | None:
        """Memory for a loan, as `Outbound.lend`."""
        try:
            return self.outbound.lend(nbytes, timeout, self._watch("room for a loan", [], nbytes))
        except Full as error:
            late = "".join(f"; {link.overdue()}" for link in self._roster.links() if link.unacknowledged)
            raise Full(f"{error}{late}") from error

    def _find(self, names: Sequence[str], failed: dict[str, TransportError]) -> list[Link]:
        links = []
        for name in names:
            link = self._roster.named(name)
            if link is None:
                failed[name] = PeerGone(self._roster.missing(name))
            else:
                links.append(link)
        return links

    def _check_size(self, encoded: codec.Encoded) -> None:
        config = self._config
        if encoded.nbytes > config.max_message_bytes:
            raise TooLarge(
                f"{encoded.nbytes} bytes of tensors exceed max_message_bytes ({config.max_message_bytes})"
            )
        if len(encoded.sources) > config.max_tensors:
            raise TooLarge(f"{len(encoded.sources)} tensors exceed max_tensors ({config.max_tensors})")
        if len(encoded.body) > config.max_control_bytes // 2:
            raise TooLarge(
                f"a body of {len(encoded.body)} bytes without its tensors exceeds half of"
                f" max_control_bytes ({config.max_control_bytes}); put bulk data into tensors"
            )

    def _limit(self, links: Sequence[Link]) -> int:
        return min(self.outbound.limit(link.peer) for link in links)

    def _put(
        self, sources: Sequence[Source], links: list[Link], deadline: float, failed: dict[str, TransportError]
    ) -> Parcel:
        """Put for all links; those that are too late are taken from the list and named in `failed`."""
        while links:
            timeout = max(0.0, deadline - time.monotonic())
            peers = [link.peer for link in links]
            poll = self._watch("room", links, _total(sources))
            try:
                parcel = self.outbound.put(sources, peers, timeout=timeout, poll=poll)
                self._config.emit("send.put", tensors=len(sources), peers=len(peers))
                return parcel
            except Full as error:
                for link in [link for link in links if link.peer.name in error.failed] or list(links):
                    gone = PeerGone(f"{link} {link.ended}") if link.ended else None
                    failed[link.peer.name] = gone or Full(f"{error}; {self.lateness.account(link)}")
                    links.remove(link)
            except TooLarge as error:
                failed |= dict.fromkeys([link.peer.name for link in links], detached(error))
                links.clear()
        return NoParcel(Load([]))

    def _deliver(
        self,
        parcel: Parcel,
        links: Sequence[Link],
        make: Callable[[Load], Build],
        nbytes: int,
        deadline: float,
        failed: dict[str, TransportError],
    ) -> list[Link]:
        """Send each link its load, or let go of what the parcel keeps for it; the links that were sent to."""
        sent = []
        left = list(links)  # of whom the parcel has to be told here
        try:
            while left:
                link = left[0]
                release = partial(parcel.release, link.peer)
                error = parcel.failed.get(link.peer)
                if error is None:
                    load = parcel.load(link.peer)
                    try:
                        number = self._post(link, make(load), load.frames, release, nbytes, deadline)
                    except TransportError as failure:
                        error = detached(failure)
                del left[0]  # now the link does, once
                if error is None:
                    sent.append(link)
                    self._config.emit("send.posted", peer=link.peer.name, number=number)
                else:
                    failed[link.peer.name] = error
                    release()
        except BaseException:
            for link in left:
                parcel.release(link.peer)
            parcel.abandon()
            raise
        parcel.fill()
        return sent

    def _post(
        self,
        link: Link,
        build: Build,
        frames: Sequence[Bytes],
        keeps: Callable[[], None],
        nbytes: int,
        deadline: float,
    ) -> int:
        """The number of the message."""
        post = partial(link.send, build, frames, keeps=keeps, nbytes=nbytes)
        try:
            return post()
        except Full:
            return self._post_later(post, link, nbytes, deadline)

    def _post_later(self, post: Callable[[], int], link: Link, nbytes: int, deadline: float) -> int:
        poll = self._watch("a place in the queue", [link], nbytes)
        for last in attempts(deadline - time.monotonic(), poll):
            try:
                return post()
            except Full as error:
                if last:
                    raise Full(f"{error}{self.lateness.holding(link)}") from error
        raise AssertionError("the last attempt returns or raises")

    def _while_waiting(self) -> None:
        """Handle what has come; now and then ask for an acknowledgement of everything."""
        self._pump()
        now = time.monotonic()
        if now - self._pinged > _PING_EVERY:
            self._pinged = now
            for link in self._roster.links():
                link.ping()

    def _watch(self, what: str, links: Sequence[Link], nbytes: int) -> Poll:
        """The poll of a wait for `what` to send to these links."""
        return self.lateness.watched(self._while_waiting, what, links, nbytes)

    # ------------------------------------------------------------------ messages in parts

    def _send_in_parts(
        self, encoded: codec.Encoded, links: list[Link], deadline: float, failed: dict[str, TransportError]
    ) -> None:
        """Each part takes its whole space at once or holds nothing; the body comes with the last message."""
        sources, left = encoded.sources, list(links)
        announced = [source.nbytes for source in sources]
        with self._one_at_a_time(links, deadline), self._abandoned_unless_sent(links) as complete:
            for spans in plan(announced, max(1, self._limit(links) // _PARTS_AT_LEAST)):
                slices = [Slice(sources[span.tensor], span.start, span.stop) for span in spans]
                parcel = self._put(slices, left, deadline, failed)
                make = partial(_part, announced, spans)
                left = self._deliver(parcel, left, make, _total(slices), deadline, failed)
                announced = []
                if not left:
                    return
                self.counts["parts"] += 1
            whole = NoParcel(Load([(PARTS, msgspec.msgpack.encode(index)) for index in range(len(sources))]))
            make = partial(_data, encoded.body, [source.spec for source in sources])
            complete += self._deliver(whole, left, make, 0, deadline, failed)
        self.counts["messages in parts"] += 1

    @contextmanager
    def _abandoned_unless_sent(self, links: Sequence[Link]) -> Iterator[list[Link]]:
        """Whoever is not in the list at the end, whatever happens, need not wait for the rest."""
        complete: list[Link] = []
        try:
            yield complete
        finally:
            for link in links:
                if link not in complete:
                    with suppress(Full, PeerGone):  # the next message in parts starts over as well
                        link.send(Abandon, keeps=lambda: None)

    @contextmanager
    def _one_at_a_time(self, links: Sequence[Link], deadline: float) -> Iterator[None]:
        """Parts of two messages do not mix in a link; links in one order, so that senders cannot cross."""
        locks: list[tuple[threading.Lock, list[bool]]] = []
        try:
            for link in sorted(links, key=lambda link: link.peer.link):
                lock, took = self._parting.setdefault(link.peer.link, threading.Lock()), list[bool]()
                locks.append((lock, took))
                if not take(lock, took, deadline - time.monotonic()):
                    late = self.lateness.account(link)
                    raise Timeout(f"another message in parts is still being sent to {link.peer}; {late}")
            yield
        finally:
            for lock, took in locks:
                if True in took:
                    lock.release()

    # ------------------------------------------------------------------ hand-on

    def _forward_to(
        self, message: Received, link: Link, deadline: float, failed: dict[str, TransportError]
    ) -> int:
        own = [
            index
            for index, reference in enumerate(message.references)
            if message.store_of(reference) not in link.stores
        ]
        sources = [message.source(index) for index in own]
        self.introductions.introduce([link], _sizes(sources), deadline)
        if _total(sources) > self._limit([link]):
            everything = [message.source(index) for index in range(len(message.references))]
            self._send_to(codec.Encoded(message.encoded, everything), [link], deadline, failed)
            return 0
        links = [link]
        parcel = _HandedOn(message, own, self._put(sources, links, deadline, failed))
        make = partial(_data, message.encoded, [reference.spec for reference in message.references])
        sent = self._deliver(parcel, links, make, _total(sources), deadline, failed)
        return len(sent) * (len(message.references) - len(own))

    def forget(self, link: Link) -> None:
        """The link has ended."""
        self._parting.pop(link.peer.link, None)
        self.introductions.forget(link)


class _HandedOn(Parcel):
    """Handles of another writer's records, kept open here until the next reader has them open."""

    def __init__(self, message: Received, own: Sequence[int], parcel: Parcel) -> None:
        self._references = message.references
        self._own = set(own)
        self._parcel = parcel
        self._views = [array for index, array in enumerate(message.arrays) if index not in self._own]
        self.failed = parcel.failed

    def load(self, reader: Peer) -> Load:
        load = self._parcel.load(reader)
        put = iter(load.handles)
        handles = [
            next(put) if index in self._own else (reference.backend, bytes(reference.handle))
            for index, reference in enumerate(self._references)
        ]
        return Load(handles, load.frames)

    def release(self, reader: Peer) -> None:
        self._views.clear()
        self._parcel.release(reader)

    def fill(self) -> None:
        self._parcel.fill()

    def abandon(self) -> None:
        self._parcel.abandon()


def _sizes(sources: Sequence[Source]) -> list[int]:
    return [source.nbytes for source in sources]


def _total(sources: Sequence[Source]) -> int:
    return sum(_sizes(sources))


def _data(body: bytes, specs: Sequence[TensorSpec], load: Load) -> Build:
    references = [
        Reference(spec, backend, msgspec.Raw(handle))
        for spec, (backend, handle) in zip(specs, load.handles, strict=True)
    ]
    return lambda link, number, seen: Data(link, number, seen, body, references)


def _part(sizes: list[int], spans: Sequence[Span], load: Load) -> Build:
    pieces = [
        Piece(span.tensor, span.start, span.stop - span.start, backend, msgspec.Raw(handle))
        for span, (backend, handle) in zip(spans, load.handles, strict=True)
    ]
    return lambda link, number, seen: Part(link, number, seen, sizes, pieces)


def _report(names: Sequence[str], failed: dict[str, TransportError]) -> None:
    """Raise what went wrong for whom, if anything did."""
    try:
        if failed:
            raise _summary(names, failed)
    finally:
        failed.clear()  # the traceback leads to whoever keeps it: see `detached`


def _summary(names: Sequence[str], failed: Mapping[str, TransportError]) -> TransportError:
    reasons = {name: str(error) for name, error in failed.items()}
    if len(names) == 1:
        error = failed[names[0]]
        if isinstance(error, Full | PeerGone):
            error.failed = reasons
        return error
    never = [error for error in failed.values() if isinstance(error, TooLarge)]
    if len(never) == len(names):
        return never[0]
    delivered = [name for name in names if name not in failed]
    text = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    kind = PeerGone if any(isinstance(error, PeerGone) for error in failed.values()) else Full
    return kind(
        f"{len(delivered)} of {len(names)} peers have the message; {text}",
        delivered=delivered,
        failed=reasons,
    )
