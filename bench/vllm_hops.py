"""Real vLLM: what images cost between its processes, with and without tensorferry's plugin."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata

import torch

from bench.harness import Result, Row, Spread, number, numbers
from bench.hops.asking import difference, distinct
from bench.hops.measure import EXECUTORS, FRONT, IPC, READERS, ROLE, WARM, WORKERS, parted, through
from bench.part import Json
from bench.report import Benchmark, Grid, cell, figure, met

COLUMNS = (
    *IPC,
    *(f"{ipc} + {executor}" for executor in EXECUTORS if executor for ipc in ("direct_rpc", "tensorferry")),
)
LAYOUTS, QUICK_LAYOUTS = ("8x4", "4x8", "2x16", "1x32"), ("2x2", "1x4")
SIDE, QUICK_SIDE = 1000, 280
REPEATS, QUICK_REPEATS = {"sampled": 2, "timed": 3}, {"sampled": 1, "timed": 2}
# Seconds: a cold start alone may take two minutes; without a GPU 32 images take half a minute.
LIMIT, LIMIT_WITHOUT_GPU = 300.0, 1800.0
FIRST_AIM, SECOND_AIM = 1 / 3, 1 / 10
_UNITS = {"peak": 1e6, "seconds": 1e-3}  # as shown (MB, ms) of what is kept (bytes, seconds); else ms

METHOD = f"""\
Every row starts one vLLM (a model of Qwen2-VL's shape with random weights, no caches, eager, one prompt
in a step) and gives it each layout, prompts x images of noise, {SIDE} x {SIDE} pixels (5184 x 1176 values:
12.2 MB in bfloat16, without a GPU 24.4 MB in float32): fresh images each time, the same in every row.
{REPEATS["sampled"]} times with the memory sampler, which slows vLLM, then {REPEATS["timed"]} times
without: times are those of the latter. A plugin of the benchmark's own notes them inside of vLLM.
hop 1    a request from entering _send_input in the front end until it is decoded in its EngineCore,
         summed over the prompts; "all": from the first request's start to the last one's end, with the
         making of the prompts between them; "blocked": in _send_input, where the front end does nothing else.
hop 2    with worker processes: a message with images from handing it to the executor until the last
         worker has it unpickled, summed; not the time for which a worker was still busy with its last step.
whole    from asking vLLM to its last answer: the first prompt made, hop 1 "all", and what comes after the
         last request is decoded (hop 2, the model).
memory   the highest sum, over all processes, of the proportional set size; shared memory counts once;
         of each round the higher of its repeats.
mp: one worker process; tp2: tensor parallel, two; dp2: data parallel, two engines under AsyncLLM; cache: with
vLLM's cache of images, 4 GiB as by default, which the EngineCore keeps and which no image is met in.
Figures: median [lowest..highest] of the repeats of all rounds."""

Values = Mapping[str, Json]


def _rows(quick: bool) -> list[Row]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    common: dict[str, Json] = {
        "layouts": list(QUICK_LAYOUTS if quick else LAYOUTS),
        "side": QUICK_SIDE if quick else SIDE,
        **(QUICK_REPEATS if quick else REPEATS),
        "device": device,
    }
    return [
        Row(
            name=column,
            parts={ROLE: "bench.hops.measure:measure"},
            arguments={"column": column, **common},
            limit=LIMIT if device == "cuda" else LIMIT_WITHOUT_GPU,
            accept=_took_the_ring(column),
            lacking=lacking(column, device),
        )
        for column in COLUMNS
    ]


def lacking(column: str, device: str) -> str | None:
    """Why a row that starts such a vLLM can't be measured here."""
    ipc, executor = parted(column)
    if importlib.util.find_spec("vllm") is None:
        return "vllm is not installed: `make .venv-vllm/installed`, then run with .venv-vllm/bin/python"
    plugin = metadata.entry_points(group="vllm.general_plugins", name="tensorferry")
    if ipc == "tensorferry" and not plugin:
        return "tensorferry's plugin is not there: pip install tensorferry"
    if device == "cpu" and importlib.util.find_spec("tensorferry_dry_platform") is None:
        return "no GPU: put tests/vllm/platform on PYTHONPATH"
    if device == "cuda" and executor in ("tp2", "dp2") and torch.cuda.device_count() < 2:
        return "needs two GPUs"
    return None


