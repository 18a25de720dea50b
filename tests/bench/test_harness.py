"""The harness shows what failed as failed, with the reason, and never as a number."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from bench import harness, machine, report, sampler
from bench.__main__ import main as command
from bench.harness import Outcome, Result, Row, Spread, number, numbers, run

MIB = 1 << 20


def row(name: str, *parts: str, limit: float = 60.0, **arguments: str | int) -> Row:
    """A row of functions in `tests.bench.parts`."""
    calls = {role: f"tests.bench.parts:{role}" for role in parts}
    return Row(name=name, parts=calls, arguments=arguments, limit=limit)


def only(result: Result) -> Outcome:
    """The one round of a row that was run once."""
    (outcome,) = result.outcomes
    return outcome


def test_every_round_has_fresh_processes_and_an_empty_folder() -> None:
    (result,) = run([row("pair", "expects", "checks")], rounds=3)
    assert result.failure is None
    pids = [outcome.values[role] for outcome in result.outcomes for role in ("near", "far")]
    assert len(set(pids)) == 6
    assert os.getpid() not in pids
    folders = [(outcome.values["near folder"], outcome.values["far folder"]) for outcome in result.outcomes]
    assert all(near == far for near, far in folders)
    assert len(set(folders)) == 3
    assert not any(Path(str(near)).exists() for near, _ in folders)


def test_order_is_shuffled_anew_in_each_round() -> None:
    rows = [row(f"row {index}", "good") for index in range(4)]
    heard: list[tuple[int, str]] = []
    results = run(rows, rounds=3, seed=1, done=lambda row, outcome: heard.append((outcome.round, row.name)))
    orders = [[name for round_, name in heard if round_ == number_] for number_ in range(3)]
    assert [sorted(order) for order in orders] == [sorted(row.name for row in rows)] * 3
    assert len({tuple(order) for order in orders}) > 1
    places = [
        [orders[outcome.round].index(result.row.name) for outcome in result.outcomes] for result in results
    ]
    assert places == [[outcome.position for outcome in result.outcomes] for result in results]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("wrong", "wrong: WrongAnswerError: message 3: checksum 7, not 9"),
        ("killed", "killed: killed by SIGKILL"),
        ("faulted", "faulted: killed by SIGSEGV (Fatal Python error: Segmentation fault)"),
        ("silent", "silent: ended with status 0 and no result"),
        ("missing", "missing: AttributeError: module 'tests.bench.parts' has no attribute 'missing'"),
    ],
)
def test_a_bad_part_is_a_failed_row_and_the_others_go_on(bad: str, reason: str) -> None:
    failed, fine = run([row("bad", bad, "good"), row("fine", "good")], rounds=1, seed=3)
    assert failed.failure is not None
    assert reason in failed.failure
    assert only(failed).values == {}
    assert fine.failure is None
    assert isinstance(only(fine).values["pid"], int)


def test_fewer_answers_checked_than_sent_is_a_failed_row() -> None:
    (short,) = run([row("short", "expects", "checks", verified=4)], rounds=1)
    assert short.failure == "1 of 1 rounds: 5 answers expected, 4 checked"
    (nothing,) = run([row("nothing", "good", answers=0)], rounds=1)
    assert nothing.failure == "1 of 1 rounds: 0 answers expected, 0 checked"


def test_two_parts_that_report_the_same_value_are_a_failed_row() -> None:
    parts = {"a": "tests.bench.parts:good", "b": "tests.bench.parts:good"}
    (result,) = run([Row(name="twice", parts=parts)], rounds=1)
    assert result.failure == "1 of 1 rounds: two parts report pid, pid folder"


def test_time_out_names_who_is_late_and_ends_its_children_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note, wait = tmp_path / "pid", harness._wait

    def wait_once_it_has_a_child(children: Any, *, limit: float) -> str | None:
        deadline = time.monotonic() + 60
        while not note.exists():
            assert time.monotonic() < deadline, "it starts no child"
            time.sleep(0.01)
        return wait(children, limit=limit)

    monkeypatch.setattr(harness, "_wait", wait_once_it_has_a_child)
    (result,) = run([row("late", "endless", limit=0.5, note=str(note))], rounds=1)
    assert result.failure == "1 of 1 rounds: endless: not done after 0.5 s"
    # The group was sent SIGKILL; the orphan may take a moment to die, and wait to be reaped by init.
    stat = Path(f"/proc/{note.read_text()}/stat")
    deadline = time.monotonic() + 10
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        while stat.read_text().rpartition(")")[2].split()[0] not in "ZX":
            assert time.monotonic() < deadline, "it lives"
            time.sleep(0.01)


def test_one_bad_round_makes_the_row_failed_and_gives_no_number(tmp_path: Path) -> None:
    (result,) = run([row("once", "fails_once", mark=str(tmp_path / "mark"))], rounds=3)
    assert result.failure == "1 of 3 rounds: fails_once: RuntimeError: the first time"
    with pytest.raises(ValueError, match="once failed: 1 of 3 rounds"):
        result.spread(lambda values: number(values["figure"]))


def test_values_that_do_not_suffice_are_a_failed_row() -> None:
    def refuse(values: object) -> None:
        raise ValueError("no sample")

    (result,) = run([dataclasses.replace(row("refused", "good"), accept=refuse)], rounds=1)
    assert result.failure == "1 of 1 rounds: the values do not suffice: no sample"
    assert only(result).values == {}


def test_rows_of_the_same_name_are_refused() -> None:
    with pytest.raises(ValueError, match="same name"):
        run([row("same", "good"), row("same", "good")], rounds=1)


def test_spread_is_taken_over_the_rounds() -> None:
    figures = [3.0, 1.0, 2.0, 9.0, 4.0]
    result = Result(row=row("given"), outcomes=[given({"us": [figure, figure]}) for figure in figures])
    assert result.spread(lambda values: sum(numbers(values["us"]))) == Spread(median=6.0, low=2.0, high=18.0)


def given(values: dict[str, list[float]], failure: str | None = None) -> Outcome:
    """A round that was not run."""
    return Outcome(round=0, position=0, seconds=1.0, values=values, failure=failure)


@pytest.mark.parametrize("value", [None, "12", [], [1.0, "2"], {"a": 1}])
def test_what_is_not_a_series_of_numbers_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="expected a series"):
        numbers(value)  # type: ignore[arg-type]  # the point of the test


def _grids(results: object) -> list[report.Grid]:
    return [
        report.Grid(
            title="T", columns=["row", "us"], rows=[["a", "1.0"], ["b", report.FAILED]], notes=["aim met"]
        )
    ]


def test_report_shows_failures_and_json_holds_everything_raw(tmp_path: Path) -> None:
    results = [
        Result(row=row("a"), outcomes=[given({"us": [1.25]})]),
        Result(row=row("b"), outcomes=[given({}, failure="far: [broken]")]),
    ]
    benchmark = report.Benchmark(title="t", method="m", rows=lambda quick: [], show=_grids)
    out, file = io.StringIO(), tmp_path / "out.json"
    surroundings = machine.describe()
    report.show(Console(file=out, width=150), surroundings, benchmark, results)
    report.write_json(file, "name", surroundings, benchmark, results)
    shown = out.getvalue()
    assert "FAILED b: 1 of 1 rounds: far: [broken]" in shown
    assert "aim met" in shown
    document = json.loads(file.read_text())
    assert document["rows"][0]["outcomes"][0]["values"] == {"us": [1.25]}
    assert document["rows"][1]["outcomes"][0]["failure"] == "far: [broken]"
    assert document["failures"] == ["FAILED b: 1 of 1 rounds: far: [broken]"]
    assert {"cpu", "cores", "memory", "kernel", "python", *machine.DISTRIBUTIONS} <= document[
        "machine"
    ].keys()
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("value", "shown"),
    [(1234567.0, "1,234,567"), (123.4, "123"), (12.345, "12.3"), (0.1234, "0.12"), (0.0, "0")],
)
def test_figures_are_short_and_never_in_exponents(value: float, shown: str) -> None:
    assert report.figure(Spread(median=value, low=0.0, high=0.0)) == f"{shown} [0..0]"


@contextlib.contextmanager
def shared_file(size: int) -> Iterator[str]:
    """The name of an untouched file of `size` bytes in /dev/shm."""
    path = Path("/dev/shm") / f"tfbench-test.{secrets.token_hex(8)}"
    path.touch(mode=0o600, exist_ok=False)
    try:
        os.truncate(path, size)
        yield path.name
    finally:
        path.unlink()


HOLDER = """
import mmap, os, sys
private, name = int(sys.argv[1]), sys.argv[2]
block = mmap.mmap(-1, private, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
descriptor = os.open("/dev/shm/" + name, os.O_RDWR)
shared = mmap.mmap(descriptor, 0)
for line in sys.stdin:
    target = block if line == "private\\n" else shared
    for offset in range(0, len(target) // int(sys.argv[3]), mmap.PAGESIZE):
        target[offset] = 1
    print("done", flush=True)
"""


@contextlib.contextmanager
def holder(private: int, name: str, *, fraction: int) -> Iterator[subprocess.Popen[str]]:
    """A process that writes a part of its private and of the named shared memory when told to."""
    arguments = [str(private), name, str(fraction)]
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


def tell(process: subprocess.Popen[str], order: str) -> None:
    """Give an order and wait until it is carried out."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{order}\n")
    process.stdin.flush()
    assert process.stdout.readline() == "done\n"


def test_sampler_counts_shared_pages_once_and_untouched_ones_too() -> None:
    with (
        shared_file(32 * MIB) as name,
        holder(16 * MIB, name, fraction=1) as one,
        holder(16 * MIB, name, fraction=2) as two,
    ):
        segments, pids = sampler.Segments(), [one.pid, two.pid]
        for process in (one, two):
            tell(process, "private")
        before = sampler.sample(pids, segments)
        tell(two, "shared")
        half = sampler.sample(pids, segments)
        tell(one, "shared")
        whole = sampler.sample(pids, segments)
        alone = sampler.sample([two.pid], sampler.Segments())
    assert before[1] >= (16 + 8) * MIB
    assert abs(half[3] - before[3] - 16 * MIB) <= MIB
    assert abs(whole[3] - before[3] - 32 * MIB) <= MIB
    assert abs(whole[1] - before[1]) <= MIB
    # Half of the file is in nobody's page table of this tree, and allocated all the same.
    assert alone[3] == whole[3]
    assert before[0] < half[0] < whole[0]


def test_sampler_sees_shared_memory_without_a_name_beside_named_when_both_are_mixed() -> None:
    with (
        shared_file(8 * MIB) as named,
        shared_file(32 * MIB) as name,
        holder(MIB, named, fraction=1) as one,
        holder(MIB, name, fraction=1) as two,
    ):
        for process in (one, two):
            tell(process, "private")  # it has mapped its file
        path = Path("/dev/shm", name)
        path.unlink()  # as torch shares tensors
        for process in (one, two):
            tell(process, "shared")
        pids = [one.pid, two.pid]
        either = sampler.sample(pids, sampler.Segments())
        both = sampler.sample(pids, sampler.Segments(), mixed=True)
        path.touch()  # for the one who removes it
    assert abs(either[3] - 8 * MIB) <= MIB
    assert both[3] >= 40 * MIB


def test_sampler_survives_processes_that_are_gone() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert sampler.sample([process.pid], sampler.Segments())[1:] == (0, 0, 0)


def test_a_row_that_asks_for_it_is_sampled() -> None:
    parts = {"seen": "tests.bench.parts:seen"}
    (result,) = run([Row(name="sampled", parts=parts, sample_memory=True)], rounds=1)
    assert result.failure is None
    memory = only(result).values["memory"]
    assert isinstance(memory, dict)
    assert memory["columns"] == list(sampler.COLUMNS)
    samples = memory["samples"]
    assert isinstance(samples, list)
    assert len(samples) >= 3
    assert all(len(numbers(sample)) == len(sampler.COLUMNS) for sample in samples)


def test_progress_bar_tells_the_time_left_of_rows_that_take_minutes() -> None:
    now, out = 0.0, io.StringIO()
    console = Console(file=out, width=150, force_terminal=True, color_system=None)
    with report.progress(console, 4, clock=lambda: now) as done:
        for _ in range(3):
            now += 100.0
            done(row("slow"), given({}))
    assert "left 0:01:40" in out.getvalue().rpartition("\r")[2]


def test_list_of_benchmarks_and_unknown_name() -> None:
    listed = CliRunner().invoke(command, [])
    assert all(name in listed.stdout for name in ("ring", "channel", "memory"))
    unknown = CliRunner().invoke(command, ["chanel"])
    assert unknown.exit_code == 2
    assert "chanel" in unknown.stderr


def test_pieces_measured_apart_have_orders_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    draws: list[int] = []

    def ran(rows: list[Row], *, seed: int, **_: Any) -> list[Result]:
        draws.append(seed)
        return [Result(row=row, outcomes=()) for row in rows]

    monkeypatch.setattr("bench.__main__.run", ran)
    for _ in range(3):
        CliRunner().invoke(command, ["ring", "--quick", "--rounds", "1"])
    assert len(set(draws)) == 3
