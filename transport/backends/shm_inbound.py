"""The rings of others, read in place: opening records, following those that are still being written."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Collection, Iterator, Sequence
from functools import partial

import msgspec

import shm
from transport import registration
from transport.backends.base import Bytes, Complete, Inbound, Peer, Proof, Refusal
from transport.backends.ring_messages import (
    RingHandle,
    RingProof,
    encode,
    for_peer,
    handles,
    offers,
    ring_trace,
)
from transport.config import TransportConfig
from transport.errors import GivenUp, PeerGone, ProtocolError, Timeout, TransportError
from transport.sharing import Importer

_log = logging.getLogger("tensorferry.transport")


class ShmInbound(Inbound):
    """The rings of others that this process was admitted to."""

    name = "shm"
    in_place = True

    def __init__(self, config: TransportConfig) -> None:
        super().__init__(config)
        self._proved: dict[Peer, shm.RingReader] = {}  # not admitted yet
        self._readers: dict[int, shm.RingReader] = {}
        self._identities: dict[Peer, int] = {}
        self._changing = threading.Lock()  # of the two above: one thread drops a link, another settles one
        self._short = False
        self.importer = Importer()
        sweep()  # also where no ring will be made: somebody's rings may lie here since long before

    def accept(self, peer: Peer, offer: bytes, own_name: str) -> Proof | Refusal:
        older = self._proved.pop(peer, None)
        if older is not None:  # a peer that offers again and again must not fill this process with mappings
            older.close()
        try:
            offered = offers.decode(offer)
            self._proved[peer] = shm.RingReader(
                shm.Offer(offered.name, offered.column, offered.challenge),
                own_name,
                trace=ring_trace(self.config),
                watch=registration.rings.watch,
            )
        except (msgspec.DecodeError, UnicodeDecodeError):
            return Refusal("the offer is not one")
        except shm.ShmError as error:
            if isinstance(error, shm.NoSpace) and not self._short:  # once: peers may offer again and again
                self._short = True
                _log.warning("the ring of %s is not read in place: %s", peer, error)
            return Refusal(for_peer(error))
        except OSError as error:  # its text may name a file, which is nothing for a peer
            return Refusal(f"the ring cannot be mapped: {error.strerror}")
        return Proof(
            encode(RingProof(self.config.cut_through, self.importer.answer(peer.link, offered.device)))
        )

    def settle(self, peer: Peer, reason: str) -> None:
        reader = self._proved.pop(peer, None)
        if reader is None:
            return
        if reason:
            reader.close()
            return
        with self._changing:
            known = self._identities.get(peer, 0)
            older = [self._readers.get(identity) for identity in {known, reader.identity}]
            self._readers[reader.identity] = reader
            if known != reader.identity:
                self._readers.pop(known, None)
            # An older link to the same process, which may end later, must not take this reader along.
            self._identities = {p: ring for p, ring in self._identities.items() if ring != reader.identity}
            self._identities[peer] = reader.identity
        for replaced in older:  # now: who opens a record in another thread meets one reader or the other
            if replaced is not None:
                replaced.close()

    def open(self, peer: Peer, handle: bytes, nbytes: int, frames: Sequence[Bytes]) -> Bytes:
        return self._opened(peer, handle, nbytes)[0]

    def open_early(
        self, peer: Peer, handle: bytes, nbytes: int, frames: Sequence[Bytes]
    ) -> tuple[Bytes, Complete | None]:
        view, reader, record, start, whole = self._opened(peer, handle, nbytes, early=True)
        complete = None if whole else partial(_completed, peer, reader, record, start + nbytes)
        return view, complete

    def follow(
        self, peer: Peer, handle: bytes, nbytes: int, frames: Sequence[Bytes]
    ) -> Iterator[tuple[int, Bytes]]:
        view, reader, record, start, _ = self._opened(peer, handle, nbytes, early=True)
        done = 0
        while done < nbytes:
            try:
                filled = min(_written(peer, reader, record, start + done + 1) - start, nbytes)
            except TransportError:
                del view  # the traceback keeps this frame, which must not keep the record
                raise
            yield done, view[done:filled]
            done = filled

    def open_record(self, peer: Peer, handle: bytes) -> Bytes:
        """All bytes of what a handle names, however many they are; otherwise as `open`."""
        return self.open(peer, handle, _decoded(handle).length, ())

    def _opened(
        self, peer: Peer, handle: bytes, nbytes: int, *, early: bool = False
    ) -> tuple[Bytes, shm.RingReader, shm.Handle, int, bool]:
        """A tensor's bytes, whose reader and record, where in it they begin, and whether it is complete.

        `early`: it need not be.
        """
        while True:
            reader, record, where = self._find(peer, handle, nbytes)
            try:
                view, whole = _opened(reader, record, early=early)
            except shm.ShmError as error:
                now = self._readers.get(where.segment)
                if not isinstance(error, shm.RingClosed) or now is None or now is reader:
                    raise _told(error, peer, reader, early=early and where.early) from error
                continue  # another thread has just put the next reader in its place
            start = where.start
            part = view if nbytes == record.nbytes else view[start : start + nbytes]
            return part, reader, record, start, whole

    def _find(self, peer: Peer, handle: bytes, nbytes: int) -> tuple[shm.RingReader, shm.Handle, RingHandle]:
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
        return handles.decode(handle).segment

    def drop(self, peer: Peer) -> None:
        with self._changing:
            readers = self._proved.pop(peer, None), self._readers.pop(self._identities.pop(peer, 0), None)
        for reader in readers:
            if reader is not None:
                reader.close()

    def statistics(self) -> dict[str, object]:
        return {"rings": len(self._readers), "opened": sum(r.opened for r in self._readers.values())}

    def close(self) -> None:
        for peer in {*self._proved, *self._identities}:
            self.drop(peer)


def sweep() -> None:
    """Remove the rings of the dead. What keeps it from that keeps no endpoint from anything."""
    try:
        shm.sweep()
    except OSError:
        pass  # there is no /dev/shm, or it is not this user's to read
    except Exception as error:  # noqa: BLE001  # others may have made there whatever they can
        _log.warning("the rings of dead processes stay in /dev/shm: %s", error)


def _decoded(handle: bytes) -> RingHandle:
    try:
        return handles.decode(handle)
    except msgspec.DecodeError as error:
        raise ProtocolError(f"a ring handle is not one: {error}") from error


def _opened(reader: shm.RingReader, record: shm.Handle, *, early: bool) -> tuple[Bytes, bool]:
    """The bytes of a record, and whether all of them are there."""
    view = reader.open(record, early=early)
    try:
        return view, not early or reader.is_whole(record)
    except shm.ShmError:
        del view  # as in `follow`
        raise


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
        return Timeout(f"{peer}: {error}")
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