def _took_the_ring(column: str) -> Callable[[Values], None] | None:
    """What the values of a row must say: its images took the ring, except the first ones, which come before
    every process has mapped it.
    """
    ipc, executor = parted(column)
    if ipc != "tensorferry":
        return None

    def accept(values: Values) -> None:
        went, images = values["ways"], number(values["images"])
        assert isinstance(went, Mapping)
        counted = {str(way): numbers(counts) for way, counts in went.items()}
        for hop in (FRONT, *([WORKERS] if executor in READERS else [])):
            if not images - WARM <= (taken := through(counted, hop)) <= images:
                raise ValueError(f"{hop}: {taken:.0f} of {images:.0f} images took the ring: {dict(went)}")

    return accept


# ---------------------------------------------------------------------- figures


def _of(values: Values, layout: str) -> Values:
    layouts = values["layouts"]
    assert isinstance(layouts, Mapping)
    found = layouts[layout]
    assert isinstance(found, Mapping)
    return found


def _series(result: Result, layout: str, what: str) -> list[float]:
    """All repeats of all rounds; of a peak the highest of each round, since later repeats have more."""
    rounds = [numbers(_of(outcome.values, layout)[what]) for outcome in result.outcomes]
    return [max(each) for each in rounds] if what == "peak" else [one for each in rounds for one in each]


def _spread(result: Result, layout: str, what: str) -> Spread:
    scale = _UNITS.get(what, 1.0)
    return Spread.of([value / scale for value in _series(result, layout, what)])


def layouts_in(results: Sequence[Result]) -> list[str]:
    """Those of all rows."""
    return list(dict.fromkeys(layout for result in results for layout in layouts_of(result)))


def layouts_of(result: Result) -> list[str]:
    """Those that the row was asked for."""
    layouts = result.row.arguments["layouts"]
    assert isinstance(layouts, Sequence)
    return [str(layout) for layout in layouts]


def _grid(title: str, results: Sequence[Result], what: str, notes: Sequence[str] = ()) -> Grid:
    layouts = layouts_in(results)

    def text(result: Result, layout: str) -> str:
        if layout not in layouts_of(result):
            return ""
        return cell(result, lambda good: figure(_spread(good, layout, what)))

    rows = [[result.row.name, *(text(result, layout) for layout in layouts)] for result in results]
    return Grid(title=f"vllm: {title}", columns=["", *layouts], rows=rows, notes=notes)


def _show(results: Sequence[Result]) -> list[Grid]:
    workers = [result for result in results if parted(result.row.name)[1] in READERS]
    grids = [
        _grid("hop 1, front end to EngineCore, ms", results, "hop 1", _first_aims(results)),
        _grid("hop 1, all, ms", results, "span"),
        _grid("hop 1, front end blocked, ms", results, "blocked"),
        _grid("hop 2, EngineCore to workers, ms", workers, "hop 2", _second_aims(results)),
        _grid("whole, ms", results, "seconds"),
        _grid("whole: until the first request is sent, ms", _with("made", results), "made"),
        _grid("whole: after the last one is decoded, ms", _with("rest", results), "rest"),
        _grid("peak memory, MB", results, "peak", [*_memory_aims(results), *_outputs(results)]),
    ]
    return [grid for grid in grids if grid.rows]


def _with(what: str, results: Sequence[Result]) -> list[Result]:
    """Without those that were measured before this figure was."""
    return [
        result
        for result in results
        if all(
            what in _of(o.values, layout)
            for o in result.outcomes
            if not o.failure
            for layout in layouts_of(result)
        )
    ]


# ---------------------------------------------------------------------- aims


def _pairs(results: Sequence[Result]) -> Iterator[tuple[Result, Result, list[str]]]:
    """Every row of tensorferry, the stock row of the same executor, and the layouts that both have."""
    good = {result.row.name: result for result in results if result.failure is None}
    for name, ours in good.items():
        ipc, _ = parted(name)
        stock = good.get(name.replace(ipc, "direct_rpc"))
        if ipc == "tensorferry" and stock is not None:
            yield ours, stock, [layout for layout in layouts_of(ours) if layout in layouts_of(stock)]


