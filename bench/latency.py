"""The round trip of one tensor, 4 KiB to 256 MiB, by tensorferry and by everything else, beside the floor."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from bench import links, payload, ways
from bench.harness import Result, Row, numbers
from bench.part import Json, Report, WrongAnswerError
from bench.report import Benchmark, Grid, cell, met, word

KIB, MIB = 1 << 10, 1 << 20
# Size → timed messages in a round.
SIZES: Mapping[int, int] = {
    4 * KIB: 300,
    64 * KIB: 300,
    MIB: 100,
    16 * MIB: 24,
    64 * MIB: 8,
    256 * MIB: 4,
}
QUICK_SIZES: Mapping[int, int] = {4 * KIB: 30, MIB: 20, 16 * MIB: 4}
WARM = 3
COLUMNS = (
    "floor",
    "shm",
    "iceoryx2",
    "iceoryx2 spin",
    "frames",
    "zmq ipc",
    "zmq tcp",
    "zenoh",
    "segment",
    "torch fd",
    "torch fs",
    "vllm rpc",
    "vllm torch_shm",
    "vllm shm store",
    "ray",
    "pickle",
)

METHOD = f"""\
Near sends one int64 vector, made anew each time, far looks at three words of it (the number of the
message), drops it and answers with a small message; timed at near from the call of send to the
answer. All sizes of one way follow each other, smallest first, in one pair of processes, fresh
each round; before the timed messages of a size come {WARM} whose every byte is checked by CRC-32.
"floor" copies into one warm place that both map (np.copyto, one thread) and rings through zmq; nothing
with one copy by one thread and zmq as its doorbell is faster, something with a faster doorbell may be.
Timed are
{", ".join(f"{n} of {s // KIB:,} KiB" for s, n in SIZES.items())}.
Figures: µs, medians of the rounds of p50 and p99 within a round (with fewer than 100 messages p99 is
nearly the highest)."""


def near(folder: Path, link: links.Link, *, plan: Sequence[tuple[int, int]]) -> Report:
    """The sending end: microseconds of every round trip, by size."""
    times: dict[str, Json] = {}
    number = 0
    for nbytes, messages in plan:
        source: payload.Words = np.empty(nbytes // 8, np.int64)
        payload.fill(source, nbytes)
        taken = []
        for turn in range(WARM + messages):
            number += 1
            payload.stamp(source, number)
            # Another one each time, as in an engine: torch_shm moves it to shared memory at its first send.
            body = {"n": number, "tensors": [torch.from_numpy(source.copy())]}
            if turn < WARM:
                body["crc"] = payload.checksum(source)
            start = time.perf_counter()
            link.send(body)
            answer = link.receive()
            taken.append((time.perf_counter() - start) * 1e6)
            if answer["n"] != number:
                raise WrongAnswerError(f"message {number} was answered with {answer['n']}")
        times[size(nbytes)] = taken[WARM:]
    return Report(values=times, expected=number)


def far(folder: Path, link: links.Link, *, plan: Sequence[tuple[int, int]]) -> Report:
    """The receiving end: checks and answers every message."""
    number = 0
    for nbytes, messages in plan:
        for _ in range(WARM + messages):
            number += 1
            _check(link.receive(), number, nbytes)
            link.send({"n": number})
    link.check_way()
    return Report(verified=number)


def _check(body: links.Body, number: int, nbytes: int) -> None:
    words = body["tensors"][0].numpy()
    if body["n"] != number or words.nbytes != nbytes:
        raise WrongAnswerError(f"message {number}: got {body['n']} with {words.nbytes} bytes, not {nbytes}")
    payload.check_stamp(words, number)
    if "crc" in body:
        payload.check(words, number, body["crc"])


def size(nbytes: int) -> str:
    """How a size is written."""
    return f"{nbytes // MIB} MiB" if nbytes >= MIB else f"{nbytes // KIB} KiB"


def _rows(quick: bool) -> list[Row]:
    plan = list((QUICK_SIZES if quick else SIZES).items())
    return [
        Row(
            name=way,
            parts=ways.parts(way),
            arguments=ways.arguments(way, "bench.latency", nbytes=max(plan)[0], count=1, plan=plan),
            lacking=ways.lacking(way),
        )
        for way in COLUMNS
    ]


def p50(name: str) -> Callable[[Mapping[str, Json]], float]:
    """The median of one size within a round."""
    return lambda values: statistics.median(numbers(values[name]))


def p99(name: str) -> Callable[[Mapping[str, Json]], float]:
    """The 99th percentile of one size within a round."""
    return lambda values: float(np.quantile(numbers(values[name]), 0.99))


def sizes(results: Sequence[Result]) -> list[str]:
    """The sizes that were measured."""
    plans = [plan for result in results if isinstance(plan := result.row.arguments["plan"], Sequence)]
    measured = {numbers(pair)[0] for plan in plans for pair in plan}
    return [size(nbytes) for nbytes in SIZES if nbytes in measured]


def _show(results: Sequence[Result]) -> list[Grid]:
    names = sizes(results)
    columns = ["", *names]
    return [
        Grid(
            title="latency: round trip, p50, µs [rounds]",
            columns=columns,
            rows=[_line(result, names, p50) for result in results],
            notes=_verdicts(results),
        ),
        Grid(
            title="latency: round trip, p99, µs [rounds]",
            columns=columns,
            rows=[_line(result, names, p99) for result in results],
        ),
    ]


def _line(
    result: Result, names: Sequence[str], measure: Callable[[str], Callable[[Mapping[str, Json]], float]]
) -> list[str]:
    texts = (functools.partial(_text, measure=measure(name)) for name in names)
    return [result.row.name, *(cell(result, text) for text in texts)]


def _text(result: Result, measure: Callable[[Mapping[str, Json]], float]) -> str:
    spread = result.spread(measure)
    return f"{spread.median:,.0f} [{spread.low:,.0f}..{spread.high:,.0f}]"


def _verdicts(results: Sequence[Result]) -> list[str]:
    good = {result.row.name: result for result in results if result.failure is None}
    notes = []
    for name, aim in (("16 MiB", 1.0), ("64 KiB", 2.0)):
        if {"shm", "iceoryx2"} <= good.keys() and name in sizes(results):
            ours, theirs = (good[way].spread(p50(name)).median for way in ("shm", "iceoryx2"))
            ratio = ours / theirs
            notes.append(
                f"aim: {name} within {aim:g}x of iceoryx2 blocking. {ratio:.2f}: {met(ratio <= aim)}."
            )
    return notes


def _draw(results: Sequence[Result], folder: Path, caption: str) -> list[Path]:
    from bench import figures  # matplotlib is an extra

    lines: dict[str, figures.Line] = {
        r.row.name: [
            (nbytes, r.spread(p50(size(nbytes))).median) for nbytes in SIZES if size(nbytes) in sizes([r])
        ]
        if r.failure is None
        else word(r)
        for r in results
    }
    return figures.latency(folder / "latency", lines, caption)


BENCHMARK = Benchmark(
    title="round trip of a tensor, 4 KiB to 256 MiB, beside iceoryx2, zenoh, zmq, torch, vLLM, Ray, floor",
    method=METHOD,
    rows=_rows,
    show=_show,
    draw=_draw,
)
