"""SIGKILL at every step of a payload that crosses once: the others get it all the same; nothing is left."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest

import shm
import transport
from tests.crash import harness
from tests.crash.harness import Kill, Stage, Steps, digest, pattern, segments_of
from tests.transport.test_tcp import hub_of
from transport import PeerGone, ProtocolError, Timeout

# What each does in a transfer that crosses once, and the time at which all that comes before has been seen.
STEPS: Mapping[str, Mapping[str, int]] = {
    "first": {
        "bulk.attached": 1,
        "ring.reserve": 3,
        "bulk.granted": 3,
        "bulk.chunk": 3,
        "bulk.keeping": 2,
        "bulk.landed": 3,
        "receive.arrived": 3,
        "receive.opening": 3,
        "receive.opened": 3,
        "receive.taken": 3,
        "send.posted": 3,
    },
    "second": {
        "bulk.opening": 2,
        "bulk.opened": 2,
        "bulk.landed": 3,
        "receive.opened": 3,
        "receive.taken": 3,
    },
    "front": {"send.put": 3, "bulk.sending": 4, "bulk.placed": 2, "send.posted": 5},
}
MESSAGES, NBYTES = 5, 600_000
WORKERS = ("first", "second")
_TURN = 0.05


def config(steps: Steps) -> transport.TransportConfig:
    return harness.config(
        steps, backend="tcp", ring_bytes=4 << 20, tcp_timeout=2.0, handshake_timeout=5.0, detour_bytes=4 << 20
    )


def play_front(stage: Stage, kill: Kill | None) -> None:
    """Send each message to both until both have answered it."""
    steps = Steps(kill)
    with transport.listen(stage.address("front"), config=config(steps)) as endpoint:
        attempt = 0
        for number in range(1, MESSAGES + 1):
            answered: set[str] = set()
            while answered != set(WORKERS):
                attempt += 1
                answered = ask(endpoint, steps, attempt, pattern(number, NBYTES))
                introduced(endpoint)
        crossed, ended = hub_of(endpoint).neighbours.crossed, list(steps.ended)
    stage.end()
    stage.report("front", {"events": steps.events, "crossed": crossed, "ended": ended})


def introduced(endpoint: transport.Endpoint) -> None:
    """Wait until one of the two reads the other's ring, while both are there."""
    deadline = time.monotonic() + 5.0
    while len(endpoint.peers) == len(WORKERS) and not hub_of(endpoint).statistics()["neighbours"]:
        if time.monotonic() > deadline:
            return  # they were asked before one of them was there anew; they are asked with the next message
        time.sleep(0.002)


def ask(endpoint: transport.Endpoint, steps: Steps, attempt: int, data: harness.Bytes) -> set[str]:
    """Send one to both; who answered. Who was sent it, and did not go, must answer."""
    endpoint.wait_for_peers(set(WORKERS), timeout=harness.WAIT)
    before = dict(steps.begun)
    try:
        endpoint.send({"id": attempt, "bytes": data}, to=WORKERS)
        sent = set(WORKERS)
    except PeerGone as error:
        sent = set(error.delivered)
    answered: set[str] = set()
    while sent - answered:
        there = {peer.name for peer in endpoint.peers}
        sent &= {name for name in there if steps.begun[name] == before[name]} | answered
        try:
            message = endpoint.receive(timeout=_TURN)
        except (Timeout, PeerGone, ProtocolError):
            continue
        if message.body["id"] == attempt:
            assert message.body["digest"] == digest(data)
            answered.add(message.sender)
    return answered


def play_worker(stage: Stage, kill: Kill | None, name: str) -> None:
    """Answer what comes; join the next front when one is gone."""
    steps = Steps(kill)
    while not stage.done:
        with transport.Endpoint(name, config(steps)) as endpoint:
            try:
                endpoint.connect(stage.address("front"), timeout=0.5)
                serve(endpoint, stage)
            except (Timeout, PeerGone):
                continue
    stage.report(name, {"events": steps.events})


def serve(endpoint: transport.Endpoint, stage: Stage) -> None:
    while not stage.done:
        try:
            body: Mapping[str, Any] = endpoint.receive(timeout=_TURN).body
        except (Timeout, ProtocolError):
            continue
        endpoint.send({"id": body["id"], "digest": digest(body["bytes"])}, to="front")
        del body


PLAYS: Mapping[str, Callable[[Stage, Kill | None], None]] = {
    "front": play_front,
    **{name: partial(play_worker, name=name) for name in WORKERS},
}


def test_the_steps_are_those_we_know() -> None:
    """A renamed event would take its kill point away in silence."""
    with harness.folder() as path:
        _, stage, pids = harness.act(PLAYS, path)
        for role, steps in STEPS.items():
            (report,) = stage.reports(role)
            assert set(steps) <= set(report["events"])
        (front,) = stage.reports("front")
        assert front["crossed"] >= MESSAGES - 1
        assert segments_of(pids) == []


@pytest.mark.parametrize(
    ("role", "event", "occurrence"),
    [
        pytest.param(role, event, count, marks=[] if role == "first" else pytest.mark.stress)
        for role, events in STEPS.items()
        for event, count in events.items()
    ],
)
def test_killed_at_every_step_of_a_crossing(role: str, event: str, occurrence: int) -> None:
    with harness.folder() as path:
        killed, stage, pids = harness.act(PLAYS, path, role, Kill(event, occurrence))
        assert killed, f"{role} lives in spite of {event}"
        if role != "front":
            (front,) = stage.reports("front")
            assert front["ended"] == [role]
        shm.sweep()
        assert segments_of(pids) == []
