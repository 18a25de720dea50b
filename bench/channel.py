"""The round trip of one tensor between two processes, by every way, beside the floor of this machine."""

from __future__ import annotations

import contextlib
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from bench import floor, links, payload
from bench.harness import Result, Row, numbers
from bench.part import Json, Report, WrongAnswerError
from bench.report import FAILED, Benchmark, Grid, figure

KIB, MIB = 1 << 10, 1 << 20
COLUMNS = ("shm", "loan", "frames", "inline", "pickle")
# Size → timed messages of each kind in a round.
SIZES = {64 * KIB: 200, MIB: 100, 16 * MIB: 30, 64 * MIB: 12}
QUICK_SIZES = {64 * KIB: 50, 16 * MIB: 8}
# frames and inline are to send 64 MiB whole; their defaults would send it in parts.
LIMITS = {"detour_bytes": 256 * MIB, "max_control_bytes": 256 * MIB}
WARM, AFTER = 4, 1
SHM_AIM, LOAN_AIM = 1.15, 1.5

METHOD = f"""\
Near sends a body with one int64 tensor, far looks at it, drops it and answers with a small body;
timed at near from the call of send to the answer. In each process pair four kinds of round trip
take turns in random order:
  floor   np.copyto (one thread) of the same tensor into one warm place that both processes map,
          then a zmq PAIR round trip of 100 bytes over ipc; the place lies in the ring itself for
          the columns shm and loan
  column  the tensor by the column's way; for "loan" the tensor lies in the ring already: making the
          loan and the round trip are timed, filling it between the two is not
  empty   the column's way with a body without a tensor
  note    the zmq round trip of 100 bytes alone
Before each of them, untimed (for loan before it is made and after it is filled), a round trip with
a tensor of 512 bytes goes the same way (for floor and note: 100 bytes): copying 16 MiB drives code
and sockets out of the caches, and each kind is to find them alike. Far checks three words of every
tensor (its number) and, in the {WARM} untimed messages before and {AFTER} after, the CRC-32 of
every byte; it does not read the rest, which costs every way the same. frames, inline and pickle
have copied every byte to far by then. Each row is a fresh process pair each round. Figures: median
[lowest..highest round] of the medians of the rounds; ratios are taken within the pair, then the
same."""


class Turn(NamedTuple):
    """One round trip of the schedule that both ends follow; `checked` ones are not timed."""

    number: int
    kind: str
    checked: bool


def schedule(messages: int) -> Iterator[Turn]:
    """The same turns for both ends: every kind once, in random order, `messages` times and for the checks."""
    draw = random.Random(messages)
    number = 0
    for repeat in range(WARM + messages + AFTER):
        for kind in draw.sample(("floor", "column", "empty", "note"), 4):
            number += 1
            yield Turn(number, kind, not WARM <= repeat < WARM + messages)


