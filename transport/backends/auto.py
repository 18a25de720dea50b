"""`auto`, itself an outbound: for each tensor and peer the way that is best and proved.

Below `inline_below` inline; else the first of the candidates that serves the peer: shared memory where
it proved to map the ring, bulk connections to where it is reached over TCP; else frames. A ring that
stays full for `detour_after` seconds is passed by with frames, within the budget, and every such detour
is counted with its reason.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress

from transport.backends.base import Bytes, Held, Load, Outbound, Parcel, Peer, Poll, Proof, Refusal
from transport.backends.budget import Budget
from transport.backends.cuda import CudaOutbound
from transport.backends.frames import FramesOutbound
from transport.backends.inline import InlineOutbound
from transport.backends.shm import ShmOutbound
from transport.backends.tcp import TcpOutbound
from transport.config import TransportConfig
from transport.errors import Full, TooLarge, TransportError, detached
from transport.tensors import Source, source_of

_log = logging.getLogger("tensorferry.transport")


class AutoParcel(Parcel):
    """Parts of one message that went different ways, put together again for each reader."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._parts: list[tuple[Parcel, list[int], set[Peer]]] = []
        self.failed: Mapping[Peer, TransportError] = {}

    def add(self, parcel: Parcel, indices: list[int], readers: Sequence[Peer]) -> None:
        """`parcel` holds the tensors `indices` for `readers`."""
        self._parts.append((parcel, indices, set(readers)))

    def alone(self) -> Parcel:
        """The one parcel that holds everything, where there is one, else this."""
        if len(self._parts) == 1 and not self.failed:
            parcel, indices, _ = self._parts[0]
            if len(indices) == self._count:
                return parcel
        return self

    def load(self, reader: Peer) -> Load:
        handles: list[tuple[str, bytes]] = [("", b"")] * self._count
        frames: list[Bytes] = []
        for parcel, indices, readers in self._parts:
            if reader in readers:
                load = parcel.load(reader)
                frames += load.frames  # one part at most has frames, so that their numbers stay
                for index, handle in zip(indices, load.handles, strict=True):
                    handles[index] = handle
        return Load(handles, frames)

    def release(self, reader: Peer) -> None:
        for parcel, _, readers in self._parts:
            if reader in readers:
                parcel.release(reader)

    def fill(self) -> None:
        for parcel, _, _ in self._parts:  # of which one at most has something left
            parcel.fill()

    def abandon(self) -> None:
        for parcel, _, _ in self._parts:
            parcel.abandon()


