"""The payload over bulk connections, for peers on other hosts: out of this process's ring into the peer's.

The bytes of a message are put into the sender's own ring; a thread streams them from there, in chunks,
once the receiver granted credit for all of them, and the receiver's thread takes them straight into its
own ring. Both sides are here; how the bytes travel is in `transport.bulk`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import msgspec
import numpy as np

from transport.backends.base import (
    Bytes,
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
from transport.backends.budget import Budget
from transport.backends.shm import ShmOutbound
from transport.bulk.cargo import Cargo
from transport.bulk.channel import Channel
from transport.bulk.hub import Hub
from transport.bulk.landing import Landing
from transport.bulk.lodging import Guest, Host
from transport.bulk.neighbours import Neighbours
from transport.bulk.terms import Terms, decode_handle, decode_terms, encode_handle, encode_terms
from transport.bulk.transfer import Outgoing
from transport.config import TransportConfig
from transport.errors import Full, PeerGone, ProtocolError, Timeout, TooLarge, detached
from transport.tensors import Source
from transport.waiting import attempts

_OPEN_MAY_TAKE = 1.0
_NAP = 1e-3


_NO_BYTES = ("inline", msgspec.msgpack.encode(b""))
_LOOPBACK = "127.0.0.1"


class TcpParcel(Parcel):
    """Transfers of the same bytes, one for each reader; `give` tells its budgets that one has let go."""

    def __init__(
        self,
        sizes: Sequence[int],
        transfers: dict[Peer, tuple[Channel, Outgoing]],
        hub: Hub,
        give: Callable[[Peer], None],
    ) -> None:
        self._sizes = sizes
        self._transfers = transfers
        self._hub = hub
        self._give = give

    def load(self, reader: Peer) -> Load:
        _, outgoing = self._transfers[reader]
        handles, index = [], 0
        for size in self._sizes:
            handles.append((TcpOutbound.name, encode_handle(outgoing.number, index)) if size else _NO_BYTES)
            index += size > 0
        return Load(handles)

    def release(self, reader: Peer) -> None:
        channel, outgoing = self._transfers[reader]
        self._give(reader)
        if outgoing.landed:
            outgoing.let_go()
            self._hub.tell(partial(channel.forget, outgoing), now=False)
        else:
            self._hub.tell(partial(channel.cancel, outgoing))

    def cancel(self) -> None:
        """What was begun is not to be gone on with: its bytes could not be read."""
        for channel, outgoing in self._transfers.values():
            self._hub.tell(partial(channel.cancel, outgoing))


class TcpOutbound(Outbound):
    """Puts into the ring and has it streamed. Owns the bulk connections of its endpoint, in both directions.

    ring: the endpoint's own. budget: of bytes beside it.
    """

    name = "tcp"

    def __init__(
        self, config: TransportConfig, ring: ShmOutbound | None = None, budget: Budget | None = None
    ) -> None:
        super().__init__(config)
        self.ring = ring or ShmOutbound(config)
        neighbours = Neighbours(Host(self.ring), Guest(config))
        self.hub = Hub(config, Landing(config, self._land), neighbours)
        self._budget = budget or Budget(config.detour_bytes)
        share, window = int(config.ring_bytes * config.peer_share), config.tcp_window
        self._unacknowledged = (
            Budget(share, "a peer's share of the ring") if share < window else Budget(window, "tcp_window")
        )
        self._asked: set[Peer] = set()
        self._refused: dict[Peer, str] = {}
        self._detours = self._tensors = self._nbytes = 0

    # -------------------------------------------------------------- who is reached

    def serves(self, peer: Peer) -> bool:
        channel = self.hub.channel(peer)
        return channel is not None and channel.opened > 0 and not channel.over

    def wants_offer(self, peer: Peer, sizes: Sequence[int]) -> bool:
        return any(sizes) and not self.serves(peer) and not self._why_not(peer)

    def offer(self, peer: Peer) -> bytes:
        missing = self.hub.lacks(peer)
        if missing:
            self._refused[peer] = missing
            raise Full(missing, failed={peer.name: missing})
        self._asked.add(peer)
        try:
            return encode_terms(self.terms(peer, expecting=not peer.dialled))
        except OSError as error:
            reason = self._refused[peer] = _no_port(self.config, error)
            raise Full(reason, failed={peer.name: reason}) from error

    def admit(self, peer: Peer, answer: Proof | Refusal) -> str:
        if peer not in self._asked:
            return "nothing was offered"
        if isinstance(answer, Refusal):
            reason = answer.reason
        else:
            reason = self.agree(peer, answer.data, dial=peer.dialled)
        if reason:
            self._refused[peer] = reason
        self._asked.discard(peer)  # now: who sends in another thread waits for what was asked for, or is made
        return reason

    def terms(self, peer: Peer, *, expecting: bool) -> Terms:
        """What a peer is told; `expecting`: it shall dial. `OSError` when nothing can listen."""
        limit = self.hub.landing.limit if self.ring.can_be() else max(1, self.config.detour_bytes // 2)
        certificate = self.hub.certificate(peer)  # before anybody can connect
        port, token = self.hub.expect(peer, _host(peer)) if expecting else (0, b"")
        return Terms(limit, port, token, certificate)

    def agree(self, peer: Peer, data: bytes, *, dial: bool) -> str:
        """Take a peer's terms; "" or why not. Only the host that the control link runs to is dialled."""
        terms = decode_terms(data)
        if terms is None or dial != bool(terms.port):
            return "the terms of the bulk connection are none"
        channel = self.hub.channel(peer)
        if dial:
            channel = self.hub.dial(peer, _host(peer), terms.port, terms.token)
        if channel is not None:
            channel.limit = terms.limit
        return self.hub.pin(peer, terms.certificate)

    def explain(self, peer: Peer) -> str:
        if self.serves(peer):
            return f"tcp: a bulk connection {'to' if peer.dialled else 'at'} {_host(peer)}"
        why_not = self._why_not(peer)
        if why_not:
            return f"not tcp: {why_not}"
        if peer not in self._asked and self.hub.channel(peer) is None:
            return "not tcp yet: no need"
        trouble = self.hub.trouble(peer)
        return f"not tcp yet: no bulk connection so far{f': {trouble}' if trouble else ''}"

    def fault(self, peer: Peer) -> str:
        channel = self.hub.channel(peer)
        return channel.fault if channel is not None and channel.opened else ""

    def drop(self, peer: Peer) -> None:
        self._asked.discard(peer)
        self._refused.pop(peer, None)
        channel = self.hub.channel(peer)
        if channel is None:
            return
        if channel.opened:
            self.hub.tell(channel.end)
        else:  # nothing came; and another thread that offers may have made it after all else was forgotten
            self.hub.drop(peer)

    def _why_not(self, peer: Peer) -> str:
        """Why there is no bulk connection and will be none, "" while there may be one."""
        channel = self.hub.channel(peer)
        if channel is None:
            return self._refused.get(peer, "")
        return self._refused.get(peer, "") or channel.fault or ("its link has ended" if channel.ended else "")

    def _may_come(self, peer: Peer) -> bool:
        """Whether a bulk connection with a peer is on its way."""
        asked = peer in self._asked or self.hub.channel(peer) is not None
        return asked and not self._why_not(peer)

    # -------------------------------------------------------------- tensors

    def limit(self, peer: Peer) -> int:
        most = self.ring.most() if self.ring.can_be() else max(1, self.config.detour_bytes // 2)
        most = min(most, self._unacknowledged.limit)
        channel = self.hub.channel(peer)
        return min(most, channel.limit) if channel is not None and channel.limit else most

    def lend(self, nbytes: int, timeout: float, poll: Poll) -> Bytes | None:
        return self.ring.lend(nbytes, timeout, poll)

    def put(
        self, sources: Sequence[Source], readers: Sequence[Peer], *, timeout: float, poll: Poll
    ) -> Parcel:
        sizes = [source.nbytes for source in sources]
        nbytes = sum(sizes)
        if not nbytes:
            return NoParcel(Load([_NO_BYTES] * len(sources)))
        deadline = time.monotonic() + timeout
        channels = self._channels(readers, timeout, poll)
        left = max(0.0, deadline - time.monotonic())
        wanted = [source for source in sources if source.nbytes]
        with _told_why(channels), self._unacknowledged.taken_for(readers, nbytes, timeout=left, poll=poll):
            cargo, unwritten, beside = self._loaded(wanted, readers, deadline, poll)
            # Begun before it is written: what is written is sent while the rest is still being copied.
            outgoings = self.hub.start(list(channels.values()), cargo)
            pairs = zip(channels.values(), outgoings, strict=True)
            transfers = dict(zip(channels, pairs, strict=True))
            parcel = TcpParcel(sizes, transfers, self.hub, partial(self._give, nbytes, beside))
            try:
                for index in unwritten:
                    cargo.write(index, wanted[index])
            except BaseException:
                del cargo  # the traceback keeps this frame, which must not keep the room
                parcel.cancel()
                for reader in readers:
                    self._budget.give(reader, beside)
                raise
        self._tensors += len(sources)
        self._nbytes += nbytes
        return parcel

    def _channels(self, readers: Sequence[Peer], timeout: float, poll: Poll) -> dict[Peer, Channel]:
        """The channels of readers that are connected; the first connection may still be made."""
        for last in attempts(timeout, poll):
            channels = {peer: self.hub.channel(peer) for peer in readers if self.serves(peer)}
            missing = [peer for peer in readers if peer not in channels]
            if last or not any(map(self._may_come, missing)):
                break
        if missing:
            reasons = {peer.name: self.explain(peer) for peer in missing}
            raise Full("; ".join(f"{name}: {why}" for name, why in reasons.items()), failed=reasons)
        return {peer: channel for peer, channel in channels.items() if channel is not None}

    def _loaded(
        self, sources: Sequence[Source], readers: Sequence[Peer], deadline: float, poll: Poll
    ) -> tuple[Cargo, list[int], int]:
        """Room for the sources: which are still to be written, and how many bytes lie beside the ring."""
        pieces = [self.ring.lent(source) for source in sources]
        unwritten = [index for index, piece in enumerate(pieces) if piece is None]
        arrays, beside = self._room([sources[index].nbytes for index in unwritten], readers, deadline, poll)
        room = iter(arrays)
        whole = [next(room) if piece is None else piece for piece in pieces]
        return Cargo(whole, unwritten, self.hub.go_on), unwritten, beside

    def _room(
        self, sizes: Sequence[int], readers: Sequence[Peer], deadline: float, poll: Poll
    ) -> tuple[list[Bytes], int]:
        if not sizes:
            return [], 0
        now, total = time.monotonic(), sum(sizes)
        has_detour = total <= self.config.detour_bytes
        patience = min(deadline, now + self.config.detour_after) if has_detour else deadline
        try:
            return self.ring.lend_all(sizes, max(0.0, patience - now), poll), 0
        except (Full, TooLarge) as error:
            full = detached(error)
        if not has_detour:
            raise full
        try:
            self._budget.take(readers, total, timeout=max(0.0, deadline - time.monotonic()), poll=poll)
        except Full as error:
            raise Full(f"{full}; beside it: {error}", failed=error.failed) from None
        self._detours += 1
        return [np.empty(size, np.uint8) for size in sizes], total

    def _give(self, nbytes: int, beside: int, reader: Peer) -> None:
        self._unacknowledged.give(reader, nbytes)
        self._budget.give(reader, beside)

    def _land(self, sizes: Sequence[int]) -> list[Bytes]:
        """Room in the ring for what arrives."""
        if not self.ring.can_be() or sum(sizes) > self.ring.most():
            raise TooLarge(f"{sum(sizes)} bytes at once never fit into the ring here")
        return self.ring.lend_all(sizes, 0.0, _nothing)

    # -------------------------------------------------------------- the end

    def flush(self, timeout: float) -> bool:
        return self.hub.flush(timeout)

    def statistics(self) -> dict[str, object]:
        return {
            "tensors": self._tensors,
            "nbytes": self._nbytes,
            "beside the ring": self._detours,
            "bulk": self.hub.statistics(),
            **{key: value for key, value in self.ring.statistics().items() if key == "ring"},
        }

    def close(self) -> None:
        self.hub.close()
        self.ring.close()


class TcpInbound(Inbound):
    """What has landed here, in the ring of this endpoint."""

    name = "tcp"
    comes_later = True

    def __init__(self, config: TransportConfig) -> None:
        super().__init__(config)
        self._outbound: TcpOutbound | None = None
        self._own: TcpOutbound | None = None  # where the endpoint itself sends by other ways

    def begin(self, outbound: Outbound, wake: Callable[[], object]) -> None:
        part = outbound.part(self.name)
        if isinstance(part, TcpOutbound):
            self._outbound = part
        self._site().hub.wake = wake

    def accept(self, peer: Peer, offer: bytes, own_name: str) -> Proof | Refusal:
        site = self._site()
        site.hub.neighbours.guest.name = own_name
        offered = decode_terms(offer)
        if offered is None:
            return Refusal("the offer is not one")
        dial = bool(offered.port)
        if site.hub.lacks(peer):
            return Refusal(site.hub.lacks(peer))
        if dial and not peer.dialled and peer.address.startswith("tcp://"):
            return Refusal("who made the link makes the bulk connection, too")
        try:
            terms = site.terms(peer, expecting=not dial)
        except OSError as error:
            return Refusal(_no_port(site.config, error))
        reason = site.agree(peer, offer, dial=dial)
        return Refusal(reason) if reason else Proof(encode_terms(terms))

    def settle(self, peer: Peer, reason: str) -> None:
        channel = self._site().hub.channel(peer)
        if reason and channel is not None and not channel.opened:
            self._site().hub.drop(peer)

    def open(self, peer: Peer, handle: bytes, nbytes: int, frames: Sequence[Bytes]) -> Bytes:
        where = decode_handle(handle)
        channel = self._site().hub.channel(peer)
        if channel is None:
            raise PeerGone(f"there is no bulk connection with {peer.name} (any more)")
        deadline = time.monotonic() + _OPEN_MAY_TAKE
        while not channel.is_ready(where.transfer):
            if time.monotonic() > deadline:
                came = channel.arriving.progress(where.transfer)
                raise Timeout(f"the bytes of a tensor of {peer} are still to come: {came}")
            time.sleep(_NAP)
        arrays = channel.arriving.landed.get(where.transfer)
        if arrays is None:
            if channel.over:
                why = channel.fault or "the link ended"
                raise PeerGone(f"the bytes of {peer.name}'s tensor did not all come: {why}")
            if where.transfer in channel.arriving.given_up:
                raise PeerGone(f"{peer.name} gave its tensor up before all bytes came: it closed its end")
            raise ProtocolError(
                f"transfer {where.transfer} of {peer.name} was taken already, or never announced"
            )
        if not 0 <= where.index < len(arrays) or arrays[where.index].nbytes != nbytes:
            raise ProtocolError(f"tensor {where.index} of transfer {where.transfer} has no {nbytes} bytes")
        return arrays[where.index]

    def is_ready(self, peer: Peer, handle: bytes) -> bool:
        channel = self._site().hub.channel(peer)
        try:
            return channel is None or channel.is_ready(decode_handle(handle).transfer)
        except ProtocolError:
            return True  # `open` will say so

    def progress(self, peer: Peer, handle: bytes) -> str:
        channel = self._site().hub.channel(peer)
        return "" if channel is None else channel.arriving.progress(decode_handle(handle).transfer)

    def taken(self, peer: Peer, handle: bytes) -> None:
        hub = self._site().hub
        channel = hub.channel(peer)
        try:
            nbytes = None if channel is None else channel.arriving.take(decode_handle(handle).transfer)
        except ProtocolError:
            return
        if channel is not None and nbytes:
            hub.tell(partial(hub.landing.taken, peer.link, nbytes), now=channel.arriving.waits_for_room)

    def fault(self, peer: Peer) -> str:
        return self._site().fault(peer)

    def drop(self, peer: Peer) -> None:
        self._site().hub.drop(peer)

    def statistics(self) -> dict[str, object]:
        return self._site().hub.statistics()

    def close(self) -> None:
        if self._own is not None:
            self._own.close()

    def _site(self) -> TcpOutbound:
        if self._outbound is None:
            self._outbound = self._own = TcpOutbound(self.config)
        return self._outbound


@contextmanager
def _told_why(channels: dict[Peer, Channel]) -> Iterator[None]:
    """A `Full` says what the other side told about its being late."""
    try:
        yield
    except Full as error:
        held = [f"{peer.name} says: {channel.held}" for peer, channel in channels.items() if channel.held]
        if not held:
            raise
        text = "; ".join([str(error), *held])
        raise Full(text, failed=error.failed) from error.__cause__


def _host(peer: Peer) -> str:
    """The host that the control link with a peer runs to, or listens at."""
    if not peer.address.startswith("tcp://"):
        return _LOOPBACK
    return peer.address.removeprefix("tcp://").rpartition(":")[0].strip("[]")


def _nothing() -> None:
    return


def _no_port(config: TransportConfig, error: OSError) -> str:
    """Why nobody can connect for the bytes, for a person."""
    why = os.strerror(error.errno) if error.errno else str(error)
    return f"cannot listen at a port for bulk connections (tcp_port {config.tcp_port}): {why}"