def _first_aims(results: Sequence[Result]) -> list[str]:
    good = {result.row.name: result for result in results if result.failure is None}
    stock = [good[name] for name in ("direct_rpc", "torch_shm") if name in good]
    layout = LAYOUTS[-1]
    if "tensorferry" not in good or not stock or not all(layout in layouts_of(r) for r in good.values()):
        return []
    best = min(stock, key=lambda result: _spread(result, layout, "hop 1").median)
    ratio = _ratio(good["tensorferry"], best, layout, "hop 1")
    known = " and ".join(result.row.name for result in stock)
    return [
        f"aim: {layout} at most {FIRST_AIM:.2f} of the better of {known}."
        f" Of {best.row.name} {ratio:.2f}: {met(ratio <= FIRST_AIM)}."
    ]


def _second_aims(results: Sequence[Result]) -> list[str]:
    return [
        _aim(f"at most {SECOND_AIM:.2f} of", ours, stock, layouts, "hop 2", SECOND_AIM)
        for ours, stock, layouts in _pairs(results)
        if layouts and parted(ours.row.name)[1] in READERS
    ]


def _memory_aims(results: Sequence[Result]) -> list[str]:
    pairs = [pair for pair in _pairs(results) if pair[2]]
    return [_aim("not above", ours, stock, layouts, "peak", 1.0) for ours, stock, layouts in pairs]


def _aim(aim: str, ours: Result, stock: Result, layouts: Sequence[str], what: str, limit: float) -> str:
    ratios = {layout: _ratio(ours, stock, layout, what) for layout in layouts}
    said = ", ".join(f"{layout} {ratio:.3f}" for layout, ratio in ratios.items())
    return f"aim: {ours.row.name} {aim} {stock.row.name}. {said}: {met(max(ratios.values()) <= limit)}."


def _ratio(ours: Result, stock: Result, layout: str, what: str) -> float:
    return _spread(ours, layout, what).median / _spread(stock, layout, what).median


# ---------------------------------------------------------------------- what was generated


def _answers(result: Result, layout: str) -> list[list[Json]]:
    """Of each round: all answers to the layout, repeat by repeat."""
    rounds = []
    for outcome in result.outcomes:
        said = _of(outcome.values, layout)["said"]
        assert isinstance(said, Sequence)
        rounds.append([answer for repeat in said for answer in _list(repeat)])
    return rounds


def _list(value: Json) -> list[Json]:
    assert isinstance(value, Sequence)
    return list(value)


def _apart(ours: Result, stock: Result, layouts: Sequence[str]) -> float:
    """The largest difference between any round of the one and any of the other."""
    differences = [
        difference(_list(one), _list(other))
        for layout in layouts
        for said in _answers(ours, layout)
        for expected in _answers(stock, layout)
        for one, other in zip(said, expected, strict=True)
    ]
    return max(differences, key=lambda d: math.inf if math.isnan(d) else d)


def _outputs(results: Sequence[Result]) -> list[str]:
    lines = []
    for ours, stock, layouts in _pairs(results):
        if layouts and _apart(ours, stock, layouts) == 0:
            count = sum(len(_answers(ours, layout)[0]) for layout in layouts)
            lines.append(
                f"outputs of {ours.row.name} are those of {stock.row.name}: {count} prompts, to the bit."
            )
    return [*lines, *_wrong(results)]


def _wrong(results: Sequence[Result]) -> list[str]:
    """What should be the same and is not, and what should not be and is."""
    lines = []
    for ours, stock, layouts in _pairs(results):
        if layouts and (apart := _apart(ours, stock, layouts)) != 0:
            how = "other tokens" if apart == math.inf else f"logits by up to {apart:g}"
            lines.append(f"OUTPUTS DIFFER: {ours.row.name} from {stock.row.name}: {how}")
    for result in results:
        if result.failure is None:
            said = [_list(one) for layout in layouts_of(result) for one in _answers(result, layout)[0]]
            if not distinct(said):
                lines.append(f"OUTPUTS ARE ALIKE: {result.row.name} says the same to different images")
    return lines


BENCHMARK = Benchmark(
    title="real vLLM: images from front end to EngineCore and workers, with and without tensorferry",
    method=METHOD,
    rows=_rows,
    show=_show,
    wrong=_wrong,
)
