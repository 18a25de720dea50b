"""The payload in this process's shared-memory ring, read in place by the processes that proved to map it."""

from __future__ import annotations

import logging
import math
import secrets
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import NamedTuple, TypeVar

import msgspec

import shm
from transport import registration
from transport.backends.base import (
    Bytes,
    Complete,
    Held,
    Inbound,
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
from transport.config import TransportConfig
from transport.errors import Full, GivenUp, PeerGone, ProtocolError, Timeout, TooLarge, TransportError
from transport.sharing import Exporter, Importer
from transport.tensors import Source
from transport.waiting import attempts

_log = logging.getLogger("tensorferry.transport")


class _Handle(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A record, and the part of it that is the tensor. early: it was sent before it was written."""

    segment: int
    slot: int
    generation: int
    offset: int
    nbytes: int
    start: int
    length: int
    early: bool = False


class _Offer(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    name: str
    column: int
    challenge: int
    device: bytes = b""  # what to read on the GPU that this process uses; see `transport.sharing`


class _Proof(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Beside the challenge in the column: whether records are read early, and what was read on the GPU."""

    follows: bool = False
    device: bytes = b""


_handles = msgspec.msgpack.Decoder(_Handle)
_offers = msgspec.msgpack.Decoder(_Offer)
_proofs = msgspec.msgpack.Decoder(_Proof)
_encode = msgspec.msgpack.Encoder().encode
_WORTH_FOLLOWING = 4 << 20  # bytes; of less there is little left when the peer has woken up
_NO_BYTES = ("inline", _encode(b""))  # a record needs at least one byte


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
                return _encode(_Offer(*self._offered[peer][1], device))
        except (shm.RingFull, shm.NoSpace) as error:
            self._refused[peer] = str(error)
            raise Full(str(error), failed={peer.name: str(error)}) from error

    def admit(self, peer: Peer, answer: Proof | Refusal) -> str:
        offered = self._offered.pop(peer, None)
        if offered is None:
            return "nothing was offered"
        writer, offer = offered
        if isinstance(answer, Refusal):
            writer.withdraw(offer)
            self._refused[peer] = answer.reason
            return answer.reason
        try:
            proof = _proofs.decode(answer.data) if answer.data else _Proof()
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
        """The ring, made now if need be. `shm.NoSpace` when /dev/shm can never hold it."""
        with self._making:
            if self._writer is None:
                config = self.config
                shm.sweep()
                shm.require_space(config.ring_bytes)
                self._writer = shm.RingWriter(
                    config.ring_bytes,
                    slots=config.max_tensors,
                    columns=config.max_readers,
                    share=config.peer_share,
                    trace=_trace(config),
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
            used = [ring for ring, _ in (*self._places.values(), *self._offered.values())]
            unused = [ring for ring in self._older if ring not in used]
            self._older = [ring for ring in self._older if ring in used]
        for ring in unused:
            ring.close()

    def can_be(self) -> bool:
        """Whether there is a ring, or one can be made."""
        try:
            self.ring()
        except shm.NoSpace:
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
        large = any(source.nbytes >= _WORTH_FOLLOWING for source in sources)
        return large and bool(columns) and self._followers.issuperset(columns)

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
            handle = _Handle(*record.handle, start, source.nbytes, early and loan is None)
            handles.append((self.name, _encode(handle)))
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
        for ring in (self._writer, *self._older):
            if ring is not None:
                ring.close()
        self.exporter.close()


class ShmInbound(Inbound):
    """The rings of others that this process was admitted to."""

    name = "shm"
    in_place = True

    def __init__(self, config: TransportConfig) -> None:
        super().__init__(config)
        self._proved: dict[Peer, shm.RingReader] = {}  # not admitted yet
        self._readers: dict[int, shm.RingReader] = {}
        self._identities: dict[Peer, int] = {}
        self.importer = Importer()

    def accept(self, peer: Peer, offer: bytes, own_name: str) -> Proof | Refusal:
        older = self._proved.pop(peer, None)
        if older is not None:  # a peer that offers again and again must not fill this process with mappings
            older.close()
        try:
            offered = _offers.decode(offer)
            self._proved[peer] = shm.RingReader(
                shm.Offer(offered.name, offered.column, offered.challenge),
                own_name,
                trace=_trace(self.config),
                watch=registration.rings.watch,
            )
        except (msgspec.DecodeError, UnicodeDecodeError):
            return Refusal("the offer is not one")
        except (shm.ShmError, OSError) as error:
            return Refusal(str(error))
        return Proof(
            _encode(_Proof(self.config.cut_through, self.importer.answer(peer.link, offered.device)))
        )

    def settle(self, peer: Peer, reason: str) -> None:
        reader = self._proved.pop(peer, None)
        if reader is None:
            return
        if reason:
            reader.close()
            return
        for identity in (reader.identity, self._identities.get(peer, 0)):
            older = self._readers.pop(identity, None)
            if older is not None:
                older.close()
        # An older link to the same process, which may end later, must not take this reader along.
        self._identities = {p: known for p, known in self._identities.items() if known != reader.identity}
        self._readers[reader.identity] = reader
        self._identities[peer] = reader.identity

    def open(self, peer: Peer, handle: bytes, nbytes: int, frames: Sequence[Bytes]) -> Bytes:
        reader, record, where = self._find(peer, handle, nbytes)
        start = where.start
        try:
            view = reader.open(record)
        except shm.ShmError as error:
            raise _told(error, peer, reader) from error
        return view if nbytes == record.nbytes else view[start : start + nbytes]

    def open_early(
        self, peer: Peer, handle: bytes, nbytes: int, frames: Sequence[Bytes]
    ) -> tuple[Bytes, Complete | None]:
        reader, record, where = self._find(peer, handle, nbytes)
        start = where.start
        view = _opened_early(peer, reader, record, where)
        complete = (
            None if reader.is_whole(record) else partial(_completed, peer, reader, record, start + nbytes)
        )
        return view if nbytes == record.nbytes else view[start : start + nbytes], complete

    def follow(
        self, peer: Peer, handle: bytes, nbytes: int, frames: Sequence[Bytes]
    ) -> Iterator[tuple[int, Bytes]]:
        reader, record, where = self._find(peer, handle, nbytes)
        start = where.start
        view = _opened_early(peer, reader, record, where)
        done = start
        while done < start + nbytes:
            try:
                filled = min(_written(peer, reader, record, done + 1), start + nbytes)
            except TransportError:
                del view  # the traceback keeps this frame, which must not keep the record
                raise
            yield done - start, view[done:filled]
            done = filled

    def open_record(self, peer: Peer, handle: bytes) -> Bytes:
        """All bytes of what a handle names, however many they are; otherwise as `open`."""
        return self.open(peer, handle, _decoded(handle).length, ())

    def _find(self, peer: Peer, handle: bytes, nbytes: int) -> tuple[shm.RingReader, shm.Handle, _Handle]:
        """Where a tensor is: whose ring, which record, and where in it."""
        where = _decoded(handle)
        if where.length != nbytes or not 0 <= where.start <= where.nbytes - nbytes:
            raise ProtocolError(f"{nbytes} bytes at {where.start} of a record of {where.nbytes}")
        reader = self._readers.get(where.segment)
        if reader is None:
            raise PeerGone(f"the ring of {peer.name}'s tensor is not mapped here (any more)")
        record = shm.Handle(where.segment, where.slot, where.generation, where.offset, where.nbytes)
        return reader, record, where

    def alive(self, peer: Peer) -> bool | None:
        """Whether the writer of the peer's ring lives; None when no ring of it is mapped here."""
        reader = self._readers.get(self._identities.get(peer, 0))
        return None if reader is None else _writer_alive(reader)

    def stores(self) -> Collection[int]:
        return list(self._readers)

    def store_of(self, handle: bytes) -> int | None:
        return _handles.decode(handle).segment

    def drop(self, peer: Peer) -> None:
        for reader in (self._proved.pop(peer, None), self._readers.pop(self._identities.pop(peer, 0), None)):
            if reader is not None:
                reader.close()

    def statistics(self) -> dict[str, object]:
        return {"rings": len(self._readers), "opened": sum(r.opened for r in self._readers.values())}

    def close(self) -> None:
        for peer in {*self._proved, *self._identities}:
            self.drop(peer)


def _decoded(handle: bytes) -> _Handle:
    try:
        return _handles.decode(handle)
    except msgspec.DecodeError as error:
        raise ProtocolError(f"a ring handle is not one: {error}") from error


def _opened_early(peer: Peer, reader: shm.RingReader, record: shm.Handle, where: _Handle) -> Bytes:
    """A record of which some bytes may still be written."""
    try:
        return reader.open(record, early=True)
    except shm.ShmError as error:
        raise _told(error, peer, reader, early=where.early) from error


def _written(
    peer: Peer,
    reader: shm.RingReader,
    record: shm.Handle,
    least: int,
    *,
    timeout: float = 1.0,
    within: float = math.inf,
) -> int:
    """`RingReader.wait_filled`; errors as `Inbound.follow`."""
    try:
        return reader.wait_filled(record, least, timeout=timeout, within=within)
    except shm.ShmError as error:
        raise _told(error, peer, reader, early=True) from error


def _completed(peer: Peer, reader: shm.RingReader, record: shm.Handle, end: int, within: float) -> bool:
    """Whether the first `end` bytes are there, within so many seconds."""
    return _written(peer, reader, record, end, timeout=math.inf, within=within) >= end


def _told(error: shm.ShmError, peer: Peer, reader: shm.RingReader, *, early: bool = False) -> TransportError:
    """What opening a record of `peer` raised, as the transport's own error."""
    if isinstance(error, shm.Stalled):
        return Timeout(f"{peer.name}: {error}")
    if isinstance(error, shm.RingClosed):
        return PeerGone(f"the ring of {peer.name}'s tensor is not mapped here any more")
    if early and _writer_alive(reader):
        return GivenUp(f"{peer.name} failed to write a tensor: {error}")
    if _writer_alive(reader):
        return ProtocolError(f"a stale handle from {peer.name}: {error}")
    return PeerGone(f"the writer of {peer.name}'s tensor died: {error}")


def _writer_alive(reader: shm.RingReader) -> bool:
    try:
        return reader.writer_alive()
    except shm.RingClosed:  # another thread has just dropped it
        return False


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


def _trace(config: TransportConfig) -> Callable[[str, Mapping[str, object]], None] | None:
    trace = config.trace
    if trace is None:
        return None
    return lambda event, fields: trace(f"ring.{event}", time.monotonic_ns(), fields)
