"""SIGKILL at every step of a payload that crosses once: the others get it all the same; nothing is left."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest

import transport
from tests.crash import plays
from tests.crash.asking import ask, play_worker
from tests.crash.harness import WAIT, Report, Stage, config, pattern
from tests.crash.plays import Outcome, Play, ends_and_middle
from tests.transport.test_tcp import hub_of
from transport.bulk import crossing

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
_CONFIG: Mapping[str, Any] = {
    "backend": "tcp",
    "ring_bytes": 4 << 20,
    "tcp_timeout": 2.0,
    "handshake_timeout": 5.0,
    "detour_bytes": 4 << 20,
}


def play_front(stage: Stage, report: Report) -> None:
    """Send each message to both until both have answered it."""
    crossing._PATIENCE = WAIT  # of this process: a leader that only stands still for a moment is waited for
    with transport.listen(stage.address("front"), config=config(report.steps, **_CONFIG)) as endpoint:
        attempt = 0
        for number in range(1, MESSAGES + 1):
            answered: set[str] = set()
            while answered != set(WORKERS):
                attempt += 1
                answered = ask(endpoint, report, attempt, pattern(number, NBYTES), WORKERS)
                introduced(endpoint)
        report.seen["crossed"] = hub_of(endpoint).neighbours.crossed
        report.seen["lost"] = {name: [*ends] for name, ends in report.steps.ended.items()}  # before the end
    stage.end()


def introduced(endpoint: transport.Endpoint) -> None:
    """Wait until one of the two reads the other's ring, while both are there."""
    deadline = time.monotonic() + 5.0
    while len(endpoint.peers) == len(WORKERS) and not hub_of(endpoint).statistics()["neighbours"]:
        if time.monotonic() > deadline:
            return  # they were asked before one of them was there anew; they are asked with the next message
        time.sleep(0.002)


def faults(role: str, outcome: Outcome) -> list[str]:
    """As in any play; besides, when a worker dies the front loses no other."""
    found = plays.faults(role, outcome)
    for report in outcome.reports["front"] if role != "front" else ():
        lost = {peer for peer, ends in report["lost"].items() if any(at >= outcome.died for at, _ in ends)}
        if not lost <= {role}:
            said = {name: report["ended"] for name in WORKERS for report in outcome.reports[name]}
            found.append(
                f"when {role} died at {outcome.died}, the front lost {report['lost']}; others: {said}"
            )
    return found


WORKING = {name: partial(play_worker, name, **_CONFIG) for name in WORKERS}
PLAY = Play({"front": play_front, **WORKING}, faults)


def test_the_steps_are_those_we_know() -> None:
    """A renamed event would take its kill point away in silence."""
    for role, steps in STEPS.items():
        assert set(steps) <= set(PLAY.steps_of(role))
    assert PLAY.clean.reports["front"][0]["crossed"] >= MESSAGES - 1


@pytest.mark.parametrize(
    ("role", "event", "occurrence"),
    [
        pytest.param(role, event, count, marks=[] if role == "first" else pytest.mark.stress)
        for role, events in STEPS.items()
        for event, count in events.items()
    ],
)
def test_killed_at_every_step_of_a_crossing(role: str, event: str, occurrence: int) -> None:
    assert PLAY.faults(role, [event], lambda _: [occurrence]) == {}


@pytest.mark.stress
@pytest.mark.parametrize("role", PLAY.cast)
def test_killed_at_every_event_beside_neighbours(role: str) -> None:
    """At the first, the middle and the last one of the occurrences of each event."""
    assert PLAY.faults(role, PLAY.steps_of(role), ends_and_middle) == {}
