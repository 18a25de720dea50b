"""Every benchmark runs, small, and makes its tables; a row that failed stands in them as failed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import pytest

from bench import channel, memory, ring
from bench.__main__ import BENCHMARKS
from bench.harness import Outcome, Result, Row, run
from bench.part import Json, WrongAnswerError
from bench.report import FAILED

KIB, MIB = 1 << 10, 1 << 20

SMALL: Mapping[str, Mapping[str, Json]] = {
    "ring": {"capacity": MIB, "live": 20, "smallest": KIB, "largest": 4 * KIB, "blocks": 2},
    "channel": {"nbytes": 64 * KIB, "messages": 3},
    "memory": {"prompts": 2, "images": 2, "nbytes": MIB},
    "idle": {"seconds": 0.2},
    "tensor-parallel": {"nbytes": MIB, "messages": 2, "device": "cpu"},
}


def small(name: str) -> list[Row]:
    """The first row of a benchmark for each of its columns or, without such, its parts; made small."""
    rows: dict[object, Row] = {}
    for row in BENCHMARKS[name].rows(True):
        rows.setdefault(row.arguments.get("column", row.parts.get("near")), row)
    return [dataclasses.replace(row, arguments={**row.arguments, **SMALL[name]}) for row in rows.values()]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_rows_run_and_every_answer_is_checked(name: str) -> None:
    rows = small(name)
    if name in ("channel", "memory"):
        assert {row.arguments["column"] for row in rows} >= {"shm", "loan", "frames", "pickle"}
    results = run(rows, rounds=1)
    assert [result.failure for result in results] == [None] * len(rows)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_tables_show_failed_rows_as_failed(name: str) -> None:
    benchmark = BENCHMARKS[name]
    bad = Outcome(round=0, position=0, seconds=1.0, values={}, failure="far: killed by SIGKILL")
    grids = benchmark.show([Result(row=row, outcomes=[bad]) for row in benchmark.rows(True)])
    assert grids
    for grid in grids:
        assert all(len(cells) == len(grid.columns) for cells in grid.rows)
        measured = [cell for cells in grid.rows for cell in cells[1:]]
        assert set(measured) == {FAILED}
    assert not any("met." in note or "kept" in note for grid in grids for note in grid.notes)


def test_both_ends_follow_the_same_schedule() -> None:
    turns = list(channel.schedule(5))
    assert turns == list(channel.schedule(5))
    assert [turn.number for turn in turns] == list(range(1, len(turns) + 1))
    for kind in ("floor", "column", "empty", "note"):
        assert sum(turn.kind == kind and not turn.checked for turn in turns) == 5
        assert sum(turn.kind == kind and turn.checked for turn in turns) == channel.WARM + channel.AFTER
    first, second = turns[:4], turns[4:8]
    assert [turn.kind for turn in first] != [turn.kind for turn in second]


def test_ratio_is_taken_within_a_round() -> None:
    rows = channel.BENCHMARK.rows(False)
    slow, fast = ({"floor": [f], "column": [2 * f], "empty": [f], "note": [f]} for f in (1000.0, 10.0))
    outcomes = [
        Outcome(round=n, position=0, seconds=1.0, values=values, failure=None)
        for n, values in enumerate([slow, fast, fast])
    ]
    _, ratios = channel.BENCHMARK.show([Result(row=row, outcomes=outcomes) for row in rows])
    assert {cell for cells in ratios.rows for cell in cells[1:]} == {"2.00 [2.00..2.00]"}
    assert any("MISSED" in note for note in ratios.notes)


def test_memory_is_counted_above_idle() -> None:
    (row, *_) = (row for row in memory.BENCHMARK.rows(False) if row.arguments["column"] == "shm")
    held = int(str(row.arguments["images"])) * 16
    samples = [[t / 10, 100.0 * MIB, 10.0 * MIB, 0.0] for t in range(10)]
    samples.append([1.0, (100.0 + held) * MIB, 10.0 * MIB, 64.0 * MIB])
    samples.append([1.1, 100.0 * MIB, 10.0 * MIB, 96.0 * MIB])
    values: dict[str, Json] = {
        "idle_from": 0.0,
        "idle_to": 0.9,
        "seconds": 1.0,
        "memory": {"samples": samples},
    }
    (grid,) = memory.BENCHMARK.show([Result(row=row, outcomes=[_good(values)])])
    (cells,) = grid.rows
    assert [cell.split(" [")[0] for cell in cells[1:6]] == [f"{held + 64}", f"{held}", "96.0", "0", "holds"]
    samples[10][1] += 16 * MIB
    (grid,) = memory.BENCHMARK.show([Result(row=row, outcomes=[_good(values)])])
    assert grid.rows[0][5] == "broken"
    assert any("BROKEN" in note for note in grid.notes)


def test_memory_without_idle_samples_is_refused() -> None:
    (row, *_) = memory.BENCHMARK.rows(False)
    assert row.accept is not None
    values: dict[str, Json] = {
        "idle_from": 5.0,
        "idle_to": 6.0,
        "memory": {"samples": [[0.0, 1.0, 1.0, 1.0]]},
    }
    with pytest.raises(ValueError, match="no sample"):
        row.accept(values)


def _good(values: Mapping[str, Json]) -> Outcome:
    return Outcome(round=0, position=0, seconds=1.0, values=values, failure=None)


def test_ring_check_notices_space_that_is_not_given_back() -> None:
    held = ring.Ring.create(MIB, 3, KIB, 2 * KIB, seed=1)
    kept = held.leases[0]
    with pytest.raises(WrongAnswerError, match="not whole"):
        held.close()
    del kept
    held.close()
