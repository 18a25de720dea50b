"""What `bench vllm-turns` makes of one vLLM that is asked both ways; vLLM itself is not needed for that."""

from __future__ import annotations

import dataclasses
import importlib.util
import types
from typing import Any

import pytest
import torch

from bench import report, vllm_turns
from bench.harness import Outcome, Result, run
from bench.hops import events, turns
from bench.hops.measure import Ask, Repeat
from bench.part import Json, WrongAnswerError
from engine.vllm.roles import Front

CONFIG = types.SimpleNamespace(inline_below=1 << 16)
FRONT: Any = types.SimpleNamespace(settings=types.SimpleNamespace(transport=CONFIG))
RING_FIRST, OWN_FIRST = [True, True, False, False], [False, False, True, True]
TENSOR = torch.zeros(1 << 17, dtype=torch.uint8)


def asking(log: list[tuple[bool, int]], *, alike: bool = False) -> Ask:
    """A vLLM; noted is whether its front end found tensors that suit the ring, and of how many prompts."""

    def ask(batch: list[dict[str, Any]]) -> list[list[Any]]:
        by_ring = Front.suits(FRONT, TENSOR)
        log.append((by_ring, len(batch)))
        return [[[0 if alike else 100 * len(log) + place], []] for place in range(len(batch))]

    return ask


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "PAUSE", 0.0)


def test_ways_take_turns_and_the_first_pair_is_not_counted() -> None:
    log: list[tuple[bool, int]] = []
    pairs = turns._pairs(asking(log), "2x1", 8, pairs=3)
    assert [by_ring for by_ring, _ in log] == [*RING_FIRST, *OWN_FIRST, *RING_FIRST, *OWN_FIRST]
    assert {prompts for _, prompts in log} == {2}
    assert len(pairs) == 3
    first = {pair[turns.RING].start < pair[turns.OWN].start for pair in pairs}
    assert first == {True, False}
    assert Front.suits(FRONT, TENSOR)


def test_different_images_answered_alike_are_an_error() -> None:
    with pytest.raises(WrongAnswerError, match="2x1: different images were answered alike"):
        turns._pairs(asking([], alike=True), "2x1", 8, pairs=1)


def test_figures_are_the_parts_of_each_answer() -> None:
    noted: list[events.Event] = []
    pairs = []
    for start in (10.0, 30.0):
        pair = {}
        for way, hop, begin in ((turns.RING, 0.25, start), (turns.OWN, 0.75, start + 10)):
            noted.append({"what": "sent", "id": begin, "start": begin + 1, "end": begin + 1.1, "images": 1})
            noted.append({"what": "decoded", "id": begin, "end": begin + 1 + hop, "images": 1})
            pair[way] = Repeat(begin, begin + 3, [])
        pairs.append(pair)
    figures = turns._figures(noted, pairs)
    assert figures == {
        turns.RING: {"whole": [3000.0] * 2, "made": [1000.0] * 2, "hop 1": [250.0] * 2, "rest": [1750.0] * 2},
        turns.OWN: {"whole": [3000.0] * 2, "made": [1000.0] * 2, "hop 1": [750.0] * 2, "rest": [1250.0] * 2},
    }


def test_the_difference_is_that_of_pairs() -> None:
    row = next(row for row in vllm_turns.BENCHMARK.rows(False) if row.name == "tensorferry")
    row = dataclasses.replace(row, lacking=None, arguments={**row.arguments, "layouts": ["8x4"]})

    def outcome(own: list[float], ring: list[float]) -> Outcome:
        each: dict[str, Json] = {
            way: dict.fromkeys(turns.FIGURES, series)
            for way, series in ((turns.OWN, own), (turns.RING, ring))
        }
        values: dict[str, Json] = {"layouts": {"8x4": each}}
        return Outcome(round=0, position=0, seconds=1.0, values=values, failure=None)

    result = Result(row=row, outcomes=[outcome([50.0, 20.0], [30.0, 10.0]), outcome([90.0], [95.0])])
    (whole, *others) = vllm_turns.BENCHMARK.show([result])
    assert len(others) == len(turns.FIGURES) - 1
    assert whole.rows == [
        ["direct_rpc", "50.0 [20.0..90.0]"],
        ["tensorferry", "30.0 [10.0..95.0]"],
        ["tensorferry, less", "10.0 [-5.00..20.0]"],
    ]


def test_without_vllm_there_is_nothing_to_measure() -> None:
    if importlib.util.find_spec("vllm") is not None:
        pytest.skip("vLLM is here")
    results = run(vllm_turns.BENCHMARK.rows(True), rounds=1)
    assert all("vllm is not installed" in line for line in report.lacking(results))
    grids = vllm_turns.BENCHMARK.show(results)
    assert {cell for grid in grids for cells in grid.rows for cell in cells[1:]} == {report.LACKING}
