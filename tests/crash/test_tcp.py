"""SIGKILL at every step when the bytes go over bulk connections: the others go on, and nothing is left."""

from __future__ import annotations

from functools import partial

import pytest

import transport
from tests.crash.asking import play_worker
from tests.crash.harness import (
    WAIT,
    Kill,
    Stage,
    cast_with,
    config,
    folder,
    left_by,
    pattern,
    perform,
    running,
)
from tests.crash.plays import Play, ends_and_middle, middle

# What the bulk connections of each role tell; who is handed on to lands and sends nothing large.
STEPS = {
    "front": ("bulk.attached", "bulk.sending", "bulk.granted", "bulk.chunk", "bulk.landed"),
    "worker": ("bulk.attached", "bulk.sending", "bulk.granted", "bulk.chunk", "bulk.landed"),
    "next": ("bulk.attached", "bulk.granted", "bulk.chunk", "bulk.landed"),
}
PLAY = Play(cast_with(backend="tcp", tcp_timeout=2.0, handshake_timeout=5.0))


def test_the_steps_are_those_we_know() -> None:
    """A renamed event would take its kill point away in silence."""
    told = {role: {step for step in PLAY.steps_of(role) if step.startswith("bulk.")} for role in STEPS}
    assert told == {role: set(steps) for role, steps in STEPS.items()}


@pytest.mark.parametrize("role", STEPS)
def test_killed_at_every_step_of_a_transfer(role: str) -> None:
    """At the middle one of the occurrences of each event of a bulk connection."""
    assert PLAY.faults(role, STEPS[role], middle) == {}


@pytest.mark.stress
@pytest.mark.parametrize("role", STEPS)
def test_killed_at_every_event_over_tcp(role: str) -> None:
    """At the first, the middle and the last one of the occurrences of each event."""
    assert PLAY.faults(role, PLAY.steps_of(role), ends_and_middle) == {}


def test_killed_before_there_is_a_bulk_connection() -> None:
    """Who sends is told, and waits neither for the connection nor for its own time-out."""
    worker = partial(play_worker, "worker", backend="tcp")
    settings = config(backend="tcp", handshake_timeout=600.0)
    with (
        folder() as path,
        running(perform, "worker", worker, stage := Stage(path), Kill("link.begun", 1)) as victim,
        transport.listen(stage.address("front"), config=settings) as front,
    ):
        front.wait_for_peers({"worker"}, timeout=WAIT)
        body = {"bytes": pattern(1, 60_000)}
        with pytest.raises(transport.PeerGone, match="worker"):
            front.send(body, to="worker", timeout=600.0)
        victim.join(WAIT)
        assert left_by({victim.pid or 0}) == []
