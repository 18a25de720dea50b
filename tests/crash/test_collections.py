"""Garbage collections in the middle of any call: what ends in them waits for nothing, and nothing for it."""

from __future__ import annotations

import gc
import inspect
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

import transport
from tests.crash.harness import (
    WAIT,
    Report,
    Stage,
    Steps,
    config,
    digest,
    folder,
    pattern,
    perform,
    running,
    segments_of,
    until,
)
from transport import Full, PeerGone, Timeout
from transport.wire import Wire

ROOT = Path(__file__).parents[2]
BACKENDS: Mapping[str, Mapping[str, Any]] = {
    "shm": {},
    "tcp": {"backend": "tcp", "tcp_timeout": 2.0, "handshake_timeout": 5.0},
}
NAMES = ("next", "worker")
HUB = "tensorferry-bulk"  # the thread of the bulk connections of an endpoint
ENOUGH = 8  # messages of 30,000 bytes, which fit a peer's share


class Collecting(Steps):
    """A trace that collects garbage at every step, whatever is locked there."""

    def __call__(self, event: str, now: int, fields: Mapping[str, object]) -> None:
        super().__call__(event, now, fields)
        gc.collect()


def litter(*things: object) -> None:
    """Leave things to the garbage collector alone."""
    cycle: list[object] = [*things]
    cycle.append(cycle)


def answer_and_litter(name: str, stage: Stage, backend: str) -> None:
    """Answer with a loan or hand on; messages, loans and whole endpoints end in garbage, in mid-call."""
    gc.freeze()  # what was there before is no garbage, and need not be looked through each time
    gc.set_threshold(20, 1, 1)
    with transport.Endpoint(name, config(Collecting(), **BACKENDS[backend])) as endpoint:
        if name == "next":
            endpoint.listen(stage.address("next"))
        else:
            endpoint.connect(stage.address("next"), timeout=WAIT)
        endpoint.connect(stage.address("front"), timeout=WAIT)
        for number in range(sys.maxsize):
            try:
                message = endpoint.receive(timeout=WAIT)
            except PeerGone:
                return
            data, out = message.body["bytes"], None
            if message.body["done"]:
                return
            if message.body["hand on"] and name == "worker":
                endpoint.forward(message, to="next")
            else:
                with endpoint.loan(data.shape, np.uint8) as out:
                    out[:] = data
                    endpoint.send({"bytes": out}, to="front")
            if number % 10 == 0:
                lost = transport.Endpoint("lost", config(**BACKENDS[backend]))
                with lost.loan((1000,), np.uint8) as other:
                    litter(lost, other)
                del lost, other
            litter(message, data, out)
            del message, data, out


@pytest.fixture
def young() -> Iterator[None]:
    """Collections look through what this test made and nothing else, so that there can be many."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("young")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_collection_in_the_middle_of_any_call(backend: str) -> None:
    """Finalizers of views, loans and endpoints run under every lock there is, and wait for none."""
    trace = Collecting()
    with folder() as path, ExitStack() as peers:
        stage = Stage(path)
        with transport.listen(stage.address("front"), config=config(trace, **BACKENDS[backend])) as front:
            arguments = (stage, backend)
            cast = [peers.enter_context(running(answer_and_litter, name, *arguments)) for name in NAMES]
            front.wait_for_peers(NAMES, timeout=WAIT)
            for number in range(60):
                data = pattern(number, 1000 + 997 * (number % 50))
                handed_on = number % 3 == 0
                front.send({"bytes": data, "hand on": handed_on, "done": False}, to="worker")
                message = front.receive(timeout=WAIT)
                assert message.sender == ("next" if handed_on else "worker")
                assert digest(message.body["bytes"]) == digest(data)
                litter(message)
                del message
            with pytest.raises(Timeout):
                front.receive(timeout=0.1)
            until(lambda: not live(front), "all space comes back")
            front.send({"bytes": data, "hand on": False, "done": True}, to=NAMES)
        for process in cast:
            process.join(WAIT)
            assert process.exitcode == 0
        assert segments_of({process.pid or 0 for process in cast}) == []
    ring = {"ring.closing", "send.put"}
    assert ring | ({"bulk.landed"} if backend == "tcp" else {"ring.opening", "ring.opened"}) <= set(
        trace.events
    )


def live(endpoint: transport.Endpoint) -> int:
    """The records of an endpoint's ring that somebody counts on, after handling what has come."""
    gc.collect()
    count: int = endpoint.statistics()["backend"]["ring"].live
    return count


