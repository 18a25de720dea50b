"""Peers for tests: processes that serve, endpoints of this process that are joined to one or pumped."""

from __future__ import annotations

import multiprocessing
import select
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing.forkserver import ensure_running
from multiprocessing.process import BaseProcess
from typing import Any

from transport.config import TransportConfig
from transport.conformance.samples import digest, noise
from transport.endpoint import Endpoint, connect
from transport.errors import PeerGone, Timeout
from transport.received import Message

WAIT = 30.0
"""Seconds; a test never takes as long, except where it fails."""

_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["transport.conformance"])


def prepare() -> None:
    """Start the fork server now, so that no single test is charged for it."""
    ensure_running()


@contextmanager
def running(function: Callable[..., None], *arguments: object) -> Iterator[BaseProcess]:
    """A process that calls a module-level function; killed at the end if it has not ended by then."""
    process = _PROCESSES.Process(target=function, args=arguments, daemon=True)
    process.start()
    try:
        yield process
    finally:
        if process.is_alive():
            process.kill()
        process.join()
        process.close()


def serve(address: str, name: str, options: Mapping[str, Any], own: Sequence[str] = ()) -> None:
    """The life of a peer: do what each message says until the other side is gone."""
    config = TransportConfig(**options)
    held: list[Message] = []
    with connect(address, name=name, config=config, listen=own, timeout=WAIT) as endpoint:
        while True:
            try:
                message = endpoint.receive(timeout=WAIT)
            except PeerGone:
                return
            body = message.body
            match body["do"]:
                case "echo":
                    endpoint.send({"value": body["value"]}, to=message.sender, timeout=WAIT)
                case "sum":
                    endpoint.send(digest(body["value"]), to=message.sender, timeout=WAIT)
                case "hold":
                    held.append(message)
                case "drop":
                    held.clear()
                case "held":
                    values = [digest(other.body["value"]) for other in held]
                    endpoint.send(values, to=message.sender, timeout=WAIT)
                case "stop":
                    return
                case "forward":
                    endpoint.forward(message, to=body["to"], timeout=WAIT)
            del message, body


@contextmanager
def serving(front: Endpoint, name: str, options: Mapping[str, Any], *own: str) -> Iterator[BaseProcess]:
    """A process that serves `front` under this name; at the end it is asked to go, if it is there still."""
    with running(serve, front.addresses[-1], name, options, own) as process:
        front.wait_for_peers({name}, timeout=WAIT)
        yield process
        with suppress(PeerGone):
            front.send({"do": "stop"}, to=name)
        process.join(WAIT)


@contextmanager
def joined(front: Endpoint, name: str, config: TransportConfig, *others: str) -> Iterator[Endpoint]:
    """An endpoint of this process that is linked with `front`, and with who listens at the other addresses.

    An endpoint does nothing between calls: `front` has to wait for the peer while the peer connects.
    """
    with ThreadPoolExecutor(1) as pool:
        addresses = [*others, front.addresses[-1]]
        connecting = pool.submit(connect, addresses, name=name, config=config, timeout=WAIT)
        front.wait_for_peers({name}, timeout=WAIT)
        while not connecting.done():  # the name may still be that of a peer that died
            select.select([front], [], [], 0.01)
            front.statistics()  # handles what has come
        endpoint = connecting.result(WAIT)
    with endpoint:
        yield endpoint


class Pumped:
    """An endpoint of this process whose messages a thread takes, into a list."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.messages: list[Message] = []
        self._more = threading.Condition()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                message = self.endpoint.receive(timeout=0.02)
            except Timeout:
                continue
            except PeerGone:
                self._stop.wait(0.02)
                continue
            with self._more:
                self.messages.append(message)
                self._more.notify_all()
            del message

    def next(self) -> Message:
        """The oldest message, waited for."""
        with self._more:
            assert self._more.wait_for(lambda: self.messages, WAIT), "nothing came"
            return self.messages.pop(0)

    def stop(self) -> None:
        """Take no more."""
        self._stop.set()
        self._thread.join()
        self.messages.clear()


def warm_up(front: Endpoint, near: Pumped) -> None:
    """Let the first tensor through, so that whoever must prove something has."""
    front.send({"value": noise(300_000)}, to=near.endpoint.name)
    near.next()


def acknowledged(front: Endpoint, timeout: float = WAIT) -> None:
    """Until what peers have said that they took is known here."""
    deadline = time.monotonic() + timeout
    while any(peer.unacknowledged for peer in front.peers):
        assert time.monotonic() < deadline, f"never acknowledged: {front.peers}"
        select.select([front], [], [], 0.01)


def left(front: Endpoint, timeout: float = WAIT) -> None:
    """Until it is known here that every peer has left."""
    deadline = time.monotonic() + timeout
    while front.peers:
        assert time.monotonic() < deadline, f"still there: {front.peers}"
        select.select([front], [], [], 0.01)
