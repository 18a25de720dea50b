"""Every benchmark runs, small, and makes its tables; a row that failed stands in them as failed."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from bench import channel, latency, machine, memory, payload, report, ring, scale, steps, table, ways
from bench.__main__ import BENCHMARKS
from bench.__main__ import main as command
from bench.harness import ROOT, Outcome, Result, Row, run
from bench.part import Json, WrongAnswerError
from bench.report import FAILED

KIB, MIB = 1 << 10, 1 << 20

SMALL: Mapping[str, Mapping[str, Json]] = {
    "ring": {"capacity": MIB, "live": 20, "smallest": KIB, "largest": 4 * KIB, "blocks": 2},
    "channel": {"nbytes": 64 * KIB, "messages": 3},
    "steps": {"messages": 3},
    "memory": {"prompts": 2, "images": 2, "nbytes": MIB},
    "idle": {"seconds": 0.2},
    "tensor-parallel": {"plan": [[MIB, 2], [2 * MIB, 2]], "device": "cpu"},
    "table": {"layouts": ["8x4", "1x32"], "image": 64 * KIB},
    "latency": {"plan": [[4 * KIB, 3], [MIB, 2]]},
    "scale": {"messages": 3},
    "gpu": {"sizes": [MIB], "times": 3, "messages": 3, "prompts": 1, "plan": [[MIB, 2]]},
    "tcp": {"plan": [[MIB, 1]], "nbytes": 128 * MIB},
    "sockets": {"plan": [[MIB, 1]]},
    "vllm": {"side": 56},
    "vllm-turns": {"side": 56, "pairs": 1},
}
# A row takes processes of its own, and with all of them the suite takes minutes more.
APART = (
    *("idle", "latency", "memory", "scale", "sockets", "steps", "table", "tcp", "tensor-parallel"),
    *("vllm", "vllm-turns"),
)
RUN = [
    pytest.param(
        name, marks=pytest.mark.gpu if name == "gpu" else pytest.mark.stress if name in APART else ()
    )
    for name in BENCHMARKS
]
# What the other ways have in common with one of these need not be tried each time.
TRIED: Mapping[str, set[str]] = {
    "channel": {"loan", "pickle"},
    "steps": {"shm"},
    "table": {"loan", "segment", "torch fd"},
    "latency": {"floor", "shm", "zmq tcp"},
}


def small(name: str) -> list[Row]:
    """The first row of each column that is tried or, where there are none, of each part; made small."""
    rows: dict[object, Row] = {}
    for row in BENCHMARKS[name].rows(True):
        column = str(row.arguments.get("column", row.parts.get("near")))
        if column in TRIED.get(name, {column}):
            rows.setdefault((column, row.parts.get("near")), row)
    return [
        dataclasses.replace(row, arguments={**row.arguments, **smaller(name, row)}) for row in rows.values()
    ]


def smaller(name: str, row: Row) -> dict[str, Json]:
    """What to change; where rows have different arguments, each takes its own."""
    mixed = name in ("gpu", "tcp")
    return {key: value for key, value in SMALL[name].items() if not mixed or key in row.arguments}


@pytest.mark.parametrize("name", RUN)
def test_rows_run_and_every_answer_is_checked(name: str) -> None:
    rows = small(name)
    if name == "memory":
        assert {row.arguments["column"] for row in rows} >= {"shm", "loan", "frames", "pickle"}
    results = run(rows, rounds=1)
    assert [result.failure for result in results] == [row.lacking for row in rows]


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


@pytest.mark.parametrize("column", channel.COLUMNS)
def test_a_column_of_the_channel_can_be_measured_alone(column: str) -> None:
    rows = [row for row in channel.BENCHMARK.rows(True) if row.arguments["column"] == column]
    values: dict[str, Json] = {kind: [1000.0] for kind in ("floor", "column", "empty", "note")}
    good = Outcome(round=0, position=0, seconds=1.0, values=values, failure=None)
    grids = channel.BENCHMARK.show([Result(row=row, outcomes=[good]) for row in rows])
    assert [grid.columns[:3] for grid in grids] == [["", "floor", column], grids[1].columns[:3]]
    assert all(len(cells) == len(grid.columns) for grid in grids for cells in grid.rows)


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


def test_steps_of_both_ends_are_put_in_order_and_rare_ones_left_out() -> None:
    row = steps.BENCHMARK.rows(True)[0]
    near = {"called": 1_000_000, "send.put": 1_020_000, "answered": 1_090_000}
    far = {"receive.arrived": 1_050_000, "dropped": 1_060_000}
    values: dict[str, Json] = {
        "near": [{**near, "ring.grow": 1_001_000}, {**near, "answered": 1_110_000}, near],
        "far": [far, {**far, "receive.arrived": 1_030_000}, {"dropped": 1_080_000}],
    }
    (grid,) = steps.BENCHMARK.show([Result(row=row, outcomes=[_good(values)])])
    assert [[cell.split(" [")[0] for cell in cells] for cells in grid.rows] == [
        ["near send.put", "20.0", "20.0"],
        ["far receive.arrived", "40.0", "40.0"],
        ["far dropped", "20.0", "60.0"],
        ["near answered", "70.0", "90.0"],
    ]


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


def test_image_of_the_table_that_changed_is_noticed() -> None:
    words = np.arange(1024, dtype=np.int64)
    body = {"prompt": 0, "folds": [payload.fold(words)], "tensors": [torch.from_numpy(words)]}
    table._check(body, 0, 1, words.nbytes, 0.0)
    words[700] ^= 1
    with pytest.raises(WrongAnswerError, match="message 0: fold"):
        table._check(body, 0, 1, words.nbytes, 0.0)
    with pytest.raises(WrongAnswerError, match="has 1 images, not 2"):
        table._check(body, 0, 2, words.nbytes, 0.0)


def test_crash_of_a_far_end_that_near_started_is_a_failed_row() -> None:
    row = Row(
        name="crash",
        parts=ways.parts("torch fd"),
        arguments=ways.arguments("torch fd", "tests.bench.ends", nbytes=8, count=1),
    )
    (result,) = run([row], rounds=1)
    assert result.failure is not None
    assert "far: ended with status -9" in result.failure


def test_aims_of_the_table_are_judged_by_what_was_measured() -> None:
    rows = [row for row in table.BENCHMARK.rows(False) if row.name in ("shm, drain", "vllm rpc, drain")]

    def judged(ours: float) -> str:
        taken = {"shm, drain": ours, "vllm rpc, drain": 1.0}
        results = [Result(row=row, outcomes=[_good(_table_values(taken[row.name]))]) for row in rows]
        return table.BENCHMARK.show(results)[-1].notes[0]

    assert "0.40: met" in judged(0.4)
    assert "0.60: MISSED" in judged(0.6)


def test_scale_whose_tensors_did_not_come_through_the_ring_is_a_failed_row() -> None:
    parts = {"near": "tests.bench.ends:by_frames", "far": "bench.scale:far"}
    row = Row(
        name="frames", parts=parts, arguments={"column": "leases", "layout": "1", "step": 1, "messages": 1}
    )
    (result,) = run([row], rounds=1)
    assert result.failure is not None
    assert "far: WrongAnswerError: not everything came whole through the ring" in result.failure


def test_without_the_first_step_nothing_is_called_a_multiple_of_it() -> None:
    rows = [row for row in scale.BENCHMARK.rows(False) if row.arguments["column"] == "leases"]
    bad = Outcome(round=0, position=0, seconds=1.0, values={}, failure="far: killed by SIGKILL")
    results = [Result(row=row, outcomes=[_good({"us": [100.0 * at]})]) for at, row in enumerate(rows, 1)]
    (grid,) = scale.BENCHMARK.show(results)
    assert [cells[2] for cells in grid.rows] == ["1.00", "2.00", "3.00", "4.00", "5.00"]
    (grid,) = scale.BENCHMARK.show([Result(row=rows[0], outcomes=[bad]), *results[1:]])
    assert [cells[2] for cells in grid.rows] == [FAILED, "", "", "", ""]
    assert not grid.notes


def _table_values(seconds: float) -> Mapping[str, Json]:
    """Every layout takes as long as the others, in a second of its own, and a little more memory."""
    samples = [[float(at), 1.0, 1.0, 100e6 * at] for at in range(7)]
    figures = {"together seconds": seconds, "together making": 0.5, "together cpu": 1.0}
    figures |= {"together faults": 1000.0}
    return {
        "idle_from": 0.0,
        "idle_to": 0.5,
        "memory": {"samples": samples},
        "layouts": {
            layout: {**figures, "from": at - 0.4, "to": at + 0.4}
            for at, layout in enumerate(table.LAYOUTS, 1)
        },
    }


def test_a_layout_has_the_memory_of_its_own_time() -> None:
    (row,) = (row for row in table.BENCHMARK.rows(False) if row.name == "shm, drain")
    found = table.cells([Result(row=row, outcomes=[_good(_table_values(1.0))])])
    peaks = {str(each.row.arguments["layout"]): each.spread(table.peak).median for each in found}
    assert peaks == {layout: pytest.approx(0.1 * at) for at, layout in enumerate(table.LAYOUTS, 1)}


def test_a_layout_whose_memory_was_not_seen_for_long_is_refused() -> None:
    (row,) = (row for row in table.BENCHMARK.rows(False) if row.name == "shm, drain")
    values = dict(_table_values(1.0))
    seen = [[at / 20, 1.0, 1.0, 1.0] for at in range(140)]
    values["memory"] = {"samples": seen}
    assert row.accept is not None
    row.accept(values)
    values["memory"] = {"samples": [sample for sample in seen if not 1.83 < sample[0] < 2.27]}
    with pytest.raises(ValueError, match=r"4x8: memory was not sampled for 500 ms of 0\.80 s"):
        row.accept(values)
    good = Result(row=row, outcomes=[_good(values)])
    assert (
        "longest time between two samples: 500 ms (4x8 shm, drain)." in table.BENCHMARK.show([good])[0].notes
    )


def test_peer_that_is_not_there_is_a_line_and_no_failure() -> None:
    row = dataclasses.replace(table.BENCHMARK.rows(True)[0], lacking="vllm is not installed")
    (result,) = run([row], rounds=2)
    assert report.failures([result]) == []
    assert report.lacking([result]) == [f"{report.LACKING}: pickle: vllm is not installed"]
    assert table.BENCHMARK.show([result])[0].rows == [["pickle", report.LACKING, report.LACKING]]


def test_slices_of_a_run_are_put_together(tmp_path: Path) -> None:
    rows = channel.BENCHMARK.rows(True)[:2]
    pieces = []
    for number, row in enumerate([rows[0], rows[1], rows[0]]):
        values = {kind: [1.0 + number] for kind in ("floor", "column", "empty", "note")}
        file = tmp_path / f"{number}.json"
        report.write_json(
            file,
            "channel",
            {},
            _without_tables(channel.BENCHMARK),
            [Result(row=row, outcomes=[_good(values)])],
        )
        pieces.append(report.read_json(file, "channel", rows)[1])
    merged = report.in_order(report.merge(pieces), rows)
    assert [result.row for result in merged] == rows
    assert [len(result.outcomes) for result in merged] == [2, 1]
    with pytest.raises(ValueError, match="holds channel, not table"):
        report.read_json(file, "table", rows)
    other = [dataclasses.replace(row, arguments={**row.arguments, "messages": 1}) for row in rows]
    with pytest.raises(ValueError, match="other arguments"):
        report.read_json(file, "channel", other)


def test_what_another_machine_measured_is_shown_as_its_own(tmp_path: Path) -> None:
    row = channel.BENCHMARK.rows(True)[0]
    values: dict[str, Json] = {kind: [1.0] for kind in ("floor", "column", "empty", "note")}
    there = {**machine.describe(), "cpu": "Some Other CPU"}
    files = []
    for messages in (1, 2):
        elsewhere = dataclasses.replace(row, arguments={**row.arguments, "messages": messages})
        files.append(tmp_path / f"{messages}.json")
        report.write_json(
            files[-1],
            "channel",
            there,
            channel.BENCHMARK,
            [Result(row=elsewhere, outcomes=[_good(values)])],
        )
    shown = CliRunner().invoke(command, ["channel", "--rounds", "0", "--add", str(files[0])])
    assert shown.exit_code == 0
    assert "Some Other CPU" in shown.output
    mixed = [word for file in files for word in ("--add", str(file))]
    refused = CliRunner().invoke(command, ["channel", "--rounds", "0", *mixed])
    assert refused.exit_code == 2
    assert "different arguments" in refused.stderr


def _without_tables(benchmark: report.Benchmark) -> report.Benchmark:
    return dataclasses.replace(benchmark, show=lambda results: [])


@pytest.mark.parametrize(
    "name", ["latency", *(pytest.param(name, marks=pytest.mark.stress) for name in ("table", "scale"))]
)
def test_slices_are_shown_and_drawn_without_measuring_again(name: str, tmp_path: Path) -> None:
    values: dict[str, Json] = {**_table_values(1.0), "us": [3.0, 4.0]}
    values |= {"4 KiB": [30.0], "1 MiB": [200.0], "16 MiB": [2000.0]}
    results = [Result(row=row, outcomes=[_good(values)]) for row in BENCHMARKS[name].rows(True)]
    slices = tmp_path / "slices.json"
    report.write_json(slices, name, machine.describe(), BENCHMARKS[name], results)
    # In a process of its own: matplotlib keeps its fonts' files open.
    arguments = ["-m", "bench", name, "--quick", "--rounds", "0", "--add", str(slices)]
    shown = subprocess.run(
        [sys.executable, *arguments, "--figures", str(tmp_path / "drawn")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert FAILED not in shown.stdout
    drawn = list((tmp_path / "drawn").iterdir())
    assert {file.suffix for file in drawn} == {".svg", ".png"}
    assert all(1000 < file.stat().st_size < 200_000 for file in drawn)


DRAW = """
import importlib, sys
from pathlib import Path
import matplotlib
from bench import figures, report
matplotlib.rcParams["svg.fonttype"] = "none"
folder, name = Path(sys.argv[1]), sys.argv[2]
_, results = report.read_json(folder / "results.json", name, ())
for some in (results[:1], results):  # also where nothing is good
    importlib.import_module(f"bench.{name}").BENCHMARK.draw(some, folder, "caption")