# ------------------------------------------------------------------------------------ in a thread of its own


class Line:
    """Collects garbage once the thread of the bulk connections is at one line; remembers all it comes by.

    Lines are written as `transport/wire.py:321`. Nothing happens before it is `armed`.
    """

    def __init__(self, wanted: str) -> None:
        self.seen: set[str] = set()
        self.armed = self.collected = False
        self._wanted = wanted

    def trace(self, frame: FrameType, event: str, argument: object) -> Callable[..., Any] | None:
        """For `threading.settrace`."""
        path = Path(frame.f_code.co_filename)
        if not path.is_relative_to(ROOT) or threading.current_thread().name != HUB:
            return None
        if event == "line" and self.armed:
            line = f"{path.relative_to(ROOT)}:{frame.f_lineno}"
            self.seen.add(line)
            if line == self._wanted and not self.collected:
                self.collected = True
                gc.collect()
        return self.trace


def forsake(wanted: str, stage: Stage, report: Report) -> None:
    """Drop an endpoint to which much is sent, without closing it: its own thread collects it at that line."""
    line = Line(wanted)
    threading.settrace(line.trace)
    settings = config(report.steps, **BACKENDS["tcp"])
    endpoint = transport.connect(stage.address("front"), name="peer", config=settings)
    endpoint.receive(timeout=WAIT)
    gc.disable()
    litter(endpoint)
    endpoint.send("ready")
    line.armed = True
    del endpoint
    until(lambda: line.collected or report.steps.events["bulk.landed"] > ENOUGH, "enough has landed")
    report.seen |= {"collected": line.collected, "lines": sorted(line.seen)}
    gc.collect()
    until(lambda: HUB not in {thread.name for thread in threading.enumerate()}, "its thread ends")
    until(lambda: not segments_of({os.getpid()}), "its ring is gone")


def collected_at(wanted: str) -> dict[str, Any]:
    """Send to who drops its endpoint until that is gone; what it reports."""
    with folder() as path, running(perform, "peer", partial(forsake, wanted), stage := Stage(path)) as peer:
        with transport.listen(stage.address("front"), config=config(**BACKENDS["tcp"])) as front:
            front.wait_for_peers({"peer"}, timeout=WAIT)
            with pytest.raises(PeerGone):
                send_on(front)
            peer.join(WAIT)
            assert peer.exitcode == 0
        (report,) = stage.reports("peer")
    assert report["wrong"] == []
    return report


def send_on(front: transport.Endpoint) -> None:
    """Send until the peer is gone."""
    front.send({"bytes": pattern(0, 30_000)}, to="peer")
    assert front.receive(timeout=WAIT).body == "ready"
    deadline = time.monotonic() + WAIT
    for number in range(sys.maxsize):
        assert time.monotonic() < deadline, "the front is not told that its peer was collected"
        with suppress(Full):
            front.send({"bytes": pattern(number, 30_000)}, to="peer", timeout=0.02)


def test_an_endpoint_is_collected_by_its_own_thread_under_a_lock() -> None:
    """It is closed all the same: nothing stays open, and its peer is told."""
    source, first = inspect.getsourcelines(Wire.wake)
    inside = next(number for number, text in enumerate(source, first) if "if self._event" in text)
    assert collected_at(f"transport/wire.py:{inside}")["collected"]


@pytest.mark.stress
def test_an_endpoint_is_collected_by_its_own_thread_anywhere() -> None:
    """At lines drawn from all that the thread comes by while something is sent to it."""
    lines = collected_at("")["lines"]
    assert len(lines) > 100
    drawn = random.sample(lines, 100)
    assert (
        sum(collected_at(line)["collected"] for line in drawn) > 50
    )  # it does not come by all of them each time
