"""The frames of a bulk connection: a header of 40 bytes, then its body; header and body have a checksum.

    sender                     receiver
    ANNOUNCE 7, sizes    →
                         ←     HELD 7, why                    while there is no room
                         ←     GRANT 7, tensor, byte          there is, for all of it: credit
    CHUNK 7, tensor, byte, bytes …  →
                         ←     LANDED 7                       whole and checked
    CANCEL 7             →                                    its message will not come, or was taken

On a new connection the sender announces everything that lives again, then says ONLY 7: nothing else up to
7 does. Credit names the place from which to go on.

Transfers to several peers of one host: see `transport.bulk.crossing`; what comes before that, by the numbers
that the sender's links with them have:

    sender                     leader, follower
    INVITE f, its name   →     leader
                         ←     INVITED f, offer               of its ring; empty: none
    OFFER l, offer       →     follower
                         ←     PROOF l, proof                 that it maps that ring; empty: it does not
    ADMIT f, proof       →     leader
                         ←     ADMITTED f, whether
    SETTLED l, whether   →     follower
    LEFT f or l          →     the other one                  that link has ended

A transfer is the tensors of one message, or of one numbered part of it, for one peer. Transfers of a
link are numbered from 1 and granted in that order.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, replace
from enum import IntEnum

import numpy as np

from transport.backends.base import Bytes

CHUNK_BYTES = (
    1 << 20
)  # of a chunk, a tensor's last excepted: the unit of checking, and what a small frame waits for
MAX_TEXT = 500
HANDLE_BYTES = 100  # at most, of a tensor in a neighbour's ring

_HEADER = struct.Struct("<B3xIQQQI")
_CHECK = struct.Struct("<I")
HEADER_BYTES = _HEADER.size + _CHECK.size
_ROW_BYTES = 4096
_ROW = _ROW_BYTES // 8  # words
_AT_ONCE = 64  # rows; adding fewer is mostly calls


class Kind(IntEnum):
    """What a frame says."""

    ANNOUNCE = 1
    HELD = 2
    GRANT = 3
    CHUNK = 4
    LANDED = 5
    CANCEL = 6
    ONLY = 7
    PLACED = 8
    LET_GO = 9
    INVITE = 10
    INVITED = 11
    OFFER = 12
    PROOF = 13
    ADMIT = 14
    ADMITTED = 15
    SETTLED = 16
    LEFT = 17


@dataclass(frozen=True, slots=True)
class Frame:
    """A header. index, start: a tensor of the transfer and a byte of it. nbytes, checksum: of the body."""

    kind: Kind
    transfer: int
    index: int = 0
    start: int = 0
    nbytes: int = 0
    checksum: int = 0


class Damaged(Exception):
    """What came is not what was sent, or never was a frame."""


def encode(frame: Frame) -> bytes:
    """The header of a frame."""
    header = _HEADER.pack(frame.kind, frame.index, frame.transfer, frame.start, frame.nbytes, frame.checksum)
    return header + _CHECK.pack(zlib.crc32(header))


def decode(header: bytes | bytearray) -> Frame:
    """`Damaged` unless these bytes are the header of a frame."""
    (check,) = _CHECK.unpack_from(header, _HEADER.size)
    if zlib.crc32(memoryview(header)[: _HEADER.size]) != check:
        raise Damaged("a header does not fit its checksum")
    kind, index, transfer, start, nbytes, checksum = _HEADER.unpack_from(header)
    try:
        return Frame(Kind(kind), transfer, index, start, nbytes, checksum)
    except ValueError as error:
        raise Damaged(f"there is no kind of frame {kind}") from error


def with_body(frame: Frame, body: bytes) -> bytes:
    """A frame that carries a few bytes of its own."""
    check = checksum(np.frombuffer(body, np.uint8)) if body else 0
    return encode(replace(frame, nbytes=len(body), checksum=check)) + body


def checksum(data: Bytes) -> int:
    """Of the bytes of a chunk, uint8 [n]: the CRC-32 of the sum of its rows of 4 KiB, and of the rest.

    Any change within one word of 8 bytes shows, and any other with a probability of 1 - 2^-32, unless
    changes in different rows cancel each other. It runs at the speed of memory; CRC-32 of every byte,
    at 1.1 GB/s, would be slower than the network.
    """
    return Checksum(data).value()


class Checksum:
    """The same of bytes that are still coming: `upto` takes in what has come while it is in the cache."""

    __slots__ = ("_data", "_done", "_rows", "_sum")

    def __init__(self, data: Bytes) -> None:
        self._data = data
        self._rows = data[: data.nbytes // _ROW_BYTES * _ROW_BYTES].view(np.uint64).reshape(-1, _ROW)
        self._done = 0
        self._sum = np.zeros(_ROW, np.uint64)

    def upto(self, nbytes: int) -> None:
        """The first `nbytes` bytes have come."""
        rows = nbytes // _ROW_BYTES
        if rows - self._done >= _AT_ONCE:
            self._add(rows)

    def value(self) -> int:
        """All have come: their checksum."""
        if self._done < len(self._rows):
            self._add(len(self._rows))
        rest = self._data[self._rows.nbytes :].data
        return zlib.crc32(rest, zlib.crc32(self._sum.data) if self._done else 0)

    def _add(self, rows: int) -> None:
        self._sum += np.add.reduce(self._rows[self._done : rows], axis=0)
        self._done = rows
