"""A process of real vLLM is killed: vLLM ends as without the plugin, and the next start is as the first.

Or a tensor is lost between two that live.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.vllm.runs import MARKS, TENSOR, ferry, run, segments, stock

pytestmark = MARKS
RING_1 = "front: front end to engine: ring"


@pytest.mark.parametrize(
    ("victim", "workers"), [("EngineCore", 1), ("EngineCore", 2), ("Worker_TP1", 2)], ids=str
)
def test_an_engine_or_a_worker_is_killed(model: Path, victim: str, workers: int) -> None:
    before = segments()
    options = {"additional_config": ferry(), "tensor_parallel_size": workers}
    first = run(model, kill=victim, **options)
    assert first["said"][-1] == "EngineDeadError"
    again = run(model, **options)
    assert again["said"] == stock(model, tensor_parallel_size=workers)
    assert again["said"][:2] == first["said"][:-1]
    assert again["ways"][RING_1] == [8, 8 * TENSOR]
    assert segments() - before == set()


def test_a_front_end_is_killed(model: Path) -> None:
    """Nobody is left to remove its ring: the next start does."""
    before = segments()
    first = run(model, additional_config=ferry(), kill="front")
    left = segments() - before
    assert left
    again = run(model, additional_config=ferry())
    assert again["said"][:2] == first["said"]
    assert segments() & left == set()


def test_a_tensor_is_lost(model: Path) -> None:
    """Its request fails alone. vLLM's cache has the other image of it, and takes the lost one for known."""
    options: dict[str, Any] = {"mm_processor_cache_gb": 1, "firsts": [0, 1, 0]}
    said = run(model, additional_config=ferry(), lose=[1], **options)["said"]
    expected = stock(model, **options)
    failed: list[Any] = [[], []]
    assert said == [failed, *expected[1:4], failed, expected[5]]
