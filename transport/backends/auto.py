"""`auto`, itself an outbound: for each tensor and peer the way that is best and proved.

Below `inline_below` inline; else shared memory for peers that proved to map the ring; else frames. A
ring that stays full for `detour_after` seconds is passed by with frames, within the budget, and every
such detour is counted with its reason.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence

from transport.backends.base import Bytes, Held, Load, Outbound, Parcel, Peer, Poll, Proof, Refusal
from transport.backends.budget import Budget
from transport.backends.cuda import CudaOutbound
from transport.backends.frames import FramesOutbound
from transport.backends.inline import InlineOutbound
from transport.backends.shm import ShmOutbound
from transport.config import TransportConfig
from transport.errors import Full, TooLarge, TransportError, detached
from transport.tensors import Source

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
    """Chooses among inline, shm and frames. One budget serves all that goes outside the ring."""

    name = "auto"
    reads = "shm"

    def __init__(self, config: TransportConfig) -> None:
        super().__init__(config)
        self.budget = Budget(config.detour_bytes)
        self._inline = InlineOutbound(config, self.budget)
        self.shm = ShmOutbound(config)
        self._cuda = CudaOutbound(self.shm)
        self._frames = FramesOutbound(config, self.budget)
        self._detours: Counter[str] = Counter()
        self._detour_bytes: Counter[str] = Counter()
        self._sent: Counter[str] = Counter()
        self._inline_room = min(config.inline_bytes, config.max_control_bytes // 2)
        self._said = False
        self._lock = threading.Lock()

    def wants_offer(self, peer: Peer, sizes: Sequence[int]) -> bool:
        return self.shm.wants_offer(peer, sizes) and bool(self._split(sizes)[1])

    def offer(self, peer: Peer) -> bytes:
        try:
            return self.shm.offer(peer)
        except Full as error:
            if not self._said:
                self._said = True
                _log.warning("going on without shared memory: %s", error)
            raise

    def admit(self, peer: Peer, answer: Proof | Refusal) -> str:
        return self.shm.admit(peer, answer)

    def limit(self, peer: Peer) -> int:
        return (self.shm if self.shm.admitted(peer) else self._frames).limit(peer)

    def lend(self, nbytes: int, timeout: float, poll: Poll) -> Bytes | None:
        try:
            return self.shm.lend(nbytes, min(timeout, self.config.detour_after), poll)
        except (Full, TooLarge) as error:
            self._count_detour(f"loan: {_kind(error)}", nbytes)
            return None

    def put(
        self, sources: Sequence[Source], readers: Sequence[Peer], *, timeout: float, poll: Poll
    ) -> Parcel:
        deadline = time.monotonic() + timeout
        small, large = self._split([source.nbytes for source in sources])
        parcel = AutoParcel(len(sources))
        self._put_part(parcel, self._inline, sources, small, readers, deadline, poll)
        try:
            large = self._put_on_device(parcel, sources, large, readers, deadline, poll)
            if large:
                self._put_large(parcel, sources, large, readers, deadline, poll)
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
        deadline: float,
        poll: Poll,
    ) -> None:
        """Through the ring for whom it is proved, the rest and the late ones by frames."""
        mapped = [reader for reader in readers if self.shm.admitted(reader)]
        others = {reader: self.shm.explain(reader) for reader in readers if reader not in mapped}
        nbytes = sum([sources[index].nbytes for index in large])
        patience = min(deadline, time.monotonic() + self.config.detour_after)
        if nbytes > self.config.detour_bytes:
            patience = deadline  # there is no other way, not even later
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
        timeout = max(0.0, deadline - time.monotonic())
        parcel.add(outbound.put(chosen, readers, timeout=timeout, poll=poll), indices, readers)
        with self._lock:
            self._sent[outbound.name] += sum([source.nbytes for source in chosen])

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
        reason = self.shm.explain(peer)
        return reason if self.shm.admitted(peer) else f"frames; {reason}"

    def alive(self, peer: Peer) -> bool | None:
        return self.shm.alive(peer)

    def held(self, peer: Peer) -> Held | None:
        return self.shm.held(peer)

    def drop(self, peer: Peer) -> None:
        self.shm.drop(peer)

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
            }

    def close(self) -> None:
        self.shm.close()


def _kind(error: TransportError) -> str:
    """The reason of a detour in a few words, so that equal reasons count together."""
    cause = error.__cause__
    what = getattr(cause, "what", "")
    return f"ring full ({what})" if what else type(cause).__name__ if cause else type(error).__name__
