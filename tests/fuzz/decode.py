"""What decoding makes of bytes: control messages, bodies, and the handles of every backend."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from tests.fuzz.draw import Draw
from transport import codec, message, registry
from transport.assembly import Assembly
from transport.backends.base import Bytes, Peer
from transport.config import TransportConfig
from transport.conformance import Request
from transport.errors import PeerGone, ProtocolError
from transport.message import Data, Part, Piece, Reference
from transport.specs import TensorSpec, view
from transport.tensors import source_of

_TYPES: tuple[Any, ...] = (
    Any,
    Request,
    dict[str, torch.Tensor],
    list[np.ndarray[Any, Any] | None],
    int,
    tuple[bytes, str],
)
_BACKENDS = ("inline", "frames", "shm", "parts", "warp")
_DTYPES = ("torch.uint8", "torch.bfloat16", "|u1", "<f4", "<U9", "<M8[ns]", "object", "|O", "<U999999999", "")
_CONFIG = TransportConfig(
    backend="shm", ring_bytes=1 << 16, max_tensors=8, max_readers=2, max_message_bytes=4096
)


class Decode:
    """A reader of a real ring opens what is right, or says `ProtocolError` or `PeerGone`."""

    def __init__(self, folder: Path) -> None:  # it needs no address
        self._peer = Peer(1, "peer")
        self._outbound = registry.load("shm").outbound(_CONFIG)
        self._inbounds = registry.inbounds(_CONFIG)
        ring = self._inbounds["shm"]
        proof = ring.accept(self._peer, self._outbound.offer(self._peer), "reader")
        assert self._outbound.admit(self._peer, proof) == ""
        ring.settle(self._peer, "")
        self._bytes = np.arange(1, 201, dtype=np.uint8)
        source = source_of(self._bytes)
        assert source is not None
        self._parcel = self._outbound.put([source], [self._peer], timeout=0, poll=lambda: None)
        ((_, self._handle),) = self._parcel.load(self._peer).handles

    def close(self) -> None:
        self._parcel.release(self._peer)
        for inbound in self._inbounds.values():
            inbound.close()
        self._outbound.close()

    def seeds(self) -> list[bytes]:
        """Inputs to begin with: every kind, right as it would be."""
        references = [Reference(TensorSpec("|u1", (200,)), "shm", msgspec.Raw(self._handle))]
        body = codec.encode({"id": "a", "pixels": self._bytes, "grid": [1, 2]}).body
        piece = Piece(0, 0, 200, "shm", msgspec.Raw(self._handle))
        frames: list[message.Control] = [Data(1, 1, 0, body, references), Part(1, 1, 0, [200], [piece])]
        return [
            *(b"\0" + message.encode(frame) for frame in frames),
            *(bytes((1, kind)) + body for kind in range(len(_TYPES))),
            bytes((2, 0, 0)),
            bytes((3, 2, 0)),
        ]

    def __call__(self, data: bytes) -> None:
        kind, rest = data[:1], data[1:]
        with suppress(ProtocolError, PeerGone):
            match (kind or b"\0")[0] % 4:
                case 0:
                    self._message(rest)
                case 1:
                    codec.decode(rest[1:], [self._bytes], _TYPES[(rest or b"\0")[0] % len(_TYPES)])
                case 2:
                    self._ring_handle(Draw(rest))
                case 3:
                    self._reference(Draw(rest))

    def _message(self, frame: bytes) -> None:
        came = message.decode(frame)
        assert message.decode(message.encode(came)) == came
        if isinstance(came, Data):
            tensors = [self._open(reference, []) for reference in came.tensors[:8]]
            codec.decode(came.body, tensors)
        elif isinstance(came, Part):
            assembly = Assembly(came.sizes, _CONFIG)
            for piece in came.pieces[:8]:
                assembly.check(piece)
                assembly.write(piece, 0, self._fetch(piece.backend, bytes(piece.handle), piece.nbytes, []))
                assembly.came(piece)

    def _open(self, reference: Reference, frames: list[Bytes]) -> object:
        reference.spec.check()
        if reference.spec.nbytes > _CONFIG.max_message_bytes:
            raise ProtocolError("too large")
        array = self._fetch(reference.backend, bytes(reference.handle), reference.spec.nbytes, frames)
        tensor = view(array, reference.spec)
        assert tuple(tensor.shape) == reference.spec.shape
        return tensor

    def _fetch(self, backend: str, handle: bytes, nbytes: int, frames: list[Bytes]) -> Bytes:
        """As much as was asked for; what comes out of the ring lies inside of the one record there is."""
        inbound = self._inbounds.get(backend)
        if inbound is None:
            raise ProtocolError("no such backend")
        array = inbound.open(self._peer, handle, nbytes, frames)
        assert array.nbytes == nbytes
        if backend == "shm" and nbytes:
            start = int(array[0]) - 1
            assert np.array_equal(array, self._bytes[start : start + nbytes])
        return array

    def _ring_handle(self, draw: Draw) -> None:
        """The fields of a handle, each right or not."""
        fields = msgspec.msgpack.decode(self._handle)
        for _ in range(draw.byte() % 4):
            fields[draw.byte() % len(fields)] = draw.number()
        nbytes = max(0, fields[6]) if draw.chance(2) else draw.word()
        handle = msgspec.msgpack.encode(fields)
        self._fetch("shm", draw.spoilt(handle) if draw.chance(4) else handle, nbytes, [])

    def _reference(self, draw: Draw) -> None:
        """A tensor's name, shape and place, each of its own."""
        shape = tuple(draw.number() for _ in range(draw.byte() % 70))
        spec = TensorSpec(draw.pick(_DTYPES) if draw.chance(2) else draw.text(), shape)
        frames = [np.frombuffer(draw.take(40), np.uint8) for _ in range(draw.byte() % 3)]
        number = msgspec.msgpack.encode(draw.number())
        handle = draw.pick((self._handle, b"\0", b"\xc4\x01a", number, draw.take(40)))
        self._open(Reference(spec, draw.pick(_BACKENDS), msgspec.Raw(handle)), frames)
