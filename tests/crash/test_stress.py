"""Random kills and stalls for a while: nothing corrupt, leaked, lost or stuck, and enough happened."""

from __future__ import annotations

import random

import pytest

from tests.crash.stress import faults, perform


@pytest.mark.parametrize(
    ("seconds", "processes"),
    [
        pytest.param(8.0, 6, id="seconds"),
        pytest.param(180.0, 8, id="minutes", marks=pytest.mark.stress),
    ],
)
def test_everything_dies_at_random(seconds: float, processes: int) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    totals = perform(seconds, processes, seed)
    assert faults(totals) == {}, f"seed {seed}: {totals}"
    for happened in ("messages", "answers", "handed_on", "kills", "stalls"):
        assert totals[happened] > 0, f"seed {seed}: {totals}"
