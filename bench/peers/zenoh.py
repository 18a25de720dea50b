"""zenoh with shared memory; in Python two copies into a shared buffer, through bytes, and one out of it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import zenoh
import zenoh.shm

from bench.floor import TIMEOUT
from bench.links import Body
from bench.peers.bodies import join, split, vector

_HELLO = b"hello"
_MIB = 1 << 20


class ZenohLink:
    """Two sessions linked directly over a unix socket, one key for each direction, one tensor in a body."""

    def __init__(self, folder: Path, out: str, into: str, nbytes: int, *, listens: bool) -> None:
        self._session = zenoh.open(_config(folder, listens=listens))
        self._provider = zenoh.shm.ShmProvider.default_backend(4 * nbytes + 16 * _MIB) if nbytes else None
        self._publisher = self._session.declare_publisher(
            f"tfbench/{out}", congestion_control=zenoh.CongestionControl.BLOCK
        )
        self._subscriber: Any = self._session.declare_subscriber(
            f"tfbench/{into}", zenoh.handlers.FifoChannel(256)
        )
        self._meet()

    def _meet(self) -> None:
        """Both ends call until they are heard: what is put before the other has subscribed is lost."""
        deadline = time.monotonic() + TIMEOUT
        while self._subscriber.try_recv() is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"nobody answered in {TIMEOUT:g} s")
            self._publisher.put(_HELLO)
            time.sleep(0.02)
        self._publisher.put(_HELLO)

    def send(self, body: Body) -> None:
        """The tensor as payload in shared memory, the head as attachment."""
        head, tensors = split(body)
        if not tensors:
            self._publisher.put(b"", attachment=head)
            return
        (tensor,) = tensors
        assert self._provider is not None
        policy = zenoh.shm.BlockOn(zenoh.shm.GarbageCollect())
        buffer = self._provider.alloc(tensor.nbytes, policy=policy)
        buffer[:] = tensor.numpy().tobytes()
        self._publisher.put(buffer, attachment=head)

    def receive(self) -> Body:
        """The next that is no hello; zenoh has no time-out here, the harness has."""
        sample = self._subscriber.recv()
        while sample.attachment is None:
            sample = self._subscriber.recv()
        payload = sample.payload.to_bytes()
        return join(sample.attachment.to_bytes(), [vector(payload)] if payload else [])

    def check_way(self) -> None:
        """There is one way only."""

    def close(self) -> None:
        """Close the session."""
        self._session.close()


def _config(folder: Path, *, listens: bool) -> zenoh.Config:
    config = zenoh.Config()
    config.insert_json5("mode", json.dumps("peer"))
    config.insert_json5("scouting/multicast/enabled", "false")
    config.insert_json5("transport/shared_memory/enabled", "true")
    address = [f"unixsock-stream/{folder}/zenoh"]
    config.insert_json5("listen/endpoints", json.dumps(address if listens else []))
    config.insert_json5("connect/endpoints", json.dumps([] if listens else address))
    return config


def open_near(folder: Path, way: str, *, nbytes: int, count: int) -> ZenohLink:
    """The end that listens and sends tensors."""
    return ZenohLink(folder, "there", "back", nbytes, listens=True)


def open_far(folder: Path, way: str, *, nbytes: int, count: int) -> ZenohLink:
    """The end that connects."""
    return ZenohLink(folder, "back", "there", 0, listens=False)
