"""What there was before: the floor, pickle over zmq, and tensors as zmq frames that zmq does not copy."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import zmq

from bench import floor, links
from bench.peers.bodies import join, split, vector

_POLL = 0.01


class ZeroCopyLink:
    """Tensors as frames of their own behind the head, zero copy on both ends, over zmq PAIR."""

    def __init__(self, socket: floor.Pair) -> None:
        self._socket = socket

    def send(self, body: links.Body) -> None:
        """Hand the tensors' own memory to zmq (it copies what is below 64 KiB); it keeps them until sent."""
        head, tensors = split(body)
        self._socket.send_multipart([head, *(tensor.numpy().data for tensor in tensors)], copy=False)

    def receive(self) -> links.Body:
        """Tensors over zmq's own buffers."""
        head, *frames = self._socket.recv_multipart(copy=False)
        return join(head.buffer, [vector(frame.buffer) for frame in frames])

    def check_way(self) -> None:
        """There is one way only."""

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


class FloorLink(ZeroCopyLink):
    """One tensor copied into one warm place that both processes map; zmq carries the head."""

    def __init__(self, socket: floor.Pair, place: np.ndarray) -> None:
        super().__init__(socket)
        self._place = place

    def send(self, body: links.Body) -> None:
        """Copy, then ring."""
        head, tensors = split(body)
        for tensor in tensors:
            np.copyto(self._place[: tensor.numel()], tensor.numpy())
        self._socket.send_multipart([head, b"%d" % sum(tensor.numel() for tensor in tensors)])

    def receive(self) -> links.Body:
        """The head, and the tensor where it lies."""
        head, words = self._socket.recv_multipart()
        return join(head, [vector(self._place[: int(words)])] if int(words) else [])


def open_near(folder: Path, way: str, *, nbytes: int, count: int) -> links.Link:
    """The end that binds."""
    if way == "pickle":
        return links.PickleLink(folder, bind=True)
    if way == "floor":
        place = floor.create_mapping(folder, nbytes)
        return FloorLink(floor.pair(f"ipc://{folder}/near", bind=True), place)
    if way == "zmq tcp":
        socket = floor.pair("tcp://127.0.0.1:*", bind=True)
        leave(folder, "address", socket.getsockopt(zmq.LAST_ENDPOINT))
        return ZeroCopyLink(socket)
    return ZeroCopyLink(floor.pair(f"ipc://{folder}/near", bind=True))


def open_far(folder: Path, way: str, *, nbytes: int, count: int) -> links.Link:
    """The end that connects."""
    if way == "pickle":
        return links.PickleLink(folder, bind=False)
    if way == "floor":
        wait_for(folder, "floor.mapping")
        return FloorLink(floor.pair(f"ipc://{folder}/near", bind=False), floor.attach_mapping(folder))
    address = f"ipc://{folder}/near" if way == "zmq ipc" else wait_for(folder, "address").read_text()
    return ZeroCopyLink(floor.pair(address, bind=False))


def leave(folder: Path, name: str, content: object) -> None:
    """Write a file that the other end waits for."""
    text = content.decode().rstrip("\0") if isinstance(content, bytes) else str(content)
    draft = folder / f"{name}.draft"
    draft.write_text(text)
    draft.rename(folder / name)


def wait_for(folder: Path, name: str) -> Path:
    """Until the other end has left a file; TimeoutError after `floor.TIMEOUT`."""
    deadline = time.monotonic() + floor.TIMEOUT
    while not (folder / name).exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"the near end did not leave {name} in {floor.TIMEOUT:g} s")
        time.sleep(_POLL)
    return folder / name
