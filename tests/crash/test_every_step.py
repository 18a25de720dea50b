"""SIGKILL at every step that is traced, in every role: the others go on, right, and nothing is left."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from tests.crash import test_following, test_neighbours, test_tcp
from tests.crash.harness import CAST, Report, Stage, play_peer
from tests.crash.plays import Play, middle
from transport.backends.shm import ShmInbound

ROOT = Path(__file__).parents[2]

PLAY = Play(CAST)


def test_the_steps_are_those_we_know() -> None:
    """A renamed event would take its kill point away in silence."""
    told = {event for role in CAST for event in PLAY.steps_of(role)}
    ring = {"reserve", "grow", "commit", "closing", "freed", "admit", "opening", "opened"}
    assert {f"ring.{step}" for step in ring} <= told
    assert {"send.encoded", "send.put", "send.posted"} <= told
    assert {f"receive.{step}" for step in ("arrived", "opening", "opened", "taken", "part")} <= told
    assert {"admission.offered", "admission.proved", "admission.judged", "link.begun", "link.ended"} <= told


def events_in_the_source() -> set[str]:
    """Every event that the product can tell; those of a ring get their prefix on the way."""
    ring = (ROOT / "shm").glob("*.py")
    others = [path for folder in ("transport", "engine") for path in (ROOT / folder).rglob("*.py")]
    return {
        *(f"ring.{step}" for path in ring for step in re.findall(r'_trace\("(\w+)"', path.read_text())),
        *(event for path in others for event in re.findall(r'emit\(\s*"([\w.]+)"', path.read_text())),
    }


def test_somebody_dies_at_every_event_there_is() -> None:
    """Here, or in the plays of what is not in this one: following a copy, bulk connections, neighbours."""
    elsewhere = (test_following.STEPS, test_tcp.STEPS, test_neighbours.STEPS)
    killing = {step for role in CAST for step in PLAY.steps_of(role)}
    killing |= {step for plays in elsewhere for steps in plays.values() for step in steps}
    assert events_in_the_source() == killing


@pytest.mark.parametrize("role", CAST)
def test_killed_at_every_step(role: str) -> None:
    """At the middle one of the occurrences of each event."""
    assert PLAY.faults(role, PLAY.steps_of(role), middle) == {}


def play_forgetful_worker(stage: Stage, report: Report) -> None:
    """A worker that keeps the rings of those who are gone."""
    ShmInbound.drop = lambda *_: None  # type: ignore[method-assign]  # of this process
    play_peer("worker", stage, report)


def test_a_descriptor_that_outlives_a_death_is_a_fault() -> None:
    forgetful = Play({**CAST, "worker": play_forgetful_worker})
    ((found,),) = forgetful.faults("front", ["send.posted"], middle).values()
    assert re.fullmatch(r"worker has \d+ descriptors at its end, and \d+ when nobody dies", found)


@pytest.mark.stress
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("role", CAST)
def test_killed_at_every_step_at_any_time(role: str, seed: int) -> None:
    """At the first, the last and some occurrences between."""
    draw = random.Random(seed)

    def some(times: int) -> list[int]:
        return [1, times, draw.randint(1, times), draw.randint(1, times)]

    assert PLAY.faults(role, PLAY.steps_of(role), some) == {}
