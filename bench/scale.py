"""What a message costs as the work grows: leases held, readers, ring, peers, tensors in the message."""

from __future__ import annotations

import contextlib
import os
import random
import select
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import transport
from bench import links, payload, report
from bench.floor import TIMEOUT
from bench.harness import Result, Row, number, numbers
from bench.part import Json, Report, WrongAnswerError
from bench.peers.baselines import leave, wait_for
from bench.report import Benchmark, Grid, cell, figure, met

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
MESSAGES, QUICK_MESSAGES, WARM = 300, 30, 10
AIM = 3.0

# What grows → its steps, and what is held fixed: bytes of a tensor, of the ring.
AXES: Mapping[str, tuple[tuple[int, ...], int, int]] = {
    "leases": ((1, 10, 100, 1_000, 10_000), 16 * KIB, GIB),
    "readers": ((1, 2, 4, 8), MIB, GIB),
    "ring MiB": ((64, 256, 1024, 4096, 8192), MIB, 0),
    "peers": ((1, 4, 16, 64), 64 * KIB, GIB),
    "tensors": ((1, 10, 100, 1_000, 10_000), KIB, GIB),
}

METHOD = f"""\
A front end sends messages with tensors through its ring, the reader looks at three words of each
tensor, drops it and answers. Times are from the call of send to the last answer, in µs, at the front
end; {MESSAGES} messages a round (fewer where one has 1,000 tensors and more) after {WARM} whose every byte is
checked. One thing grows: "leases": the reader keeps so many messages and drops one of them, drawn
at random, for each that comes (16 KiB each); "readers": one message to so many processes (1 MiB);
"ring MiB": the size of the ring (1 MiB); "peers": so many endpoints, all in one process beside the
front end, one of which, drawn at random, is sent to (64 KiB); "tensors": so many of 1 KiB in one
message, in µs for each tensor. Each row is fresh processes each round. Figures: median
[lowest..highest round] of the medians of the rounds."""


def _config(axis: str, step: int, **more: Json) -> transport.TransportConfig:
    ring = step * MIB if axis == "ring MiB" else AXES[axis][2]
    return transport.TransportConfig(backend="shm", ring_bytes=ring, **more)  # type: ignore[arg-type]


def _peers(axis: str, step: int) -> int:
    return step if axis in ("readers", "peers") else 1


