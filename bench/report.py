"""How results are shown: tables and a progress bar on the terminal, everything raw as JSON."""

from __future__ import annotations

import contextlib
import json
import os
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

FAILED = "FAILED"


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A table of text: `rows` as wide as `columns`, and lines of prose (aims met or missed) under it."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What `python -m bench NAME` runs: `rows(quick)` are measured, `show(results)` makes tables of them."""

    title: str
    method: str
    rows: Callable[[bool], Sequence[Row]]
    show: Callable[[Sequence[Result]], Sequence[Grid]]


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


def failures(results: Sequence[Result]) -> list[str]:
    """One line for each row that has no figure."""
    return [
        f"{FAILED} {result.row.name}: {result.failure}" for result in results if result.failure is not None
    ]


@contextlib.contextmanager
def progress(console: Console, total: int) -> Iterator[Callable[[Row, Outcome], None]]:
    """A progress bar over `total` row runs; the callable yielded advances it."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
    )
    with Progress(*columns, console=console) as bar:
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
    for line in failures(results):
        console.print(escape(line), style="red")


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
        "rows": [_raw(result) for result in results],
    }
    draft = path.with_name(f"{path.name}.draft")
    draft.write_text(json.dumps(document, indent=1))
    os.replace(draft, path)
