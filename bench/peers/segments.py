"""One multiprocessing.shared_memory segment for each tensor, made, filled, announced, mapped and unlinked.

What SGLang does: the reader maps it privately, copy on write, and is the one who unlinks.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections import deque
from multiprocessing import resource_tracker, shared_memory
from pathlib import Path

import numpy as np
import torch

from bench import floor, links
from bench.peers.bodies import join, split

_SHM = Path("/dev/shm")


class SegmentLink:
    """Names travel in the message, over zmq PAIR."""

    def __init__(self, socket: floor.Pair) -> None:
        self._socket = socket
        # Kept mapped until answered, so that the memory sampler can tell whose they are.
        self._outstanding: deque[list[shared_memory.SharedMemory]] = deque()

    def send(self, body: links.Body) -> None:
        """A fresh segment for each tensor: its pages are reserved first, as a full /dev/shm must not kill."""
        head, tensors = split(body)
        segments = [self._filled(tensor) for tensor in tensors]
        self._outstanding.append(segments)
        self._socket.send_multipart([head, *(segment.name.encode() for segment in segments)])

    def _filled(self, tensor: torch.Tensor) -> shared_memory.SharedMemory:
        segment = shared_memory.SharedMemory(create=True, size=tensor.nbytes)
        # The reader unlinks it; Python's tracker would do so at exit, with a warning.
        resource_tracker.unregister(f"/{segment.name.lstrip('/')}", "shared_memory")
        with open(_SHM / segment.name.lstrip("/"), "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, tensor.nbytes)
        assert segment.buf is not None
        np.copyto(np.frombuffer(segment.buf, np.int64), tensor.numpy())
        return segment

    def receive(self) -> links.Body:
        """Private mappings of the segments, which are unlinked when the last view of each is gone."""
        head, *names = self._socket.recv_multipart()
        body = join(head, [_mapped(_SHM / name.decode().lstrip("/")) for name in names])
        if self._outstanding:
            for segment in self._outstanding.popleft():
                segment.close()
        return body

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
    return SegmentLink(floor.pair(f"ipc://{folder}/near", bind=True))


def open_far(folder: Path, way: str, *, nbytes: int, count: int) -> links.Link:
    """The end that connects."""
    return SegmentLink(floor.pair(f"ipc://{folder}/near", bind=False))
