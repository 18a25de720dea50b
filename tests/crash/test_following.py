"""SIGKILL at the steps of a message that is told before it is written, on either side."""

from __future__ import annotations

import pytest

import shm
import transport
from tests.crash import harness
from tests.crash.harness import Kill, Stage, Steps, pattern, segments_of
from tests.crash.test_tcp import ask, serve
from transport import PeerGone, Timeout

# In the order in which they happen to one message; the answers have no record.
STEPS = {
    "front": ("ring.reserve", "ring.publish", "send.posted", "ring.commit"),
    "worker": ("receive.arrived", "ring.opening", "ring.opened", "receive.opened"),
}
MESSAGES, NBYTES = 3, 4 << 20  # bytes; the least that is worth following


def config(steps: Steps) -> transport.TransportConfig:
    return harness.config(steps, ring_bytes=16 << 20)


def play_front(stage: Stage, kill: Kill | None) -> None:
    """Send each message until it was answered right, whoever goes and comes meanwhile."""
    steps = Steps(kill)
    with transport.listen(stage.address("front"), config=config(steps)) as endpoint:
        for number in range(1, MESSAGES + 1):
            while not ask(endpoint, steps, number, pattern(number, NBYTES)):
                pass
    stage.end()
    stage.report("front", {"events": steps.events})


def play_worker(stage: Stage, kill: Kill | None) -> None:
    """Answer what comes; join the next front when one is gone."""
    steps = Steps(kill)
    while not stage.done:
        with transport.Endpoint("worker", config(steps)) as endpoint:
            try:
                endpoint.connect(stage.address("front"), timeout=0.5)
                serve(endpoint, stage)
            except (Timeout, PeerGone):
                continue
    stage.report("worker", {"events": steps.events})


PLAYS = {"front": play_front, "worker": play_worker}


def test_the_steps_are_those_we_know() -> None:
    """Each message is followed; a renamed event would take its kill point away in silence."""
    with harness.folder() as path:
        _, stage, pids = harness.act(PLAYS, path)
        for role, steps in STEPS.items():
            (report,) = stage.reports(role)
            assert {step: report["events"].get(step, 0) >= MESSAGES for step in steps} == dict.fromkeys(
                steps, True
            )
        assert segments_of(pids) == []


@pytest.mark.parametrize(
    ("role", "event"), [(role, event) for role, events in STEPS.items() for event in events]
)
def test_killed_at_every_step_of_a_message_that_is_followed(role: str, event: str) -> None:
    with harness.folder() as path:
        killed, _, pids = harness.act(PLAYS, path, role, Kill(event, 2))
        assert killed, f"{role} lives in spite of {event}"
        shm.sweep()
        assert segments_of(pids) == []
