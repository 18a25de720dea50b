"""The payload in this process's shared-memory ring, read in place by the processes that proved to map it."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple, TypeVar

import msgspec

import shm
from transport import registration
from transport.backends.base import (
    Bytes,
    Held,
    Load,
    NoParcel,
    Outbound,
    Parcel,
    Peer,
    Poll,
    Proof,
    Refusal,
)
from transport.backends.records import Parcels, ShmParcel, Unfilled
from transport.backends.ring_messages import RingHandle, RingOffer, RingProof, encode, proofs, ring_trace
from transport.backends.shm_inbound import ShmInbound, sweep
from transport.config import TransportConfig
from transport.errors import Full, PeerGone, TooLarge
from transport.sharing import Exporter
from transport.sources import PROGRESS_NEVER
from transport.tensors import Source
from transport.waiting import attempts

_log = logging.getLogger("tensorferry.transport")

__all__ = ["ShmInbound", "ShmOutbound"]

_WORTH_FOLLOWING = 4 << 20  # bytes; of less there is little left when the peer has woken up
_NO_BYTES = ("inline", encode(b""))  # a record needs at least one byte


class _Place(NamedTuple):
    """Where a peer proved that it can read."""

    ring: shm.RingWriter
    column: int


class ShmOutbound(Outbound):
    """Owns the ring, made at the first tensor that needs it, and knows which peers map it.

    When somebody takes the ring's name away, who comes from then on gets another ring, while those who map
    the old one stay with it; it is closed when the last of them is gone.
    """

    name = "shm"

    def __init__(self, config: TransportConfig) -> None:
        super().__init__(config)
        self._writer: shm.RingWriter | None = None
        self._older: list[shm.RingWriter] = []  # whose names were taken away
        self._making = threading.Lock()
        self._admitting = threading.Lock()  # of a peer's column there is one offer, whoever makes it
        self._offered: dict[Peer, tuple[shm.RingWriter, shm.Offer]] = {}
        self._places: dict[Peer, _Place] = {}  # of those who proved that they map a ring
        self._refused: dict[Peer, str] = {}
        self._followers: set[Peer] = set()  # who reads records while they are being filled
        self._same_device: dict[Peer, int] = {}  # who sees the same GPU
        self.exporter = Exporter(config.device_pool_bytes)
        self._tensors = self._nbytes = 0
        self._threads = config.threads
        self._closed = False

    # -------------------------------------------------------------- who may read

    def wants_offer(self, peer: Peer, sizes: Sequence[int]) -> bool:
        return any(sizes) and peer not in self._places and peer not in self._refused

    def offer(self, peer: Peer) -> bytes:
        try:
            with self._admitting:
                if peer not in self._offered:
                    ring = self._named_ring()
                    self._offered[peer] = ring, ring.offer()
                challenge = self.exporter.challenge()
                device = challenge.offer if challenge else b""
                return encode(RingOffer(*self._offered[peer][1], device))
        except (shm.RingFull, shm.NoSpace) as error:
            self._refused[peer] = str(error)
            raise Full(str(error), failed={peer.name: str(error)}) from error

    def admit(self, peer: Peer, answer: Proof | Refusal) -> str:
        offered = self._offered.get(peer)
        if offered is None:
            return "nothing was offered"
        try:
            return self._judge(peer, *offered, answer)
        finally:  # not before it has its place: another thread closes a ring that nobody maps or was offered
            self._offered.pop(peer, None)

    def _judge(self, peer: Peer, writer: shm.RingWriter, offer: shm.Offer, answer: Proof | Refusal) -> str:
        if isinstance(answer, Refusal):
            writer.withdraw(offer)
            self._refused[peer] = answer.reason
            return answer.reason
        try:
            proof = proofs.decode(answer.data) if answer.data else RingProof()
            writer.admit(offer, peer.name, peer.pid)
        except (msgspec.DecodeError, shm.AdmissionFailed) as error:
            writer.withdraw(offer)
            self._refused[peer] = str(error)
            return str(error)
        self._places[peer] = _Place(writer, offer.column)
        if proof.follows:
            self._followers.add(peer)
        challenge = self.exporter.challenge() if proof.device else None
        if challenge is not None and secrets.compare_digest(proof.device, challenge.answer):
            self._same_device[peer] = challenge.device
        return ""

    def device_of(self, peer: Peer) -> int | None:
        """The GPU of this process on which the peer can read what is shared with it."""
        return self._same_device.get(peer)

    def serves(self, peer: Peer) -> bool:
        return peer in self._places

    def map_one_ring(self, readers: Sequence[Peer]) -> bool:
        """Whether all of these proved to map a ring, and the same."""
        places = [self._places.get(reader) for reader in readers]
        rings = {None if place is None else place.ring.identity for place in places}
        return len(rings) == 1 and None not in rings

    def alive(self, peer: Peer) -> bool | None:
        """Whether the peer's lock on its column is held; None when it has no column."""
        place = self._places.get(peer)
        return None if place is None else place.ring.reader_alive(place.column)

    def held(self, peer: Peer) -> Held | None:
        place = self._places.get(peer)
        return None if place is None else Held(*place.ring.held(place.column))

    def explain(self, peer: Peer) -> str:
        if peer in self._places:
            return "shm: the peer proved that it maps the ring"
        if peer in self._refused:
            return f"not shm: {self._refused[peer]}"
        return "not shm yet: " + (
            "the peer has not answered the offer" if peer in self._offered else "no need"
        )

    def drop(self, peer: Peer) -> None:
        offered, place = self._offered.pop(peer, None), self._places.pop(peer, None)
        self._refused.pop(peer, None)
        self._followers.discard(peer)
        self._same_device.pop(peer, None)
        if offered is not None:
            offered[0].withdraw(offered[1])
        if place is not None:
            place.ring.reap()
        self._close_unused()

    # -------------------------------------------------------------- tensors

    def ring(self) -> shm.RingWriter:
        """The ring, made now if need be. `shm.NoSpace` when /dev/shm can never hold it, `shm.RingClosed`."""
        with self._making:
            if self._closed:  # by another thread, and what is made now nobody would close
                raise shm.RingClosed("this end is closed")
            if self._writer is None:
                config = self.config
                sweep()
                shm.require_space(config.ring_bytes)
                self._writer = shm.RingWriter(
                    config.ring_bytes,
                    slots=config.max_tensors,
                    columns=config.max_readers,
                    share=config.peer_share,
                    growth=config.ring_step_bytes,
                    spare=config.shm_spare_bytes,
                    trace=ring_trace(config),
                    watch=registration.rings.watch,
                )
            return self._writer

    def _named_ring(self) -> shm.RingWriter:
        """The ring, or a new one in place of one that nobody can map any more."""
        with self._making:
            if self._writer is not None and not self._writer.linked():
                _log.warning(
                    "the name of this process's ring was taken out of /dev/shm (by systemd's RemoveIPC? see"
                    " tensorferry doctor): peers that come from now on get another ring"
                )
                self._older.append(self._writer)
                self._writer = None
        self._close_unused()
        return self.ring()

    def _close_unused(self) -> None:
        """Give back the older rings that nobody maps any more."""
        if not self._older:
            return
        with self._making:
            # In this order: who is admitted meanwhile gets its place before its offer goes.
            used = [ring for ring, _ in (*self._offered.values(), *self._places.values())]
            unused = [ring for ring in self._older if ring not in used]
            self._older = [ring for ring in self._older if ring in used]
        for ring in unused:
            ring.close()

    def can_be(self) -> bool:
        """Whether there is a ring, or one can be made."""
        try:
            self.ring()
        except (shm.NoSpace, shm.RingClosed):
            return False
        return True

    def limit(self, peer: Peer) -> int:
        place = self._places.get(peer)
        return self.most(None if place is None else place.ring)

    def most(self, writer: shm.RingWriter | None = None) -> int:
        """How many bytes one message may take at once of a ring, by default of the one written now."""
        writer = writer or self._writer
        if writer is None:
            share, capacity = int(self.config.ring_bytes * self.config.peer_share), self.config.ring_bytes
        else:
            share, capacity = writer.share_bytes(), writer.capacity
        # A part must fit an empty ring although its records are rounded up to their alignment.
        return max(1, min(share, capacity - capacity // 16))

    def lend(self, nbytes: int, timeout: float, poll: Poll) -> Bytes | None:
        return self.lend_all([nbytes], timeout, poll)[0]

    def lend_all(self, sizes: Sequence[int], timeout: float, poll: Poll) -> list[Bytes]:
        """Writable memory of these sizes (bytes, > 0) in the ring, all of it or `Full`, or `TooLarge`.

        Each array keeps its record until the last view of it is gone.
        """
        writer = self._ring_or_full()
        records = _mapped(lambda: writer.reserve(sizes, timeout=timeout, poll=poll))
        return [writer.lend(record, keep=False) for record in records]

    def lent(self, source: Source) -> Bytes | None:
        """The bytes of a source that lie in a loan, kept as by `lend_all`; None for any other."""
        loan = None if self._writer is None else _find_loan(self._writer, source)
        if loan is None or self._writer is None:
            return None
        record, start = loan
        return self._writer.lend(record)[start : start + source.nbytes]

    def put(
        self, sources: Sequence[Source], readers: Sequence[Peer], *, timeout: float, poll: Poll
    ) -> Parcel:
        nbytes = sum([source.nbytes for source in sources])
        if not nbytes:
            return NoParcel(Load([_NO_BYTES] * len(sources)))
        places = self._places_of(readers)
        writer = places[readers[0]].ring
        if self._older and any(place.ring is not writer for place in places.values()):
            return self._put_in_each(sources, places, timeout, poll)
        columns = {peer: place.column for peer, place in places.items()}
        loans = [_find_loan(writer, source) for source in sources]
        lent = [loan[0] for loan in loans if loan is not None]
        if lent:
            self._await_share(writer, lent, columns, timeout, poll)
        fresh, reserved, followed = [], [], False
        if None in loans:
            fresh = [s for s, loan in zip(sources, loans, strict=True) if loan is None and s.nbytes]
            reserved = self._reserve(writer, fresh, columns, timeout, poll)
            followed = self._worth_following(fresh, columns)
            try:
                self._fill(writer, fresh, reserved, followed=followed)
            except BaseException:
                writer.abort(reserved)
                raise
        if lent:
            for column in columns.values():
                writer.hold(lent, column)
            writer.commit(lent, keep=True)
        self._tensors += len(sources)
        self._nbytes += nbytes
        records, load = reserved + lent, self._load(sources, loans, reserved, early=followed)
        if not followed:
            return ShmParcel(writer, records, load, columns)
        left = list(zip(fresh, reserved, strict=True))
        return Unfilled(writer, records, load, columns, left=left, threads=self._threads)

    def _fill(
        self, writer: shm.RingWriter, sources: Sequence[Source], records: list[shm.Record], *, followed: bool
    ) -> None:
        """Write and commit the records; those that are followed are published only."""
        if followed:
            for record in records:
                writer.publish(record)
            return
        _tenure = writer.tenure  # kept while a device may write there, should another thread close the ring
        for source, record in zip(sources, records, strict=True):
            source.fill(writer.buffer(record), threads=self._threads)
        writer.commit(records)

    def _worth_following(self, sources: Sequence[Source], columns: Mapping[Peer, int]) -> bool:
        largest = max([source.nbytes for source in sources], default=0)
        if largest > PROGRESS_NEVER and self._threads == 1:
            return False  # it is written in one go, and looking at it would only take time from that
        return largest >= _WORTH_FOLLOWING and bool(columns) and self._followers.issuperset(columns)

    def _put_in_each(
        self, sources: Sequence[Source], places: Mapping[Peer, _Place], timeout: float, poll: Poll
    ) -> Parcel:
        """The same for readers of several rings: in all of them, or in none."""
        deadline = time.monotonic() + timeout
        groups: dict[int, list[Peer]] = {}
        for peer, place in places.items():
            groups.setdefault(place.ring.identity, []).append(peer)
        parcels: list[tuple[Parcel, list[Peer]]] = []
        try:
            for group in groups.values():
                left = max(0.0, deadline - time.monotonic())
                parcels.append((self.put(sources, group, timeout=left, poll=poll), group))
        except BaseException:
            for parcel, group in parcels:
                parcel.abandon()
                for peer in group:
                    parcel.release(peer)
            raise
        return Parcels(parcels)

    def _places_of(self, readers: Sequence[Peer]) -> dict[Peer, _Place]:
        """Where readers that proved to map a ring read; `Full` names the others."""
        try:
            return {peer: self._places[peer] for peer in readers}
        except KeyError:
            unproved = {peer.name: self.explain(peer) for peer in readers if peer not in self._places}
        raise Full("; ".join(f"{name}: {why}" for name, why in unproved.items()), failed=unproved)

    def _load(
        self,
        sources: Sequence[Source],
        loans: Sequence[tuple[shm.Record, int] | None],
        reserved: Sequence[shm.Record],
        *,
        early: bool,
    ) -> Load:
        records = iter(reserved)
        handles = []
        for source, loan in zip(sources, loans, strict=True):
            if not source.nbytes:
                handles.append(_NO_BYTES)
                continue
            record, start = loan or (next(records), 0)
            handle = RingHandle(*record.handle, start, source.nbytes, early and loan is None)
            handles.append((self.name, encode(handle)))
        return Load(handles)

    def _reserve(
        self,
        writer: shm.RingWriter,
        sources: Sequence[Source],
        columns: dict[Peer, int],
        timeout: float,
        poll: Poll,
    ) -> list[shm.Record]:
        sizes = [source.nbytes for source in sources]
        return _for_readers(
            columns, lambda: writer.reserve(sizes, columns=columns.values(), timeout=timeout, poll=poll)
        )

    def _await_share(
        self,
        writer: shm.RingWriter,
        lent: Sequence[shm.Record],
        columns: dict[Peer, int],
        timeout: float,
        poll: Poll,
    ) -> None:
        """Loans are in the ring already, but count against the share of whom they are sent to."""
        nbytes = sum({record.slot: record.nbytes for record in lent}.values())
        with suppress(shm.RingFull):  # mostly there is room
            writer.check_share(columns.values(), nbytes)
            return
        for last in attempts(timeout, poll):
            try:
                _for_readers(columns, lambda: writer.check_share(columns.values(), nbytes))
                return
            except Full:
                if last:
                    raise

    def _ring_or_full(self) -> shm.RingWriter:
        return self._writer or _mapped(self.ring)

    # -------------------------------------------------------------- telling

    def statistics(self) -> dict[str, object]:
        figures: dict[str, object] = {"tensors": self._tensors, "nbytes": self._nbytes}
        if self._writer is not None:
            figures["ring"] = self._writer.statistics()
        if self._older:
            figures["older rings"] = [ring.statistics() for ring in self._older]
        return figures

    def close(self) -> None:
        with self._making:
            self._closed = True
        for ring in (self._writer, *self._older):
            if ring is not None:
                ring.close()
        self.exporter.close()


def _find_loan(writer: shm.RingWriter, source: Source) -> tuple[shm.Record, int] | None:
    """The loan that a tensor lies in, and where."""
    address = source.address
    return None if address is None else writer.find_loan(address, source.nbytes)


_T = TypeVar("_T")


def _mapped(call: Callable[[], _T]) -> _T:
    """Run a call of the ring and raise what it raises as the transport's own errors."""
    try:
        return call()
    except shm.RecordTooLarge as error:
        raise TooLarge(str(error)) from error
    except (shm.RingFull, shm.NoSpace) as error:
        raise Full(str(error)) from error
    except shm.RingClosed as error:
        raise PeerGone("everybody who mapped this ring has left") from error


def _for_readers(columns: Mapping[Peer, int], call: Callable[[], _T]) -> _T:
    """The same, for a call whose `Full` names the readers that hold too much, or all of them."""
    try:
        return _mapped(call)
    except Full as error:
        late = error.__cause__.columns if isinstance(error.__cause__, shm.RingFull) else ()
        names = [peer.name for peer, column in columns.items() if column in late or not late]
        error.failed = dict.fromkeys(names, str(error))
        raise
