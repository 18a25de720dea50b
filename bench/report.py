"""How results are shown: tables and a progress bar on the terminal, everything raw as JSON."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from bench.harness import Outcome, Result, Row, Spread
from bench.part import Json

FAILED = "FAILED"
LACKING = "not here"
_ALWAYS = float("inf")


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A table of text: `rows` as wide as `columns`, and lines of prose (aims met or missed) under it."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What `python -m bench NAME` runs: `rows(quick)` are measured, `show(results)` makes tables of them.

    `draw(results, folder, caption)` makes pictures, with the caption in small print, and returns their files;
    a row that failed or is lacking has that written where its figure would be.
    `wrong(results)`: a line for whatever good rows contradict each other in; as bad as a row that failed.
    """

    title: str
    method: str
    rows: Callable[[bool], Sequence[Row]]
    show: Callable[[Sequence[Result]], Sequence[Grid]]
    draw: Callable[[Sequence[Result], Path, str], Sequence[Path]] | None = None
    wrong: Callable[[Sequence[Result]], Sequence[str]] = lambda _: ()


def figure(spread: Spread, *, digits: int = 3) -> str:
    """Median and, in brackets, the lowest and the highest round."""
    shown = [_short(value, digits) for value in (spread.median, spread.low, spread.high)]
    return f"{shown[0]} [{shown[1]}..{shown[2]}]"


def _short(value: float, digits: int) -> str:
    """`digits` significant digits, never in exponents."""
    if value == 0:
        return "0"
    whole = len(str(int(abs(value))))
    return f"{value:,.{max(0, digits - whole)}f}"


def cell(result: Result | None, text: Callable[[Result], str]) -> str:
    """What stands in a table for a row: its text, that it failed, that it can't be run here, or nothing."""
    if result is None:
        return ""
    return text(result) if result.failure is None else word(result)


def word(result: Result) -> str:
    """What is said of a row that has no figure: that it failed, or can't be run here."""
    return FAILED if result.outcomes else LACKING


def spread_or_word(result: Result, measure: Callable[[Mapping[str, Json]], float]) -> Spread | str:
    """What a picture shows of a row: its figure, or in its place that it failed or can't be run here."""
    return result.spread(measure) if result.failure is None else word(result)


def met(good: bool) -> str:
    """What is said of an aim."""
    return "met" if good else "MISSED"


def table(
    title: str, results: Sequence[Result], keys: tuple[str, str], text: Callable[[Result], str]
) -> Grid:
    """A grid of all results by two of their arguments: the first downwards, the second across."""
    down, across = (list(dict.fromkeys(str(r.row.arguments[key]) for r in results)) for key in keys)
    place = {tuple(str(r.row.arguments[key]) for key in keys): r for r in results}
    rows = [[name, *(cell(place.get((name, column)), text) for column in across)] for name in down]
    return Grid(title=title, columns=["", *across], rows=rows)


def failures(results: Sequence[Result]) -> list[str]:
    """One line for each row that has no figure."""
    return [
        f"{FAILED} {result.row.name}: {result.failure}"
        for result in results
        if result.failure is not None and result.outcomes
    ]


def lacking(results: Sequence[Result]) -> list[str]:
    """One line for each reason why rows can't be measured here."""
    without = [result for result in results if not result.outcomes]
    reasons = dict.fromkeys((str(r.row.arguments.get("column", r.row.name)), r.failure) for r in without)
    return [f"{LACKING}: {column}: {reason}" for column, reason in reasons]


