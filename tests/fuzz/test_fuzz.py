"""A short run of each fuzz target by hypothesis, and one by coverage; minutes of it with `-m stress`."""

from __future__ import annotations

import importlib.util
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.__main__ import TARGETS, load
from transport.link import Link
from transport.message import Control, Hello, Refused, Welcome
from transport.wire import Arrived

ROOT = Path(__file__).parents[2]
_SEED = 1


@pytest.fixture
def target(name: str, short_path: Path) -> Iterator[Any]:
    made = load(name)(short_path)
    yield made
    made.close()


@pytest.mark.parametrize("name", TARGETS)
def test_what_a_fuzzer_begins_with(name: str, target: Any) -> None:
    for seed in target.seeds():
        target(seed)


@pytest.mark.parametrize("name", ["handshake"])
def test_greetings_are_taken_and_what_follows_is_heard(target: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs that stop at the door would find nothing behind it."""
    exchange, heard, begun = target._exchange, set(), []
    handle, begin = exchange._handle_in_link, exchange._begin

    def handling(link: Link, message: Control, arrived: Arrived) -> None:
        heard.add(type(message))
        handle(link, message, arrived)

    def beginning(link: Link) -> None:
        begun.append(link.peer.dialled)
        begin(link)

    monkeypatch.setattr(exchange, "_handle_in_link", handling)
    monkeypatch.setattr(exchange, "_begin", beginning)
    for seed in target.seeds():
        target(seed)
    assert heard == {*get_args(Control)} - {Hello, Welcome, Refused}
    assert begun.count(True) == 1
    assert begun.count(False) == len(target.seeds()) - 1


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_whatever_hypothesis_thinks_of(name: str, target: Any, data: st.DataObject) -> None:
    beginning = data.draw(st.sampled_from([b"", *target.seeds()]))
    target(beginning + data.draw(st.binary(max_size=200)))


@pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None,
    reason=f"needs atheris (extra `fuzz`), which has wheels for x86_64 only; this is {platform.machine()}",
)
@pytest.mark.parametrize(
    "limit",
    [
        pytest.param("--runs=1000", id="seconds"),
        pytest.param("--seconds=120", id="minutes", marks=[pytest.mark.stress, pytest.mark.timeout(900)]),
    ],
)
def test_whatever_leads_to_new_branches(limit: str) -> None:
    """Each target with coverage as the guide: no input ends it, hangs it or breaks what it asserts."""
    command = [sys.executable, "-m", "tests.fuzz", "all", limit, f"--seed={_SEED}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stderr.count("DONE") == len(TARGETS)