def near(folder: Path, *, column: str, layout: str, step: int, messages: int) -> Report:
    """The front end: microseconds of every message."""
    nbytes = AXES[column][1]
    tensors = [torch.zeros(nbytes // 8, dtype=torch.int64) for _ in range(step if column == "tensors" else 1)]
    draw = random.Random(step)
    taken, expected = [], 0
    with transport.listen(f"ipc://{folder}/near", config=_config(column, step)) as front:
        leave(folder, "listening", "")
        front.wait_for_peers(_peers(column, step), timeout=3 * TIMEOUT)
        names = [peer.name for peer in front.peers]
        filling = step if column == "leases" else 0
        admitting = names if column == "peers" else []
        for number in range(len(admitting) + filling + WARM + messages):
            to = names if column == "readers" else [draw.choice(names)]
            if number < len(admitting):  # each proves once that it maps the ring
                to = [admitting[number]]
            seconds = _exchange(front, to, number, tensors, checked=number < len(admitting) + filling + WARM)
            expected += len(to) * len(tensors)
            taken.append(seconds * 1e6)
        for name in names:
            front.send({"stop": True}, to=name, timeout=TIMEOUT)
    return Report(values={"us": taken[-messages:]}, expected=expected)


def _exchange(
    front: transport.Endpoint, to: Sequence[str], number: int, tensors: list[torch.Tensor], *, checked: bool
) -> float:
    for place, tensor in enumerate(tensors):
        payload.stamp(tensor.numpy(), number + place)
    body = {"n": number, "tensors": tensors}
    if checked:
        body["crcs"] = [payload.checksum(tensor.numpy()) for tensor in tensors]
    start = time.perf_counter()
    front.send(body, to=list(to), timeout=TIMEOUT)
    for _ in to:
        answer = front.receive(timeout=TIMEOUT).body
        if answer != number:
            raise WrongAnswerError(f"message {number} was answered with {answer}")
    return time.perf_counter() - start


def far(folder: Path, *, column: str, layout: str, step: int, messages: int) -> Report:
    """The readers of one process: all the peers, or one of several."""
    wait_for(folder, "listening")
    names = [f"far {os.getpid()} {number}" for number in range(step if column == "peers" else 1)]
    held: list[Mapping[str, object]] = []
    draw, verified = random.Random(step), 0
    with contextlib.ExitStack() as stack:
        config = transport.TransportConfig(handshake_timeout=TIMEOUT)
        by_fd = {}
        for name in names:
            endpoint = transport.connect(f"ipc://{folder}/near", name=name, config=config)
            stack.enter_context(endpoint)
            by_fd[endpoint.fileno()] = endpoint
        endpoints = list(by_fd.values())
        patience = 0.0 if len(names) > 1 else TIMEOUT
        while by_fd:
            for descriptor in _ready(list(by_fd)):
                try:
                    body = by_fd[descriptor].receive(timeout=patience).body
                except transport.Timeout:  # it was readable for something that is no message
                    if patience:
                        raise
                    continue
                if "stop" in body:
                    del by_fd[descriptor]
                    continue
                verified += _check(body)
                number = body["n"]
                if column == "leases":
                    if len(held) == step:
                        held[draw.randrange(step)] = body
                    else:
                        held.append(body)
                del body
                by_fd[descriptor].send(number, timeout=TIMEOUT)
        held.clear()
        for endpoint in endpoints:
            links.check_ring(endpoint)
    return Report(verified=verified)


def _ready(descriptors: Sequence[int]) -> list[int]:
    """Those that have something to receive; the one there is need not be asked."""
    if len(descriptors) == 1:
        return list(descriptors)
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    ready = [descriptor for descriptor, _ in poll.poll(TIMEOUT * 1000)]
    if not ready:
        raise TimeoutError(f"no peer was sent anything in {TIMEOUT:g} s")
    return ready


def _check(body: Mapping[str, Any]) -> int:
    """Check every tensor of a message; how many were good."""
    for place, tensor in enumerate(body["tensors"]):
        words = tensor.numpy()
        payload.check_stamp(words, body["n"] + place)
        if "crcs" in body:
            payload.check(words, body["n"], body["crcs"][place])
    return len(body["tensors"])


def _rows(quick: bool) -> list[Row]:
    rows = []
    for axis, (steps, _, _) in AXES.items():
        for step in (steps[0], steps[-2]) if quick else steps:
            fars = range(step if axis == "readers" else 1)
            most = QUICK_MESSAGES if quick else MESSAGES
            messages = max(10, min(most, 20_000 // step)) if axis == "tensors" else most
            rows.append(
                Row(
                    name=f"{axis} {step:,}",
                    parts={"near": "bench.scale:near", **{f"far{i}": "bench.scale:far" for i in fars}},
                    arguments={"column": axis, "layout": f"{step}", "step": step, "messages": messages},
                )
            )
    return rows


def _cost(result: Result) -> Callable[[Mapping[str, Json]], float]:
    """Median of a round, µs; for "tensors" of each tensor."""
    step = result.row.arguments["step"]
    share = step if result.row.arguments["column"] == "tensors" else 1
    return lambda values: statistics.median(numbers(values["us"])) / number(share)


def _show(results: Sequence[Result]) -> list[Grid]:
    grids = []
    for axis in AXES:
        chosen = [result for result in results if result.row.arguments["column"] == axis]
        if chosen:
            grids.append(_grid(axis, chosen))
    return grids


def _grid(axis: str, chosen: Sequence[Result]) -> Grid:
    costs = [result.spread(_cost(result)).median for result in chosen if result.failure is None]
    # Without the first there is nothing to compare with; the second would make it look flatter.
    first = costs[0] if chosen[0].failure is None else None
    rows = [
        [
            f"{result.row.arguments['step']:,}",
            cell(result, lambda r: figure(r.spread(_cost(r)))),
            cell(result, lambda r: f"{r.spread(_cost(r)).median / first:.2f}" if first else ""),
        ]
        for result in chosen
    ]
    notes = []
    if len(costs) == len(AXES[axis][0]) and axis == "leases":
        ratio = max(costs) / costs[0]
        notes.append(f"aim: 1 to 10,000 live leases within {AIM:g}x. {ratio:.2f}: {met(ratio <= AIM)}.")
    unit = "µs a tensor" if axis == "tensors" else "µs a message"
    return Grid(title=f"scale: {axis}", columns=[axis, unit, "to the first"], rows=rows, notes=notes)


def _draw(results: Sequence[Result], folder: Path, caption: str) -> list[Path]:
    from bench import figures  # matplotlib is an extra

    curves = {
        axis: [
            (number(r.row.arguments["step"]), report.spread_or_word(r, _cost(r)))
            for r in results
            if r.row.arguments["column"] == axis
        ]
        for axis in AXES
    }
    return figures.scale(folder / "scale", {axis: curve for axis, curve in curves.items() if curve}, caption)


BENCHMARK = Benchmark(
    title="cost of a message: 1 to 10,000 leases, 1 to 8 readers, rings to 8 GiB, 64 peers, 10,000 tensors",
    method=METHOD,
    rows=_rows,
    show=_show,
    draw=_draw,
)
