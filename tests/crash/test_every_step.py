"""SIGKILL at every step that is traced, in every role: the others go on, right, and nothing is left."""

from __future__ import annotations

import functools
import random
import re
from pathlib import Path

import pytest

import shm
from tests.crash import test_following, test_neighbours, test_tcp
from tests.crash.harness import ROLES, Kill, Outcome, play

ROOT = Path(__file__).parents[2]

_RUNS_PER_EVENT = 3  # a run may have fewer steps of a kind than the one they were counted in


@functools.cache
def clean() -> Outcome:
    """The play in which nobody dies, once for all tests of this process."""
    return play()


def steps_of(role: str) -> dict[str, int]:
    """How often each event happens to a role when nobody dies."""
    assert clean().wrong == []
    (report,) = clean().reports[role]
    return dict(report["events"])


def killed_at(role: str, event: str, occurrence: int) -> Outcome:
    """A play in which the role died at that event, at an earlier occurrence if there were not so many."""
    for _ in range(_RUNS_PER_EVENT):
        outcome = play(role, Kill(event, occurrence))
        if outcome.killed:
            return outcome
        occurrence = max(1, occurrence // 2)
    raise AssertionError(f"{role} lives in spite of {event}")


def faults(role: str, outcome: Outcome) -> list[str]:
    """What a survivor of the play saw that it should not, or did not see that it should."""
    found = list(outcome.wrong)
    for name, reports in outcome.reports.items():
        for report in reports if name != role else ():
            begun, ends = report["begun"].get(role, 0), report["ended"].get(role, [])
            if len(ends) < begun or not all(reason for _, reason in ends):
                found.append(f"{name} had {begun} links with {role}, and saw the end of {ends}")
    if outcome.restarted and not outcome.reports[role]:
        found.append(f"{role} was started again and did not come to its end")
    left = outcome.left()
    if len(left) > (role != "front" or not outcome.restarted):  # the next start of a writer sweeps
        found.append(f"more than the ring of the dead is left: {left}")
    shm.sweep()
    if outcome.left():
        found.append(f"the sweep left {outcome.left()}")
    return found


def test_the_steps_are_those_we_know() -> None:
    """A renamed event would take its kill point away in silence."""
    told = {event for reports in clean().reports.values() for report in reports for event in report["events"]}
    ring = {"reserve", "grow", "commit", "closing", "freed", "admit", "opening", "opened"}
    assert {f"ring.{step}" for step in ring} <= told
    assert {"send.encoded", "send.put", "send.posted"} <= told
    assert {f"receive.{step}" for step in ("arrived", "opening", "opened", "taken", "part")} <= told
    assert {"admission.offered", "admission.proved", "admission.judged", "link.begun", "link.ended"} <= told
    assert all(len(reports) == 1 for reports in clean().reports.values())
    assert clean().wrong == []
    assert clean().left() == []


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
    killing = {step for role in ROLES for step in steps_of(role)}
    killing |= {step for plays in elsewhere for steps in plays.values() for step in steps}
    assert events_in_the_source() == killing


@pytest.mark.parametrize("role", ROLES)
def test_killed_at_every_step(role: str) -> None:
    """At the middle one of the occurrences of each event."""
    found = {}
    for event, times in steps_of(role).items():
        outcome = killed_at(role, event, (times + 1) // 2)
        if wrong := faults(role, outcome):
            found[event] = wrong
    assert found == {}


@pytest.mark.stress
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("role", ROLES)
def test_killed_at_every_step_at_any_time(role: str, seed: int) -> None:
    """At the first, the last and some occurrences between."""
    draw = random.Random(seed)
    found = {}
    for event, times in steps_of(role).items():
        for occurrence in sorted({1, times, draw.randint(1, times), draw.randint(1, times)}):
            outcome = killed_at(role, event, occurrence)
            if wrong := faults(role, outcome):
                found[event, occurrence] = wrong
    assert found == {}