class _Near:
    """The near end of one row: a link, the floor beside it and the tensor."""

    def __init__(self, folder: Path, column: str, nbytes: int, stack: contextlib.ExitStack) -> None:
        self._link = links.open_near(folder, column, **LIMITS)
        stack.callback(self._link.close)
        self._lends = column == "loan"
        self._source: payload.Words = np.empty(nbytes // 8, np.int64)
        payload.fill(self._source, nbytes)
        self._tensor = torch.from_numpy(self._source)
        self._small = torch.zeros(64, dtype=torch.int64)
        self._floor = floor.Near(folder, self._destination(folder, column, stack))

    def _destination(self, folder: Path, column: str, stack: contextlib.ExitStack) -> payload.Words:
        if links.BACKENDS.get(column) != "shm":
            destination = floor.create_mapping(folder, self._source.nbytes)
        else:
            assert isinstance(self._link, links.EndpointLink)
            place = stack.enter_context(self._link.loan(self._tensor.shape))
            self._link.send({"floor": place})
            destination = place.numpy()
        self._link.send({"ready": True})
        self._link.receive()
        return destination

    def run(self, turn: Turn) -> float:
        """One round trip; seconds."""
        payload.stamp(self._source, turn.number)
        checksum = payload.checksum(self._source) if turn.checked else -1
        kinds: dict[str, Callable[[int, int], float]] = {
            "floor": self._through_floor,
            "column": self._by_loan if self._lends else self._by_copy,
            "empty": self._empty,
            "note": self._note,
        }
        return kinds[turn.kind](turn.number, checksum)

    def _through_floor(self, _number: int, checksum: int) -> float:
        self._floor.ring_bell()
        start = time.perf_counter()
        self._floor.round_trip(self._source, checksum)
        return time.perf_counter() - start

    def _note(self, _number: int, _checksum: int) -> float:
        self._floor.ring_bell()
        start = time.perf_counter()
        self._floor.ring_bell()
        return time.perf_counter() - start

    def _empty(self, number: int, _checksum: int) -> float:
        self._warm_up(number)
        return self._exchange({"n": number})

    def _by_copy(self, number: int, checksum: int) -> float:
        self._warm_up(number)
        return self._exchange({"n": number, "crc": checksum, "data": self._tensor})

    def _by_loan(self, number: int, checksum: int) -> float:
        assert isinstance(self._link, links.EndpointLink)
        self._warm_up(number)
        start = time.perf_counter()
        with self._link.loan(self._tensor.shape) as place:
            made = time.perf_counter() - start
            np.copyto(place.numpy(), self._source)
            self._warm_up(number)
            return made + self._exchange({"n": number, "crc": checksum, "data": place})

    def _warm_up(self, number: int) -> None:
        self._small[:] = number
        self._exchange({"n": number, "warm": self._small})

    def _exchange(self, body: links.Body) -> float:
        start = time.perf_counter()
        self._link.send(body)
        answer = self._link.receive()
        seconds = time.perf_counter() - start
        if answer["n"] != body["n"]:
            raise WrongAnswerError(f"message {body['n']} was answered with {answer['n']}")
        return seconds


def near(folder: Path, *, column: str, nbytes: int, messages: int) -> Report:
    """The sending end: times every turn of the schedule, in microseconds."""
    times: dict[str, list[float]] = {"floor": [], "column": [], "empty": [], "note": []}
    sent = 0
    with contextlib.ExitStack() as stack:
        end = _Near(folder, column, nbytes, stack)
        for turn in schedule(messages):
            seconds = end.run(turn)
            sent += 1
            if not turn.checked:
                times[turn.kind].append(seconds * 1e6)
    return Report(values=times, expected=sent)


def far(folder: Path, *, column: str, nbytes: int, messages: int) -> Report:
    """The receiving end: checks every turn of the schedule and answers it."""
    link = links.open_far(folder, column, **LIMITS)
    with contextlib.closing(link):
        first = link.receive()
        place = first["floor"].numpy() if "floor" in first else floor.attach_mapping(folder)
        bell = floor.Far(folder, place)
        if "floor" in first:
            link.receive()
        link.send({"ready": True})
        verified = 0
        for turn in schedule(messages):
            if turn.kind in ("floor", "note"):
                bell.answer_bell()
                if turn.kind == "floor":
                    bell.answer(turn.number)
                else:
                    bell.answer_bell()
            else:
                for _ in range(2 if column == "loan" and turn.kind == "column" else 1):
                    _answer_warm_up(link, turn.number)
                _answer(link, turn, nbytes)
            verified += 1
        link.check_way()
    return Report(verified=verified)


def _answer_warm_up(link: links.Link, number: int) -> None:
    body = link.receive()
    payload.check_stamp(body["warm"].numpy(), number)
    del body
    link.send({"n": number})


def _answer(link: links.Link, turn: Turn, nbytes: int) -> None:
    body = link.receive()
    if body["n"] != turn.number or ("data" in body) != (turn.kind == "column"):
        raise WrongAnswerError(f"expected {turn.kind} {turn.number}, not {sorted(body)} {body['n']}")
    if turn.kind == "column":
        words = body["data"].numpy()
        if words.nbytes != nbytes:
            raise WrongAnswerError(f"message {turn.number}: {words.nbytes} bytes, not {nbytes}")
        payload.check_stamp(words, turn.number)
        if turn.checked:
            payload.check(words, turn.number, body["crc"])
        del words
    # Dropped before the answer: the record is free again when near sends the next.
    del body
    link.send({"n": turn.number})


def _name(column: str, nbytes: int) -> str:
    return f"{column} {_size(nbytes)}"


def _size(nbytes: int) -> str:
    return f"{nbytes // MIB} MiB" if nbytes >= MIB else f"{nbytes // KIB} KiB"


def _rows(quick: bool) -> list[Row]:
    return [
        Row(
            name=_name(column, nbytes),
            parts={"near": "bench.channel:near", "far": "bench.channel:far"},
            arguments={"column": column, "nbytes": nbytes, "messages": messages},
        )
        for nbytes, messages in (QUICK_SIZES if quick else SIZES).items()
        for column in COLUMNS
    ]


def _median(kind: str) -> Callable[[Mapping[str, Json]], float]:
    return lambda values: statistics.median(numbers(values[kind]))


def _ratio(kind: str, to: str) -> Callable[[Mapping[str, Json]], float]:
    return lambda values: _median(kind)(values) / _median(to)(values)


def _cell(result: Result, measure: Callable[[Mapping[str, Json]], float]) -> str:
    return FAILED if result.failure is not None else figure(result.spread(measure))


def _show(results: Sequence[Result]) -> list[Grid]:
    by_name = {result.row.name: result for result in results}
    measured = {result.row.arguments["column"] for result in results}
    columns = [column for column in COLUMNS if column in measured]
    sizes = [nbytes for nbytes in SIZES if _name(columns[0], nbytes) in by_name]
    times, ratios = [], []
    first = [by_name[_name(column, sizes[0])] for column in columns]
    empty = [_cell(result, _median("empty")) for result in first]
    times.append(["empty", _cell(first[0], _median("note")), *empty])
    for nbytes in sizes:
        row = [by_name[_name(column, nbytes)] for column in columns]
        times.append(
            [_size(nbytes), _cell(row[0], _median("floor")), *(_cell(r, _median("column")) for r in row)]
        )
        ratios.append([_size(nbytes), *(_cell(r, _ratio("column", "floor")) for r in row)])
        if "loan" in columns:
            ratios[-1].append(_cell(row[columns.index("loan")], _ratio("column", "empty")))
    return [
        Grid(title="channel: round trip, µs", columns=["", "floor", *columns], rows=times),
        Grid(
            title="channel: ratio to the floor in the same processes",
            columns=["", *columns, *(["loan to empty"] if "loan" in columns else [])],
            rows=ratios,
            notes=_verdicts(by_name, sizes),
        ),
    ]


def _verdicts(by_name: Mapping[str, Result], sizes: Sequence[int]) -> list[str]:
    notes = []
    shm = by_name.get(_name("shm", 16 * MIB))
    if shm is not None and shm.failure is None:
        ratio = shm.spread(_ratio("column", "floor")).median
        notes.append(
            f"aim: shm at 16 MiB within {SHM_AIM}x of the floor. {ratio:.2f}: {_met(ratio <= SHM_AIM)}."
        )
    loans = [by_name[name] for nbytes in sizes if (name := _name("loan", nbytes)) in by_name]
    if loans and all(loan.failure is None for loan in loans):
        worst = max(loan.spread(_ratio("column", "empty")).median for loan in loans)
        medians = [loan.spread(_median("column")).median for loan in loans]
        notes.append(
            f"aim: loan flat and within {LOAN_AIM}x of an empty message. At most {worst:.2f}, dearest size"
            f" {max(medians) / min(medians):.2f}x the cheapest: {_met(worst <= LOAN_AIM)}."
        )
    return notes


def _met(good: bool) -> str:
    return "met" if good else "MISSED"


BENCHMARK = Benchmark(
    title="round trip of a tensor, 64 KiB to 64 MiB: floor, shm, loan, frames, inline, pickle",
    method=METHOD,
    rows=_rows,
    show=_show,
)
