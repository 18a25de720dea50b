"""``python -m bench NAME [--rounds N] [--json FILE] [--quick]``; without a name the list of benchmarks."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from bench import channel, gpu, idle, machine, memory, report, ring, tensor_parallel
from bench.harness import run

BENCHMARKS = {
    "ring": ring.BENCHMARK,
    "channel": channel.BENCHMARK,
    "memory": memory.BENCHMARK,
    "idle": idle.BENCHMARK,
    "gpu": gpu.BENCHMARK,
    "tensor-parallel": tensor_parallel.BENCHMARK,
}

_FILE = click.Path(dir_okay=False, path_type=Path)

# Wide enough for every table when the output is a file; a terminal keeps its own width.
_FILE_WIDTH = 150


def _console(*, stderr: bool = False) -> Console:
    console = Console(stderr=stderr, highlight=False)
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, width=_FILE_WIDTH)


@click.command(help=__doc__)
@click.argument("name", required=False, type=click.Choice(list(BENCHMARKS)))
@click.option("--rounds", type=click.IntRange(min=1), help="Rounds of every row [7; with --quick 3].")
@click.option("--json", "file", type=_FILE, help="Write everything, raw samples included, to FILE.")
@click.option("--quick", is_flag=True, help="Few rows, few messages: to see that it works, not to quote.")
def main(*, name: str | None, rounds: int | None, file: Path | None, quick: bool) -> None:
    """Run one benchmark; status 1 if any row failed."""
    console = _console()
    if name is None:
        listing = Table("name", "measures", title="python -m bench NAME", title_justify="left")
        for known, benchmark in BENCHMARKS.items():
            listing.add_row(known, benchmark.title)
        console.print(listing)
        return
    benchmark = BENCHMARKS[name]
    rows = benchmark.rows(quick)
    rounds = rounds or (3 if quick else 7)
    surroundings = {**machine.describe(), "rounds": str(rounds)}
    if quick:
        surroundings["quick"] = "not to be quoted"
    with report.progress(_console(stderr=True), len(rows) * rounds) as done:
        results = run(rows, rounds=rounds, done=done)
    report.show(console, surroundings, benchmark, results)
    if file is not None:
        report.write_json(file, name, surroundings, benchmark, results)
    sys.exit(1 if report.failures(results) else 0)


if __name__ == "__main__":
    main(prog_name="python -m bench")
