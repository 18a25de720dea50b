"""Rings that neighbours read: what landed for one peer of a host is there for others that map its ring.

The same sender has a link to each of them and passes offer, proof and verdict on between them: what a ring
believes of a reader is what it reads in its own memory. For the thread of a hub alone.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import msgspec

from transport.backends.base import Bytes, Parcel, Peer, Proof, Refusal
from transport.backends.shm import ShmOutbound
from transport.backends.shm_inbound import ShmInbound
from transport.config import TransportConfig
from transport.errors import TransportError
from transport.tensors import source_of

MOST_NEIGHBOURS = 16  # of one link: each takes a column

_handles = msgspec.msgpack.Decoder(list[bytes])


class _Kept(NamedTuple):
    """What landed here and guests are to open; places: where they are told that it is."""

    parcel: Parcel
    guests: list[Peer]
    places: bytes
    nbytes: int


class Host:
    """The side whose ring is read. ring: where tensors land here."""

    def __init__(self, ring: ShmOutbound) -> None:
        self._ring = ring
        self._guests: dict[tuple[int, int], Peer] = {}  # by link, and the sender's number of the neighbour
        self._kept: dict[tuple[int, int], _Kept] = {}  # by link and transfer

    def invite(self, link: int, number: int, name: str) -> bytes:
        """An offer of the ring for a neighbour; empty when there is none."""
        self.leave(link, number)  # asked again, since the answer was lost
        if len(self._of(link)) >= MOST_NEIGHBOURS:
            return b""
        guest = Peer(link, name, address=f"beside:{number}")
        try:
            offer = self._ring.offer(guest)
        except TransportError:
            return b""
        self._guests[link, number] = guest
        return offer

    def admit(self, link: int, number: int, proof: bytes) -> bool:
        """Judge a neighbour's proof; empty is a refusal."""
        guest = self._guests.get((link, number))
        if guest is None:
            return False
        if not self._ring.admit(guest, Proof(proof) if proof else Refusal("it does not map the ring")):
            return True
        self.leave(link, number)
        return False

    def keep(self, link: int, transfer: int, arrays: Sequence[Bytes], numbers: Sequence[int]) -> bytes:
        """Keep what landed for these neighbours until `let_go`: where they find it; empty: they cannot."""
        guests = [self._guests.get((link, number)) for number in numbers]
        there = [guest for guest in guests if guest is not None and self._ring.serves(guest)]
        sources = [source for source in map(source_of, arrays) if source is not None]
        nbytes = sum(source.nbytes for source in sources)
        others = sum(kept.nbytes for (known, _), kept in self._kept.items() if known == link)
        if others + nbytes > self._ring.most():  # a sender that never lets go must not fill the ring
            return b""
        if (
            not there
            or len(there) < len(numbers)
            or any(self._ring.lent(source) is None for source in sources)
        ):
            return b""
        try:
            parcel = self._ring.put(sources, there, timeout=0.0, poll=_nothing)
        except TransportError:  # a neighbour's share of the ring is used up
            return b""
        places = msgspec.msgpack.encode([handle for _, handle in parcel.load(there[0]).handles])
        self._kept[link, transfer] = _Kept(parcel, there, places, nbytes)
        return places

    def kept(self, link: int, transfer: int) -> bytes:
        """What `keep` said of a transfer that is kept still."""
        return self._kept[link, transfer].places if (link, transfer) in self._kept else b""

    def let_go(self, link: int, transfer: int) -> None:
        """The neighbours have it, or will not have it from here."""
        kept = self._kept.pop((link, transfer), None)
        if kept is not None:
            for guest in kept.guests:
                kept.parcel.release(guest)

    def let_go_but(self, link: int, transfers: Collection[int]) -> None:
        """Of what this link brought only these live still: what was said of others may be lost."""
        for known, transfer in list(self._kept):
            if known == link and transfer not in transfers:
                self.let_go(link, transfer)

    def leave(self, link: int, number: int) -> None:
        """A neighbour is gone."""
        guest = self._guests.pop((link, number), None)
        if guest is not None:
            self._ring.drop(guest)

    def forget(self, link: int) -> None:
        """The link ended: the sender will not say any more who has what."""
        self.let_go_but(link, ())
        for number in self._of(link):
            self.leave(link, number)

    def _of(self, link: int) -> list[int]:
        return [number for known, number in self._guests if known == link]


class Guest:
    """The side that reads a neighbour's ring. name: what it is called there."""

    def __init__(self, config: TransportConfig) -> None:
        self.name = "a neighbour"
        self._rings = ShmInbound(config)
        self._hosts: dict[tuple[int, int], Peer] = {}  # by link, and the sender's number of the neighbour

    def accept(self, link: int, number: int, offer: bytes) -> bytes:
        """The proof that a neighbour's ring is mapped here; empty when it is not."""
        self.leave(link, number)
        if len(self._of(link)) >= MOST_NEIGHBOURS:
            return b""
        host = Peer(link, f"neighbour {number}", address=f"beside:{number}")
        answer = self._rings.accept(host, offer, self.name)
        if isinstance(answer, Refusal):
            return b""
        self._hosts[link, number] = host
        return answer.data

    def settle(self, link: int, number: int, *, admitted: bool) -> None:
        """The neighbour's verdict on the proof."""
        host = self._hosts.get((link, number))
        if host is not None:
            self._rings.settle(host, "" if admitted else "refused")
            if not admitted:
                del self._hosts[link, number]

    def open(self, link: int, number: int, places: bytes, sizes: Sequence[int]) -> list[Bytes] | None:
        """The tensors of a transfer in a neighbour's ring; None when they are not there for any reason."""
        host = self._hosts.get((link, number))
        try:
            handles = _handles.decode(places)
            if host is None or len(handles) != len(sizes):
                return None
            return [
                self._rings.open(host, handle, nbytes, ())
                for handle, nbytes in zip(handles, sizes, strict=True)
            ]
        except (msgspec.DecodeError, TransportError):
            return None

    def leave(self, link: int, number: int) -> None:
        """A neighbour is gone; what is open of its ring stays."""
        host = self._hosts.pop((link, number), None)
        if host is not None:
            self._rings.drop(host)

    def forget(self, link: int) -> None:
        """The link ended."""
        for number in self._of(link):
            self.leave(link, number)

    def close(self) -> None:
        """Map no ring any more."""
        self._rings.close()

    def _of(self, link: int) -> list[int]:
        return [number for known, number in self._hosts if known == link]


def _nothing() -> None:
    return
