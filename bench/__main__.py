"""``python -m bench NAME`` runs a benchmark; without a name it lists them.

A long one can be run in slices: ``--rows`` and ``--layouts`` choose rows, ``--json`` keeps what was measured,
``--add`` takes it in again, and ``--rounds 0`` only shows what was added.
"""

from __future__ import annotations

import dataclasses
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from bench import (
    channel,
    gpu,
    idle,
    latency,
    machine,
    memory,
    report,
    ring,
    scale,
    sockets,
    steps,
    table,
    tcp,
    tensor_parallel,
    vllm_hops,
    vllm_turns,
)
from bench.harness import Result, Row, run

BENCHMARKS = {
    "ring": ring.BENCHMARK,
    "channel": channel.BENCHMARK,
    "steps": steps.BENCHMARK,
    "memory": memory.BENCHMARK,
    "idle": idle.BENCHMARK,
    "gpu": gpu.BENCHMARK,
    "tensor-parallel": tensor_parallel.BENCHMARK,
    "table": table.BENCHMARK,
    "latency": latency.BENCHMARK,
    "scale": scale.BENCHMARK,
    "tcp": tcp.BENCHMARK,
    "sockets": sockets.BENCHMARK,
    "vllm": vllm_hops.BENCHMARK,
    "vllm-turns": vllm_turns.BENCHMARK,
}

_OLD = click.Path(exists=True, dir_okay=False, path_type=Path)
_FOLDER = click.Path(file_okay=False, path_type=Path)
_FILE = click.Path(dir_okay=False, writable=True, path_type=Path)

# Wide enough for every table when the output is a file; a terminal keeps its own width.
_FILE_WIDTH = 150


def _console(*, stderr: bool = False) -> Console:
    console = Console(stderr=stderr, highlight=False)
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, width=_FILE_WIDTH)


@click.command(help=__doc__)
@click.argument("name", required=False, type=click.Choice(list(BENCHMARKS)))
@click.option("--rounds", type=click.IntRange(min=0), help="Rounds of every row [7; with --quick 3].")
@click.option("--rows", "columns", metavar="A,B", help="Only these ways (the first column of the tables).")
@click.option("--layouts", metavar="A,B", help="Only these layouts, sizes or scales (the table's columns).")
@click.option("--json", "file", type=_FILE, help="Write everything, raw samples included, to FILE.")
@click.option("--add", "pieces", type=_OLD, multiple=True, help="Take in what --json wrote; repeatable.")
@click.option("--figures", type=_FOLDER, help="Draw pictures, SVG and PNG, into this folder.")
@click.option("--quick", is_flag=True, help="Few rows, few messages: to see that it works, not to quote.")
def main(
    *,
    name: str | None,
    rounds: int | None,
    columns: str | None,
    layouts: str | None,
    file: Path | None,
    pieces: tuple[Path, ...],
    figures: Path | None,
    quick: bool,
) -> None:
    """Run one benchmark; status 1 if any row failed or rows contradict each other."""
    console = _console()
    if name is None:
        _list(console)
        return
    benchmark = BENCHMARKS[name]
    if file is not None and not file.absolute().parent.is_dir():  # not found out after the first round
        raise click.BadParameter(f"there is no folder {file.absolute().parent}", param_hint="--json")
    every = benchmark.rows(quick)
    rows = _chosen(_chosen(every, "column", columns), "layout", layouts)
    chosen = {row.name: row for row in rows}
    every = [chosen.get(row.name, row) for row in every]
    rounds = (3 if quick else 7) if rounds is None else rounds
    # What is only shown may have been measured elsewhere, where rows have other arguments: with a GPU, say.
    try:
        older = [report.read_json(piece, name, every if rounds else ()) for piece in pieces]
        report.merge([piece for _, piece in older])
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--add") from None
    here = older[0][0] if older and not rounds else machine.describe()
    surroundings = {**here, "rounds": str(rounds)}
    if quick:
        surroundings["quick"] = "not to be quoted"
    for number, (there, _) in enumerate(older):
        surroundings[f"added {number + 1}"] = "; ".join(there[key] for key in ("date", "load", "command"))
    measured = [piece for _, piece in older]
    seed = random.randrange(1 << 32)  # of pieces that are put together none may have the order of another
    with report.progress(_console(stderr=True), sum(row.lacking is None for row in rows) * rounds) as done:
        for first in range(rounds):
            measured.append(run(rows, rounds=1, first=first, seed=seed, done=done))
            if file is not None:  # after every round: what is interrupted is not lost
                report.write_json(file, name, surroundings, benchmark, _merged(measured, every))
    results = _merged(measured, every)
    report.show(console, surroundings, benchmark, results)
    if file is not None:
        report.write_json(file, name, surroundings, benchmark, results)
    if figures is not None and benchmark.draw is not None:
        figures.mkdir(parents=True, exist_ok=True)
        for drawn in benchmark.draw(results, figures, _caption(name, surroundings, results)):
            console.print(f"wrote {drawn}")
    sys.exit(1 if report.failures(results) or benchmark.wrong(results) else 0)


def _merged(measured: Sequence[Sequence[Result]], every: Sequence[Row]) -> list[Result]:
    return report.in_order(report.merge(measured), every)


def _caption(name: str, surroundings: Mapping[str, str], results: Sequence[Result]) -> str:
    """What must stand beside every figure, in one line."""
    counts = sorted({len(result.outcomes) for result in results if result.outcomes}) or [0]
    rounds = f"{counts[0]} to {counts[-1]} rounds" if len(counts) > 1 else f"{counts[0]} rounds"
    kernel = surroundings["kernel"].partition("-")[0]
    where = f"{surroundings['cpu']}, {surroundings['cores']} cores, Linux {kernel}"
    return f"{where}; {rounds}, {surroundings['date'][:10]}; python -m bench {name}"


def _list(console: Console) -> None:
    listing = Table("name", "measures", title="python -m bench NAME", title_justify="left")
    for known, benchmark in BENCHMARKS.items():
        listing.add_row(known, benchmark.title)
    console.print(listing)


def _chosen(rows: Sequence[Row], key: str, names: str | None) -> Sequence[Row]:
    """The rows whose argument `key` is one of `names`, or all of them. A row that measures several one after
    the other has a list of them, named `key` + "s", and keeps those that are chosen.
    """
    if names is None:
        return rows
    wanted = {word.strip() for word in names.split(",")}
    there = {name for row in rows for name in _several(row, key)}
    if wanted - there:
        unknown, known = (", ".join(sorted(each)) for each in (wanted - there, there))
        raise click.UsageError(f"{unknown}: there is only {known}")
    kept = [(row, [name for name in _several(row, key) if name in wanted]) for row in rows]
    return [
        dataclasses.replace(row, arguments={**row.arguments, f"{key}s": some})
        if f"{key}s" in row.arguments
        else row
        for row, some in kept
        if some
    ]


def _several(row: Row, key: str) -> list[str]:
    """The value of an argument, or those of the argument that lists several."""
    several = row.arguments.get(f"{key}s")
    one = row.arguments.get(key)
    return [str(each) for each in several] if isinstance(several, list | tuple) else [str(one)]


if __name__ == "__main__":
    main(prog_name="python -m bench")