class AutoOutbound(Outbound):
    """Chooses among inline, shm, tcp and frames. One budget serves all that goes outside the ring."""

    name = "auto"

    def __init__(self, config: TransportConfig) -> None:
        super().__init__(config)
        self.budget = Budget(config.detour_bytes)
        self._inline = InlineOutbound(config, self.budget)
        self.shm = ShmOutbound(config)
        self._cuda = CudaOutbound(self.shm)
        self.tcp = TcpOutbound(config, self.shm, self.budget)
        self._frames = FramesOutbound(config, self.budget)
        self._asked: dict[Peer, Outbound] = {}  # what was offered last
        self._detours: Counter[str] = Counter()
        self._detour_bytes: Counter[str] = Counter()
        self._sent: Counter[str] = Counter()
        self._inline_room = min(config.inline_bytes, config.max_control_bytes // 2)
        self._said = False
        self._lock = threading.Lock()

    def wants_offer(self, peer: Peer, sizes: Sequence[int]) -> bool:
        if self.shm.serves(peer):  # the first of the candidates
            return False
        _, large = self._split(sizes)
        return bool(large) and self._wanting(peer, [sizes[index] for index in large]) is not None

    def reads(self, peer: Peer) -> str:
        return (self._wanting(peer, [self.config.max_message_bytes]) or self).name

    def offer(self, peer: Peer) -> bytes:
        way = self._asked[peer] = self._wanting(peer, [self.config.max_message_bytes]) or self.shm
        try:
            return way.offer(peer)
        except Full as error:
            if way is self.shm and not self._said:
                self._said = True
                _log.warning("going on without shared memory: %s", error)
            raise

    def admit(self, peer: Peer, answer: Proof | Refusal) -> str:
        return self._asked.get(peer, self.shm).admit(peer, answer)

    def _candidates(self, peer: Peer) -> list[Outbound]:
        """What may serve a peer once it has proved something, the best first."""
        return [self.shm, self.tcp] if peer.address.startswith("tcp://") else [self.shm]

    def _way(self, peer: Peer) -> Outbound:
        """What serves a peer now."""
        return next((way for way in self._candidates(peer) if way.serves(peer)), self._frames)

    def _wanting(self, peer: Peer, sizes: Sequence[int]) -> Outbound | None:
        """The best candidate whose proof is to come, where none serves the peer yet."""
        for way in self._candidates(peer):
            if way.serves(peer):
                return None
            if way.wants_offer(peer, sizes):
                return way
        return None

    def limit(self, peer: Peer) -> int:
        return self._way(peer).limit(peer)

    def lend(self, nbytes: int, timeout: float, poll: Poll) -> Bytes | None:
        try:
            return self.shm.lend(nbytes, min(timeout, self.config.detour_after), poll)
        except (Full, TooLarge) as error:
            self._count_detour(f"loan: {_kind(error)}", nbytes)
            return None

    def put(
        self, sources: Sequence[Source], readers: Sequence[Peer], *, timeout: float, poll: Poll
    ) -> Parcel:
        now = time.monotonic()
        deadline = now + timeout
        small, large = self._split([source.nbytes for source in sources])
        # Until when the ring is waited for: beyond what the detour may hold there is no other way, ever.
        nbytes = sum([sources[index].nbytes for index in large])
        patience = (
            deadline if nbytes > self.config.detour_bytes else min(deadline, now + self.config.detour_after)
        )
        if not small and self._is_for_ring_alone(sources, readers):
            with suppress(Full, TooLarge):  # the general way finds out once more, and for whom it is not
                return self._put_by(self.shm, sources, readers, patience, poll)
        parcel = AutoParcel(len(sources))
        self._put_part(parcel, self._inline, sources, small, readers, deadline, poll)
        try:
            large = self._put_on_device(parcel, sources, large, readers, deadline, poll)
            if large:
                self._put_large(parcel, sources, large, readers, (patience, deadline), poll)
        except BaseException:
            parcel.abandon()
            for reader in readers:
                parcel.release(reader)
            raise
        return parcel.alone()

    def _put_on_device(
        self,
        parcel: AutoParcel,
        sources: Sequence[Source],
        large: list[int],
        readers: Sequence[Peer],
        deadline: float,
        poll: Poll,
    ) -> list[int]:
        """Leave on the GPU what all readers can read there; the others."""
        there = [index for index in large if self._cuda.takes(sources[index], readers)]
        if there:
            try:
                self._put_part(parcel, self._cuda, sources, there, readers, deadline, poll)
            except Full:
                self._count_detour("GPU pool full", sum(sources[index].nbytes for index in there))
            else:
                return [index for index in large if index not in there]
        return large

    def _put_large(
        self,
        parcel: AutoParcel,
        sources: Sequence[Source],
        large: list[int],
        readers: Sequence[Peer],
        until: tuple[float, float],
        poll: Poll,
    ) -> None:
        """Each reader by what serves it; those of the ring that are late by frames.

        until: when the ring is given up, and when all is.
        """
        patience, deadline = until
        groups: dict[Outbound, list[Peer]] = {}
        for reader in readers:
            groups.setdefault(self._way(reader), []).append(reader)
        if len(groups.keys() - {self._frames}) > 1:
            sources = self._copied_once(sources, large, deadline, poll)
        others = {reader: self._why_frames(reader) for reader in groups.pop(self._frames, ())}
        mapped = groups.pop(self.shm, [])
        nbytes = sum(sources[index].nbytes for index in large)
        for way, group in groups.items():
            self._put_part(parcel, way, sources, large, group, deadline, poll)
        full: TransportError | None = None
        while mapped:
            try:
                self._put_part(parcel, self.shm, sources, large, mapped, patience, poll)
                break
            except (Full, TooLarge) as error:
                late = [r for r in mapped if not isinstance(error, Full) or r.name in error.failed] or mapped
                others |= dict.fromkeys(late, _kind(error))
                full = detached(error)
                mapped = [reader for reader in mapped if reader not in late]
        if not others:
            return
        try:
            self._put_part(parcel, self._frames, sources, large, list(others), deadline, poll)
        except (Full, TooLarge) as error:
            # That the detour is too narrow is no reason for `TooLarge` where only the ring is full for now.
            reason = detached(full if full is not None and isinstance(error, TooLarge) else error)
            try:
                if not mapped:
                    raise reason
                parcel.failed = dict.fromkeys(others, reason)
                return
            finally:
                full = None
                del reason
        for why in others.values():
            self._count_detour(why, nbytes)

    def _copied_once(
        self, sources: Sequence[Source], large: list[int], deadline: float, poll: Poll
    ) -> Sequence[Source]:
        """The sources, the large ones out of the ring if it has room: every way finds them there."""
        patience = min(deadline, time.monotonic() + self.config.detour_after)
        sizes = [sources[index].nbytes for index in large]
        try:
            arrays = self.shm.lend_all(sizes, max(0.0, patience - time.monotonic()), poll)
        except (Full, TooLarge):
            return sources
        copied = list(sources)
        try:
            for index, array in zip(large, arrays, strict=True):
                sources[index].fill(array, threads=self.config.threads)
                source = source_of(array)
                assert source is not None  # it is an array
                copied[index] = source
        except BaseException:
            arrays.clear()  # the traceback keeps this frame, which must not keep the room
            copied.clear()
            raise
        return copied

    def _why_frames(self, peer: Peer) -> str:
        return "; ".join(way.explain(peer) for way in self._candidates(peer))

    def _put_part(
        self,
        parcel: AutoParcel,
        outbound: Outbound | CudaOutbound,
        sources: Sequence[Source],
        indices: list[int],
        readers: Sequence[Peer],
        deadline: float,
        poll: Poll,
    ) -> None:
        if not indices:
            return
        chosen = [sources[index] for index in indices]
        parcel.add(self._put_by(outbound, chosen, readers, deadline, poll), indices, readers)

    def _put_by(
        self,
        outbound: Outbound | CudaOutbound,
        sources: Sequence[Source],
        readers: Sequence[Peer],
        deadline: float,
        poll: Poll,
    ) -> Parcel:
        timeout = max(0.0, deadline - time.monotonic())
        parcel = outbound.put(sources, readers, timeout=timeout, poll=poll)
        with self._lock:
            self._sent[outbound.name] += sum([source.nbytes for source in sources])
        return parcel

    def _is_for_ring_alone(self, sources: Sequence[Source], readers: Sequence[Peer]) -> bool:
        """The usual case: everybody maps the ring, and nothing could stay on a GPU."""
        serves, takes = self.shm.serves, self._cuda.takes
        return all(map(serves, readers)) and not any(takes(source, readers) for source in sources)

    def _split(self, sizes: Sequence[int]) -> tuple[list[int], list[int]]:
        """Which tensors travel inline and which do not, by index."""
        small: list[int] = []
        large: list[int] = []
        room, below = self._inline_room, self.config.inline_below
        for index, nbytes in enumerate(sizes):
            if not nbytes or (nbytes < below and nbytes <= room):
                room -= nbytes
                small.append(index)
            else:
                large.append(index)
        return small, large

    def _count_detour(self, reason: str, nbytes: int) -> None:
        with self._lock:
            self._detours[reason] += 1
            self._detour_bytes[reason] += nbytes

    def explain(self, peer: Peer) -> str:
        way = self._way(peer)
        if way is self._frames:
            return f"frames; {self._why_frames(peer)}"
        before = self._candidates(peer)[: self._candidates(peer).index(way)]
        return "; ".join([way.explain(peer), *(other.explain(peer) for other in before)])

    def alive(self, peer: Peer) -> bool | None:
        return self.shm.alive(peer)

    def held(self, peer: Peer) -> Held | None:
        return self.shm.held(peer)

    def fault(self, peer: Peer) -> str:
        return self.tcp.fault(peer)

    def drop(self, peer: Peer) -> None:
        self._asked.pop(peer, None)
        self.shm.drop(peer)
        self.tcp.drop(peer)

    def flush(self, timeout: float) -> bool:
        return self.tcp.flush(timeout)

    def part(self, name: str) -> Outbound | None:
        own = {way.name: way for way in (self, self._inline, self.shm, self.tcp, self._frames)}
        return own.get(name)

    def statistics(self) -> dict[str, object]:
        with self._lock:
            return {
                "nbytes": dict(self._sent),
                "detours": {
                    reason: {"messages": n, "nbytes": self._detour_bytes[reason]}
                    for reason, n in self._detours.items()
                },
                "shm": self.shm.statistics(),
                "cuda": self._cuda.statistics(),
                "tcp": self.tcp.statistics(),
            }

    def close(self) -> None:
        self.tcp.close()  # and the ring


def _kind(error: TransportError) -> str:
    """The reason of a detour in a few words, so that equal reasons count together."""
    cause = error.__cause__
    what = getattr(cause, "what", "")
    return f"ring full ({what})" if what else type(cause).__name__ if cause else type(error).__name__
