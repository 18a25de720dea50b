"""The payload inside the control message: for small tensors, for any peer."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from transport.backends.base import Bytes, Inbound, Load, Outbound, Parcel, Peer, Poll
from transport.backends.budget import Budget, CountedParcel
from transport.config import TransportConfig
from transport.errors import ProtocolError
from transport.tensors import Source

_decoder = msgspec.msgpack.Decoder(bytes)


class InlineOutbound(Outbound):
    """Copies each tensor into its handle."""

    name = "inline"

    def __init__(self, config: TransportConfig, budget: Budget | None = None) -> None:
        super().__init__(config)
        self._budget = budget or Budget(config.detour_bytes)

    def limit(self, peer: Peer) -> int:
        # A quarter, so that the body, half at most, and the other fields of the control message have room.
        return max(1, min(self.config.max_control_bytes // 4, self.config.detour_bytes))

    def put(
        self, sources: Sequence[Source], readers: Sequence[Peer], *, timeout: float, poll: Poll
    ) -> Parcel:
        nbytes = sum([source.nbytes for source in sources])
        handles = []
        with self._budget.taken_for(readers, nbytes, timeout=timeout, poll=poll):
            for source in sources:
                buffer = np.empty(source.nbytes, np.uint8)
                source.fill(buffer)
                handles.append((self.name, msgspec.msgpack.encode(buffer.data)))
        return CountedParcel(Load(handles), nbytes, self._budget)


class InlineInbound(Inbound):
    """Reads the bytes out of the handle; they are the receiver's own."""

    name = "inline"

    def open(self, peer: Peer, handle: bytes, nbytes: int, frames: Sequence[Bytes]) -> Bytes:
        try:
            payload = _decoder.decode(handle)
        except msgspec.DecodeError as error:
            raise ProtocolError(f"an inline handle is not bytes: {error}") from error
        if len(payload) != nbytes:
            raise ProtocolError(f"an inline handle has {len(payload)} bytes where {nbytes} should be")
        return np.frombuffer(bytearray(payload), np.uint8)
