"""SIGKILL at the steps of a message that is told before it is written, on either side."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest

import transport
from tests.crash.asking import ask, play_worker
from tests.crash.harness import Report, Stage, config, pattern
from tests.crash.plays import Play, ends_and_middle, middle

# In the order in which they happen to one message; the answers have no record.
STEPS = {
    "front": ("ring.reserve", "ring.publish", "send.posted", "ring.commit"),
    "worker": ("receive.arrived", "ring.opening", "ring.opened", "receive.opened"),
}
MESSAGES, NBYTES = 3, 4 << 20  # bytes; the least that is worth following
_CONFIG: Mapping[str, Any] = {"ring_bytes": 16 << 20}


def play_front(stage: Stage, report: Report) -> None:
    """Send each message until it was answered right, whoever goes and comes meanwhile."""
    with transport.listen(stage.address("front"), config=config(report.steps, **_CONFIG)) as endpoint:
        for number in range(1, MESSAGES + 1):
            while not ask(endpoint, report, number, pattern(number, NBYTES), ["worker"]):
                pass
    stage.end()


PLAY = Play({"front": play_front, "worker": partial(play_worker, "worker", **_CONFIG)})


def test_the_steps_are_those_we_know() -> None:
    """Each message is followed; a renamed event would take its kill point away in silence."""
    for role, steps in STEPS.items():
        told = PLAY.steps_of(role)
        assert {step: told.get(step, 0) >= MESSAGES for step in steps} == dict.fromkeys(steps, True)


@pytest.mark.parametrize("role", STEPS)
def test_killed_at_every_step_of_a_message_that_is_followed(role: str) -> None:
    assert PLAY.faults(role, STEPS[role], middle) == {}


@pytest.mark.stress
@pytest.mark.parametrize("role", PLAY.cast)
def test_killed_at_every_event_while_messages_are_followed(role: str) -> None:
    """At the first, the middle and the last one of the occurrences of each event."""
    assert PLAY.faults(role, PLAY.steps_of(role), ends_and_middle) == {}
