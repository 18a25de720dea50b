"""The bytes that benchmarks send: a stamp checked in every message, checksums over all of it beside.

A payload is an int64 array. Its first, middle and last word are the stamp: the number of the message. Every
message's stamp is checked at the far end; the CRC-32 of every byte only in messages that are not timed, since
it takes longer than the transfer.
"""

from __future__ import annotations

import mmap
import zlib

import numpy as np
from numpy.typing import NDArray

from bench.part import WrongAnswerError

Words = NDArray[np.int64]

_SPREAD = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio: neighbours land far apart


def pages(nbytes: int) -> Words:
    """Memory that begins with a page and is there already: where the kernel copies fastest."""
    words: Words = np.frombuffer(mmap.mmap(-1, nbytes), np.int64)
    words.fill(-1)
    return words


def fill(words: Words, seed: int) -> None:
    """Fill in place with bytes that differ from page to page and from seed to seed."""
    words.fill(seed * _SPREAD % (1 << 63))
    words[::512] += np.arange(len(words[::512]), dtype=np.int64)


def stamp(words: Words, number: int) -> None:
    """Write the number of the message where `check_stamp` looks."""
    words[0] = words[len(words) // 2] = words[-1] = number


def check_stamp(words: Words, number: int) -> None:
    """`WrongAnswerError` unless this is the payload of message `number`."""
    found = (int(words[0]), int(words[len(words) // 2]), int(words[-1]))
    if found != (number, number, number):
        raise WrongAnswerError(f"message {number} carries the stamps {found}")


def checksum(words: Words) -> int:
    """CRC-32 of every byte."""
    return zlib.crc32(words.view(np.uint8).data)


def check(words: Words, number: int, expected: int) -> None:
    """`WrongAnswerError` unless every byte is as it was sent."""
    found = checksum(words)
    if found != expected:
        raise WrongAnswerError(f"message {number}: checksum {found:08x}, not {expected:08x}")


def fold(words: Words) -> int:
    """A checksum of every word at the speed of memory: their sum, and the first of each page by its place.

    Weaker than `checksum` (it misses changes within a page that cancel out), for where it is timed.
    """
    firsts = words[::512]
    places = np.arange(1, len(firsts) + 1, dtype=np.int64)
    return (int(words.sum()) * _SPREAD + int((firsts * places).sum())) % (1 << 64)


def check_fold(words: Words, number: int, expected: int) -> None:
    """`WrongAnswerError` unless `fold` is as it was where it was sent."""
    found = fold(words)
    if found != expected:
        raise WrongAnswerError(f"message {number}: fold {found:x}, not {expected:x}")
