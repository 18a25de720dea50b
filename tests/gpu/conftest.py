"""What the tests on a GPU share: a stager, and two endpoints of this process whose rings CUDA knows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import transport
from engine.staging import Staged, Stager
from engine.staging import staged as staged_of
from transport.conformance import WAIT, joined, noise, prepare, running
from transport.registration import STEP

MIB = 1 << 20
RING = 256 * MIB


def settings(**changes: Any) -> transport.TransportConfig:
    fields = {"ring_bytes": RING, "timeout": WAIT, "admission_timeout": WAIT}
    return transport.TransportConfig(**{**fields, **changes})


def until(true: Callable[[], bool], what: str) -> None:
    """Wait for something that is bound to happen."""
    deadline = time.monotonic() + WAIT
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.002)


@pytest.fixture(scope="session", autouse=True)
def opened_once() -> None:
    """What a process opens once and keeps: the fork server, the runtime, streams, the stager's thread."""
    prepare()
    with running(print):
        pass
    if torch.cuda.is_available():
        busy(torch.cuda.current_stream(), 1)
        torch.cuda.synchronize()


@pytest.fixture(scope="session")
def stager() -> Stager:
    return Stager(torch.device("cuda"))


class Link:
    """Two endpoints of this process, linked; messages go one at a time."""

    def __init__(self, front: transport.Endpoint, near: transport.Endpoint) -> None:
        self.front = front
        self.near = near
        self._pool = ThreadPoolExecutor(1)

    def exchanged(self, body: Any, stage: Stager | None = None) -> transport.Message:
        """The message that carries `body`, as it came; its copies may still run."""
        sending = self._pool.submit(self.front.send, body)
        message = self.near.receive(stage=stage)
        sending.result(WAIT)
        return message

    def live(self) -> int:
        """Records of the front's ring that are still there."""
        self.near.try_receive()  # acknowledges
        live: int = self.front.statistics()["backend"]["shm"]["ring"].live
        return live

    def registered(self, stage: Stager) -> None:
        """Until both ends have the used part of the front's ring registered."""
        self.exchanged({"x": noise(8 * MIB)}, stage)
        until(lambda: transport.registered().nbytes >= 2 * STEP, "the ring is registered on both sides")
        assert transport.registered().refused == ""

    def close(self) -> None:
        self._pool.shutdown()


@pytest.fixture(params=[False, True], ids=["whole", "cut through"])
def link(request: pytest.FixtureRequest, address: str) -> Iterator[Link]:
    before = transport.registered().rings  # what a failed test left
    config = settings(cut_through=request.param)
    with transport.listen(address, config=config) as front, joined(front, "near", config) as near:
        link = Link(front, near)
        yield link
        link.close()
    until(lambda: transport.registered().rings <= before, "the rings are unregistered and unmapped")


def staged(message: transport.Message) -> Staged:
    """What the stager made of a message."""
    found = staged_of(message)
    assert found is not None
    return found


def busy(stream: torch.cuda.Stream, milliseconds: float) -> None:
    """Keep a stream busy for about so long (at 2 GHz)."""
    with torch.cuda.stream(stream):
        torch.cuda._sleep(int(milliseconds * 2e6))  # type: ignore[no-untyped-call]


def is_done(copies: Staged) -> bool:
    """Whether the last copy that was queued is done."""
    assert copies._last is not None
    return bool(copies._last.query())  # type: ignore[no-untyped-call]
