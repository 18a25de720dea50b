"""What control messages carry of bulk connections: how one is made, and which tensor came over it."""

from __future__ import annotations

import struct
import zlib

import msgspec

from transport.errors import ProtocolError


class Terms(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """An offer or the answer to one: what its sender takes at once, and how it is known.

    port: where to dial; 0: who gets it listens. token: the secret to show there. certificate: with TLS.
    """

    limit: int
    port: int
    token: bytes
    certificate: bytes


class Handle(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One tensor of a transfer; `check` tells a handle that was changed on its way."""

    transfer: int
    index: int
    check: int


_terms = msgspec.msgpack.Decoder(Terms)
_handles = msgspec.msgpack.Decoder(Handle)
_encode = msgspec.msgpack.Encoder().encode


def encode_terms(terms: Terms) -> bytes:
    """As the data of an offer or a proof."""
    return _encode(terms)


def decode_terms(data: bytes) -> Terms | None:
    """What `encode_terms` made; None for anything else, or what cannot be."""
    try:
        terms = _terms.decode(data)
    except msgspec.DecodeError:
        return None
    return terms if 0 < terms.limit < 1 << 63 and 0 <= terms.port < 1 << 16 else None


def encode_handle(transfer: int, index: int) -> bytes:
    """The handle of a tensor of a transfer."""
    return _encode(Handle(transfer, index, _check(transfer, index)))


def decode_handle(handle: bytes) -> Handle:
    """What `encode_handle` made; `ProtocolError` for anything else."""
    try:
        where = _handles.decode(handle)
    except msgspec.DecodeError as error:
        raise ProtocolError(f"a bulk handle is not one: {error}") from error
    if not (0 < where.transfer < 1 << 63 and 0 <= where.index < 1 << 31):
        raise ProtocolError(f"tensor {where.index} of transfer {where.transfer}")
    if where.check != _check(where.transfer, where.index):
        raise ProtocolError("a bulk handle does not fit its checksum")
    return where


def _check(transfer: int, index: int) -> int:
    return zlib.crc32(struct.pack("<QI", transfer, index))
