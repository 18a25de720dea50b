"""One multiprocessing.shared_memory segment for each tensor: made, filled, announced, mapped and unlinked.

What SGLang does: the sender closes its own mapping as soon as it has copied, the reader maps the segment
privately, copy on write, and is the one who unlinks. In between nobody maps it, so the names begin with that
of the row's folder, by which the memory sampler knows them.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import weakref
from multiprocessing import resource_tracker, shared_memory
from pathlib import Path

import numpy as np
import torch

from bench import floor, links
from bench.peers.bodies import join, split

_SHM = Path("/dev/shm")


class SegmentLink:
    """Names travel in the message, over zmq PAIR."""

    def __init__(self, folder: Path, socket: floor.Pair) -> None:
        self._socket = socket
        self._names = (f"{folder.name}.{os.getpid()}.{number}" for number in itertools.count())

    def send(self, body: links.Body) -> None:
        """A fresh segment for each tensor, which only its name leads to when this returns."""
        head, tensors = split(body)
        names = [self._filled(tensor).encode() for tensor in tensors]
        self._socket.send_multipart([head, *names])

    def _filled(self, tensor: torch.Tensor) -> str:
        name = next(self._names)
        with contextlib.closing(
            shared_memory.SharedMemory(name=name, create=True, size=tensor.nbytes)
        ) as segment:
            # The reader unlinks it; Python's tracker would do so at exit, with a warning.
            resource_tracker.unregister(f"/{name}", "shared_memory")
            with open(_SHM / name, "r+b") as file:
                # Its pages are reserved first, as a full /dev/shm must not kill.
                os.posix_fallocate(file.fileno(), 0, tensor.nbytes)
            assert segment.buf is not None
            np.copyto(np.frombuffer(segment.buf, np.int64), tensor.numpy())
        return name

    def receive(self) -> links.Body:
        """Private mappings of the segments, which are unlinked when the last view of each is gone.

        SGLang unlinks when it has mapped: the memory is the same, and here the sampler sees it by its name.
        """
        head, *names = self._socket.recv_multipart()
        return join(head, [_mapped(_SHM / name.decode()) for name in names])

    def check_way(self) -> None:
        """There is one way only."""

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


def _mapped(path: Path) -> torch.Tensor:
    with path.open("r+b") as file:
        words = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), np.int64)
    weakref.finalize(words, path.unlink)
    return torch.from_numpy(words)


def open_near(folder: Path, way: str, *, nbytes: int, count: int) -> links.Link:
    """The end that binds."""
    return SegmentLink(folder, floor.pair(f"ipc://{folder}/near", bind=True))


def open_far(folder: Path, way: str, *, nbytes: int, count: int) -> links.Link:
    """The end that connects."""
    return SegmentLink(folder, floor.pair(f"ipc://{folder}/near", bind=False))
