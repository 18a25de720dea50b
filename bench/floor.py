"""The floor: a bare copy into a warm mapping that both processes share, and a zmq round trip of 100 bytes.

Nothing that carries these bytes through shared memory with one copy and zmq as its doorbell can be faster,
unless it copies with more than one thread.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import TypeAlias

import numpy as np
import zmq

from bench import payload
from bench.payload import Words

Pair: TypeAlias = "zmq.Socket[bytes]"

TIMEOUT = 30.0
"""Seconds that anybody waits for the other end."""

_UNCHECKED = -1


def _note(checksum: int) -> bytes:
    """A message of 100 bytes, about what a handle takes on the wire."""
    return b"%100d" % checksum


def pair(address: str, *, bind: bool) -> Pair:
    """A zmq PAIR socket with bounded waits; its context belongs to the process."""
    socket: Pair = zmq.Context.instance().socket(zmq.PAIR)
    socket.linger = 1000
    socket.rcvtimeo = socket.sndtimeo = int(TIMEOUT * 1000)
    (socket.bind if bind else socket.connect)(address)
    return socket


def create_mapping(folder: Path, nbytes: int) -> Words:
    """Anonymous shared memory that `attach_mapping` of another process finds through `folder`."""
    descriptor = os.memfd_create("floor")
    os.truncate(descriptor, nbytes)
    # The descriptor stays open, so that the link leads to the memory for as long as this process lives.
    folder.joinpath("floor.mapping").symlink_to(f"/proc/{os.getpid()}/fd/{descriptor}")
    return np.frombuffer(mmap.mmap(descriptor, nbytes), np.int64)


def attach_mapping(folder: Path) -> Words:
    """The memory of `create_mapping`, read-only."""
    with folder.joinpath("floor.mapping").open("rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ), np.int64)


class Near:
    """The sending end: copies a payload to `destination` and waits until the far end has seen it."""

    def __init__(self, folder: Path, destination: Words) -> None:
        self._socket = pair(f"ipc://{folder}/floor", bind=True)
        self._destination = destination

    def round_trip(self, source: Words, checksum: int = _UNCHECKED) -> None:
        """What is timed: the copy, the doorbell, the answer. With `checksum` the far end checks it all."""
        np.copyto(self._destination, source)
        self.ring_bell(checksum)

    def ring_bell(self, checksum: int = _UNCHECKED) -> None:
        """The doorbell and the answer alone."""
        self._socket.send(_note(checksum))
        self._socket.recv()


class Far:
    """The receiving end: looks into the same memory and answers."""

    def __init__(self, folder: Path, source: Words) -> None:
        self._socket = pair(f"ipc://{folder}/floor", bind=False)
        self._source = source

    def answer(self, number: int) -> None:
        """Wait for payload `number`, check it, answer."""
        expected = int(self._socket.recv())
        payload.check_stamp(self._source, number)
        if expected != _UNCHECKED:
            payload.check(self._source, number, expected)
        self._socket.send(_note(number))

    def answer_bell(self) -> None:
        """Wait for a doorbell without a payload, answer."""
        self._socket.recv()
        self._socket.send(_note(_UNCHECKED))
