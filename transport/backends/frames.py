"""The payload as zmq frames behind the control message: for any peer, bounded by `detour_bytes`."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from transport.backends.base import Bytes, Inbound, Load, Outbound, Parcel, Peer, Poll
from transport.backends.budget import Budget, CountedParcel
from transport.config import TransportConfig
from transport.errors import ProtocolError
from transport.tensors import Source

_decoder = msgspec.msgpack.Decoder(int)


class FramesOutbound(Outbound):
    """Copies each tensor once, into memory that zmq sends without a further copy here."""

    name = "frames"

    def __init__(self, config: TransportConfig, budget: Budget | None = None) -> None:
        super().__init__(config)
        self._budget = budget or Budget(config.detour_bytes)

    def limit(self, peer: Peer) -> int:
        # Half of the budget: one part is being read while the next is put.
        return max(1, self.config.detour_bytes // 2)

    def put(
        self, sources: Sequence[Source], readers: Sequence[Peer], *, timeout: float, poll: Poll
    ) -> Parcel:
        nbytes = sum(source.nbytes for source in sources)
        load = Load([])
        with self._budget.taken_for(readers, nbytes, timeout=timeout, poll=poll):
            for index, source in enumerate(sources):
                frame = np.empty(source.nbytes, np.uint8)
                source.fill(frame, threads=self.config.threads)
                load.handles.append((self.name, msgspec.msgpack.encode(index)))
                load.frames.append(frame)
        return CountedParcel(load, nbytes, self._budget)


class FramesInbound(Inbound):
    """The frame itself is the tensor's memory, the receiver's own."""

    name = "frames"

    def open(self, peer: Peer, handle: bytes, nbytes: int, frames: Sequence[Bytes]) -> Bytes:
        try:
            index = _decoder.decode(handle)
        except msgspec.DecodeError as error:
            raise ProtocolError(f"a frame handle is no number: {error}") from error
        if not 0 <= index < len(frames):
            raise ProtocolError(f"frame {index} of {len(frames)}")
        if frames[index].nbytes != nbytes:
            raise ProtocolError(f"frame {index} has {frames[index].nbytes} bytes where {nbytes} should be")
        return frames[index]
