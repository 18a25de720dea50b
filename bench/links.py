"""The ways a benchmark sends bodies between two processes: tensorferry's endpoints, and pickle over zmq."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch

import transport
from bench.floor import TIMEOUT, pair
from bench.part import WrongAnswerError

Body: TypeAlias = dict[str, Any]

RING_BYTES = 1 << 30

BACKENDS: Mapping[str, str] = {"shm": "shm", "loan": "shm", "frames": "frames", "inline": "inline"}
"""Column → the backend that the endpoints are told to use."""


class Link(Protocol):
    """One end: bodies are dicts of plain values and torch tensors; every call waits `TIMEOUT` at most."""

    def send(self, body: Body) -> None:
        """Send to the other end."""

    def receive(self) -> Body:
        """Wait for the next body."""

    def check_way(self) -> None:
        """Raise if what came did not come the way that is measured."""

    def close(self) -> None:
        """Close what was opened."""


class PickleLink:
    """Bodies pickled whole into one zmq frame, as before any of this: the old baseline."""

    def __init__(self, folder: Path, *, bind: bool) -> None:
        self._socket = pair(f"ipc://{folder}/pickle", bind=bind)

    def send(self, body: Body) -> None:
        """Pickle, then hand the pickle to zmq without another copy."""
        self._socket.send(pickle.dumps(body, protocol=pickle.HIGHEST_PROTOCOL), copy=False)

    def receive(self) -> Body:
        """Unpickle straight out of zmq's buffer; the other end is our own process."""
        body: Body = pickle.loads(self._socket.recv(copy=False).buffer)
        return body

    def check_way(self) -> None:
        """There is one way only."""

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


class EndpointLink:
    """An endpoint of the transport that talks to one peer."""

    def __init__(self, endpoint: transport.Endpoint) -> None:
        self._endpoint = endpoint

    def send(self, body: Body) -> None:
        """Send to the only peer."""
        self._endpoint.send(body, timeout=TIMEOUT)

    def receive(self) -> Body:
        """The body of the next message; its tensors hold their records as long as they live."""
        body: Body = self._endpoint.receive(timeout=TIMEOUT).body
        return body

    def loan(self, shape: tuple[int, ...]) -> AbstractContextManager[torch.Tensor]:
        """An int64 tensor in the ring, to be filled and sent."""
        return self._endpoint.loan(shape, torch.int64, timeout=TIMEOUT)

    def check_way(self) -> None:
        """`WrongAnswerError` if a tensor that should have come through the ring came in any other way."""
        if self._endpoint.config.backend != "shm":
            return
        check_ring(self._endpoint)

    def close(self) -> None:
        """Close the endpoint."""
        self._endpoint.close()


def check_ring(endpoint: transport.Endpoint) -> None:
    """`WrongAnswerError` unless every tensor that the endpoint received came whole through a ring."""
    received = endpoint.statistics()["received"]
    others = [key for key in received if key.startswith("bytes ") and key != "bytes shm"]
    if others or received.get("parts") or not received.get("bytes shm"):
        raise WrongAnswerError(f"not everything came whole through the ring: {dict(received)}")


def _config(column: str, limits: Mapping[str, Any]) -> transport.TransportConfig:
    return transport.TransportConfig(backend=BACKENDS[column], **{"ring_bytes": RING_BYTES, **limits})


def open_near(folder: Path, column: str, **limits: Any) -> Link:
    """The end that sends tensors; returns when the far end is there. `limits`: fields of the config."""
    if column == "pickle":
        return PickleLink(folder, bind=True)
    endpoint = transport.listen([f"ipc://{folder}/near"], config=_config(column, limits))
    endpoint.wait_for_peers(1, timeout=TIMEOUT)
    return EndpointLink(endpoint)


def open_far(folder: Path, column: str, **limits: Any) -> Link:
    """The end that receives them."""
    if column == "pickle":
        return PickleLink(folder, bind=False)
    config = _config(column, {"handshake_timeout": TIMEOUT, **limits})
    return EndpointLink(transport.connect(f"ipc://{folder}/near", name="far", config=config))
