"""What the two sides of `shm` say to each other: handles of records, offers of a ring, proofs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import msgspec

import shm
from transport.config import TransportConfig


class RingHandle(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A record, and the part of it that is the tensor. early: it was sent before it was written."""

    segment: int
    slot: int
    generation: int
    offset: int
    nbytes: int
    start: int
    length: int
    early: bool = False


class RingOffer(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A column of the ring, for the peer to show that it maps it."""

    name: str
    column: int
    challenge: int
    device: bytes = b""  # what to read on the GPU that this process uses; see `transport.sharing`


class RingProof(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Beside the challenge in the column: whether records are read early, and what was read on the GPU."""

    follows: bool = False
    device: bytes = b""


handles = msgspec.msgpack.Decoder(RingHandle)
offers = msgspec.msgpack.Decoder(RingOffer)
proofs = msgspec.msgpack.Decoder(RingProof)
encode = msgspec.msgpack.Encoder().encode


# By the class of the error. What a peer is told has no name, path or size in it, and nothing that stands in
# a segment: whoever may offer a segment could read others by their names so.
_FOR_A_PEER: Mapping[type[BaseException], str] = {
    shm.SegmentMissing: "there is no such segment where it would be read (another host or container?)",
    shm.LayoutMismatch: "the segment is no ring of this version and this user",
    shm.RingFull: "it is full",
    shm.RecordTooLarge: "it is too small for this",
    shm.NoSpace: "memory is short where it would be read; the log there says which and how to get more",
}


def for_peer(error: BaseException) -> str:
    """Why a ring here is of no use, as a peer may hear it; the text of the error itself is for this side."""
    return _FOR_A_PEER.get(type(error)) or str(error)


def ring_trace(config: TransportConfig) -> Callable[[str, Mapping[str, object]], None] | None:
    trace = config.trace
    if trace is None:
        return None
    return lambda event, fields: trace(f"ring.{event}", time.monotonic_ns(), fields)
