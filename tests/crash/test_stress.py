"""Random kills and stalls for a while: nothing corrupt, leaked, lost or stuck, and enough happened."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from tests.crash.stress import faults, perform


@pytest.mark.parametrize(
    ("seconds", "processes", "backend"),
    [
        pytest.param(8.0, 6, "auto", id="seconds"),
        pytest.param(3.0, 4, "tcp", id="seconds-tcp"),
        pytest.param(180.0, 8, "auto", id="minutes", marks=pytest.mark.stress),
        pytest.param(180.0, 8, "tcp", id="minutes-tcp", marks=pytest.mark.stress),
    ],
)
def test_everything_dies_at_random(
    seconds: float, processes: int, backend: str, record_property: Callable[[str, object], None]
) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    totals, notes = perform(seconds, processes, seed, backend)
    said = {"bytes" if name == "nbytes" else name: number for name, number in totals.items()}
    record_property("totals", ", ".join(f"{name} {number:,}" for name, number in said.items()))
    assert faults(totals) == {}, f"seed {seed}: {totals}\n{notes}"
    for happened in ("messages", "answers", "handed_on", "kills", "stalls"):
        assert totals[happened] > 0, f"seed {seed}: {totals}"