"""


@pytest.mark.parametrize(
    "name", ["table", *(pytest.param(name, marks=pytest.mark.stress) for name in ("latency", "scale"))]
)
def test_pictures_say_what_failed_or_is_not_here_in_its_place(name: str, tmp_path: Path) -> None:
    values: dict[str, Json] = {**_table_values(1.0), "us": [3.0, 4.0]}
    values |= {size: [30.0] for size in map(latency.size, latency.SIZES)}
    bad = Outcome(round=0, position=0, seconds=1.0, values={}, failure="far: killed by SIGKILL")
    rows = BENCHMARKS[name].rows(False)[:3]
    if name == "table":  # one panel will do
        rows = [dataclasses.replace(row, arguments={**row.arguments, "layouts": ["1x32"]}) for row in rows]
    outcomes: list[list[Outcome]] = [[bad], [_good(values)], []]
    results = [Result(row=row, outcomes=each) for row, each in zip(rows, outcomes, strict=True)]
    benchmark = _without_tables(BENCHMARKS[name])
    report.write_json(tmp_path / "results.json", name, machine.describe(), benchmark, results)
    # In a process of its own: matplotlib keeps its fonts' files open.
    subprocess.run([sys.executable, "-c", DRAW, str(tmp_path), name], cwd=ROOT, check=True)
    pictures = list(tmp_path.glob("*.svg"))
    assert pictures
    for picture in pictures:
        assert FAILED in picture.read_text()
        assert report.LACKING in picture.read_text()


DRAW_LATENCY = """
import sys
from pathlib import Path
import matplotlib
from bench import figures
matplotlib.rcParams["svg.fonttype"] = "none"
lines = {"floor": [(4096, 10.0)], "shm": [(4096, 20.0), (1 << 20, 500.0)], "frames": [(1 << 20, 900.0)]}
figures.latency(Path(sys.argv[1]), lines, "caption")
"""


def test_what_has_no_floor_is_no_multiple_of_it(tmp_path: Path) -> None:
    """As where slices of several layouts are shown together."""
    subprocess.run([sys.executable, "-c", DRAW_LATENCY, str(tmp_path / "latency")], cwd=ROOT, check=True)
    picture = (tmp_path / "latency.svg").read_text()
    assert "no line: tensorferry frames (copy on write) not at a size of the floor" in picture
    assert "4 KiB" in picture
    assert "1 MiB" not in picture


def test_row_that_is_not_there_is_refused_with_those_that_are() -> None:
    refused = CliRunner().invoke(command, ["scale", "--rows", "leases,nonsense"])
    assert refused.exit_code == 2
    assert "nonsense: there is only leases, peers, readers, ring MiB, tensors" in refused.stderr


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"benchmark": "scale"}'])
def test_file_that_json_did_not_write_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "other").write_text(text)
    refused = CliRunner().invoke(command, ["scale", "--add", str(tmp_path / "other")])
    assert refused.exit_code == 2
    assert "is not what --json wrote" in refused.stderr


def test_file_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    refused = CliRunner().invoke(command, ["scale", "--json", str(tmp_path / "missing" / "a.json")])
    assert refused.exit_code == 2
    assert f"there is no folder {tmp_path / 'missing'}" in refused.stderr