@contextlib.contextmanager
def progress(
    console: Console, total: int, *, clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[[Row, Outcome], None]]:
    """A progress bar over `total` row runs; the callable yielded advances it."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
    )
    # A row may take minutes, and rows differ: the time left is judged by all of them, not by the last 30 s.
    with Progress(*columns, console=console, speed_estimate_period=_ALWAYS, get_time=clock) as bar:
        task = bar.add_task("starting", total=total)

        def done(row: Row, outcome: Outcome) -> None:
            bar.update(task, advance=1, description=f"round {outcome.round + 1}, {row.name}")
            if outcome.failure is not None:
                bar.console.print(f"[red]{FAILED}[/red] {escape(row.name)}: {escape(outcome.failure)}")

        yield done


def show(
    console: Console, machine: Mapping[str, str], benchmark: Benchmark, results: Sequence[Result]
) -> None:
    """Print machine, method, tables and failures."""
    console.print(" | ".join(f"[dim]{escape(name)}[/dim] {escape(value)}" for name, value in machine.items()))
    console.print(f"\n[dim]{escape(benchmark.method)}[/dim]\n")
    for grid in benchmark.show(results):
        table = Table(*map(escape, grid.columns), title=escape(grid.title), title_justify="left")
        for column in table.columns[1:]:
            column.justify = "right"
        for cells in grid.rows:
            table.add_row(*(f"[red]{cell}[/red]" if cell == FAILED else escape(cell) for cell in cells))
        console.print(table)
        for note in grid.notes:
            console.print(escape(note))
        console.print()
    for line in lacking(results):
        console.print(escape(line), style="yellow")
    for line in [*failures(results), *benchmark.wrong(results)]:
        console.print(escape(line), style="red")


def read_json(path: Path, name: str, rows: Sequence[Row]) -> tuple[dict[str, str], list[Result]]:
    """The machine and the results that `write_json` wrote for `name`; rows are those of `rows`, if there.

    ValueError when the file is of another benchmark or program, or a row had other arguments than in `rows`.
    """
    try:
        document = json.loads(path.read_text())
        benchmark, machine, entries = (document[key] for key in ("benchmark", "machine", "rows"))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not what --json wrote: {error!r}") from None
    if benchmark != name:
        raise ValueError(f"{path} holds {benchmark}, not {name}")
    known = {row.name: row for row in rows}
    results = []
    for entry in entries:
        row = known.get(entry["row"]["name"], Row(**entry["row"]))
        if json.loads(json.dumps(row.arguments)) != entry["row"]["arguments"]:
            raise ValueError(f"{path}: {row.name} was measured with other arguments than it has now")
        results.append(Result(row=row, outcomes=[Outcome(**outcome) for outcome in entry["outcomes"]]))
    return machine, results


def merge(pieces: Sequence[Sequence[Result]]) -> list[Result]:
    """All rounds of all pieces, row by row. ValueError when a row had other arguments in another piece."""
    rows: dict[str, Row] = {}
    outcomes: dict[str, list[Outcome]] = {}
    for result in (result for piece in pieces for result in piece):
        if rows.setdefault(result.row.name, result.row).arguments != result.row.arguments:
            raise ValueError(f"{result.row.name} was measured with different arguments: these are two rows")
        outcomes.setdefault(result.row.name, []).extend(result.outcomes)
    return [Result(row=rows[name], outcomes=tuple(outcomes[name])) for name in rows]


def in_order(results: Sequence[Result], rows: Sequence[Row]) -> list[Result]:
    """In the order in which a benchmark lists its rows, whatever order they were measured in."""
    place = {row.name: number for number, row in enumerate(rows)}
    return sorted(results, key=lambda result: place.get(result.row.name, len(place)))


def _raw(result: Result) -> dict[str, object]:
    row = {"name": result.row.name, "parts": result.row.parts, "arguments": result.row.arguments}
    return {"row": row, "outcomes": [asdict(outcome) for outcome in result.outcomes]}


def write_json(
    path: Path, name: str, machine: Mapping[str, str], benchmark: Benchmark, results: Sequence[Result]
) -> None:
    """Write everything, raw samples included, to `path`; renamed into place."""
    document = {
        "benchmark": name,
        "title": benchmark.title,
        "method": benchmark.method,
        "machine": machine,
        "tables": [asdict(grid) for grid in benchmark.show(results)],
        "failures": failures(results),
        "wrong": list(benchmark.wrong(results)),
        "lacking": lacking(results),
        "rows": [_raw(result) for result in results],
    }
    draft = path.with_name(f"{path.name}.draft")
    draft.write_text(json.dumps(document, indent=1))
    os.replace(draft, path)
