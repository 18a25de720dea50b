"""Where the time of one message goes: its steps at both ends, as the transport's own `trace` tells them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from pathlib import Path

import numpy as np
import torch

from bench import links, payload
from bench.harness import Result, Row
from bench.part import Json, Report, WrongAnswerError
from bench.report import FAILED, Benchmark, Grid, figure

KIB, MIB = 1 << 10, 1 << 20
COLUMNS = ("shm", "loan")
# Bytes, and timed messages in a round.
SIZES = {"64 KiB": (64 * KIB, 100), "16 MiB": (16 * MIB, 30)}
QUICK_SIZES = {"64 KiB": (64 * KIB, 20), "16 MiB": (16 * MIB, 5)}
WARM = 8

METHOD = f"""\
Near sends one int64 tensor, far checks three words of it, drops it and answers with a small body. Both ends
have a `trace`, which keeps when each step happened by the monotonic clock, one for both processes; that costs
some µs a message, so the whole is not to be compared with other tables. A step counts the first time that it
happens in a message; one that happens in fewer than half of the messages (reclaim, growth) is left out. "near
called" is the call of send (the fill of a loan comes before it), "near answered" the return of receive.
{WARM} messages of each row are not counted; far checks the CRC-32 of every byte in those. A step is measured
from the one before it at the same end, far's first from the call; they stand in the order in which they
happen, and those of both ends overlap: a large tensor is announced before it is written. Each row is a fresh
process pair each round. Figures: median [lowest..highest round] of the medians of the rounds' messages."""

Times = dict[str, int]  # step → nanoseconds


class _Watch:
    """A `trace` that keeps the first time of each step since `begin`."""

    def __init__(self) -> None:
        self._times: Times = {}

    def __call__(self, event: str, ns: int, _fields: Mapping[str, object]) -> None:
        self._times.setdefault(event, ns)

    def begin(self) -> None:
        self._times = {}

    def mark(self, event: str) -> None:
        """A step of our own."""
        self(event, time.monotonic_ns(), {})

    def taken(self) -> Times:
        return dict(self._times)


def near(folder: Path, *, column: str, nbytes: int, messages: int) -> Report:
    """The sending end: the steps of each message."""
    watch, taken = _Watch(), []
    link = links.open_near(folder, column, trace=watch)
    assert isinstance(link, links.EndpointLink)
    source: payload.Words = np.empty(nbytes // 8, np.int64)
    payload.fill(source, nbytes)
    tensor = torch.from_numpy(source)
    with closing(link):
        for number in range(WARM + messages):
            payload.stamp(source, number)
            checksum = payload.checksum(source) if number < WARM else -1
            with link.loan(tensor.shape) if column == "loan" else nullcontext(tensor) as place:
                if place is not tensor:
                    np.copyto(place.numpy(), source)
                watch.begin()
                watch.mark("called")
                link.send({"n": number, "crc": checksum, "data": place})
                answer = link.receive()
                watch.mark("answered")
            if answer["n"] != number:
                raise WrongAnswerError(f"message {number} was answered with {answer['n']}")
            taken.append(watch.taken())
    return Report(values={"near": taken[WARM:]}, expected=WARM + messages)


def far(folder: Path, *, column: str, nbytes: int, messages: int) -> Report:
    """The receiving end: checks and answers each message, and tells its steps here."""
    watch, taken = _Watch(), []
    with closing(links.open_far(folder, column, trace=watch)) as link:
        for number in range(WARM + messages):
            watch.begin()
            body = link.receive()
            words = body["data"].numpy()
            if words.nbytes != nbytes:
                raise WrongAnswerError(f"message {number}: {words.nbytes} bytes, not {nbytes}")
            payload.check_stamp(words, number)
            if number < WARM:
                payload.check(words, number, body["crc"])
            del words, body
            watch.mark("dropped")
            link.send({"n": number})
            taken.append(watch.taken())
        link.check_way()
    return Report(values={"far": taken[WARM:]}, verified=WARM + messages)


def _rows(quick: bool) -> list[Row]:
    return [
        Row(
            name=f"{column} {size}",
            parts={"near": "bench.steps:near", "far": "bench.steps:far"},
            arguments={"column": column, "nbytes": nbytes, "messages": messages},
        )
        for size, (nbytes, messages) in (QUICK_SIZES if quick else SIZES).items()
        for column in COLUMNS
    ]


def _messages(values: Mapping[str, Json]) -> list[Times]:
    """The steps of both ends, each message's together, in µs after the call of send."""
    ends = []
    for end in ("near", "far"):
        series = values[end]
        assert isinstance(series, Sequence)
        ends.append([{f"{end} {step}": ns for step, ns in dict(one).items()} for one in series])  # type: ignore[arg-type]
    return [both_near | both_far for both_near, both_far in zip(*ends, strict=True)]


def _median(step: str, since: str) -> Callable[[Mapping[str, Json]], float]:
    """µs from one step to another in the messages of a round that have both."""
    return lambda values: statistics.median(
        (message[step] - message[since]) / 1000
        for message in _messages(values)
        if step in message and since in message
    )


def _order(result: Result) -> list[str]:
    """The steps of most messages in every round, in the order in which they happen: the call first."""
    rounds = [_messages(outcome.values) for outcome in result.outcomes]
    steps = {step for messages in rounds for message in messages for step in message}
    usual = [
        step
        for step in sorted(steps)
        if all(2 * sum(step in message for message in messages) >= len(messages) for messages in rounds)
    ]
    return sorted(usual, key=lambda step: result.spread(_median(step, "near called")).median)


def _grid(result: Result) -> Grid:
    rows = [["all", FAILED, FAILED]]
    if result.failure is None:
        called, *others = _order(result)
        last = dict.fromkeys(("near", "far"), called)
        rows = []
        for step in others:
            end = step.partition(" ")[0]
            times = [result.spread(_median(step, since)) for since in (last[end], called)]
            rows.append([step, *map(figure, times)])
            last[end] = step
    return Grid(title=f"steps: {result.row.name}", columns=["", "step, µs", "since the call, µs"], rows=rows)


BENCHMARK = Benchmark(
    title="the steps of one message at both ends, 64 KiB and 16 MiB, shm and loan: µs from one to the next",
    method=METHOD,
    rows=_rows,
    show=lambda results: [_grid(result) for result in results],
)
