"""Real vLLM: the whole time of an answer by the ring and by vLLM's own way, in turns in one vLLM."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from bench.harness import Result, Row, Spread, numbers
from bench.hops.measure import ROLE
from bench.hops.turns import FIGURES, OWN, RING
from bench.part import Json
from bench.report import Benchmark, Grid, cell, figure
from bench.vllm_hops import LIMIT, LIMIT_WITHOUT_GPU, QUICK_SIDE, SIDE, lacking, layouts_in, layouts_of

COLUMNS = ("tensorferry", "tensorferry + cache")
LAYOUTS, QUICK_LAYOUTS = ("8x4", "1x32"), ("2x2",)
PAIRS, QUICK_PAIRS = 7, 2

METHOD = f"""\
Every row is one vLLM with the plugin, set up as in `bench vllm`. It gets each layout, prompts x images of
{SIDE} x {SIDE} pixels, {PAIRS} times by the ring and as often by vLLM's own way, for which the plugin is told
that no tensor suits it, now the one first and now the other; fresh images each time. So the machine and this
vLLM are the same for both. Each time it is asked twice in a row and the second time counts, which then meets
what a prompt of its own kind left behind in memory.
whole    from asking to the last answer.
made     until the first request is sent: its images are made into tensors.
hop 1    from entering _send_input until decoded in the EngineCore, summed over the prompts.
rest     after the last request is decoded: the model.
less     by how much the ring takes less, pair by pair.
Figures: ms, median [lowest..highest] of the pairs of all rounds."""


def _rows(quick: bool) -> list[Row]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return [
        Row(
            name=column,
            parts={ROLE: "bench.hops.turns:measure"},
            arguments={
                "column": column,
                "layouts": list(QUICK_LAYOUTS if quick else LAYOUTS),
                "side": QUICK_SIDE if quick else SIDE,
                "pairs": QUICK_PAIRS if quick else PAIRS,
                "device": device,
            },
            limit=2 * (LIMIT if device == "cuda" else LIMIT_WITHOUT_GPU),
            lacking=lacking(column, device),
        )
        for column in COLUMNS
    ]


def _show(results: Sequence[Result]) -> list[Grid]:
    layouts = layouts_in(results)
    return [
        Grid(
            title=f"vllm-turns: {what}, ms",
            columns=["", *layouts],
            rows=[row for result in results for row in _lines(result, what, layouts)],
        )
        for what in FIGURES
    ]


def _lines(result: Result, what: str, layouts: Sequence[str]) -> list[list[str]]:
    def text(layout: str, series: Callable[[Result, str, str], list[float]]) -> str:
        if layout not in layouts_of(result):
            return ""
        return cell(result, lambda good: figure(Spread.of(series(good, layout, what))))

    own = result.row.name.replace(RING, OWN)
    names = {own: _own, result.row.name: _ring, f"{result.row.name}, less": _less}
    return [[name, *(text(layout, series) for layout in layouts)] for name, series in names.items()]


def _own(result: Result, layout: str, what: str) -> list[float]:
    return _series(result, layout, OWN, what)


def _ring(result: Result, layout: str, what: str) -> list[float]:
    return _series(result, layout, RING, what)


def _less(result: Result, layout: str, what: str) -> list[float]:
    pairs = zip(_own(result, layout, what), _ring(result, layout, what), strict=True)
    return [own - ring for own, ring in pairs]


def _series(result: Result, layout: str, way: str, what: str) -> list[float]:
    return [
        one
        for outcome in result.outcomes
        for one in numbers(_at(outcome.values, "layouts", layout, way, what))
    ]


def _at(value: Json, *path: str) -> Json:
    for name in path:
        assert isinstance(value, Mapping)
        value = value[name]
    return value


BENCHMARK = Benchmark(
    title="real vLLM: whole answers by tensorferry and by vLLM's own way in turns, in one vLLM",
    method=METHOD,
    rows=_rows,
    show=_show,
)
