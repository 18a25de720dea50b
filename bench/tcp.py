"""Tensors between two hosts: bulk connections and zmq frames beside plain sockets."""

from __future__ import annotations

import contextlib
import random
import socket
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import transport
from bench import payload
from bench.harness import Result, Row, number, numbers
from bench.hosts import GIB, MIB, RING_BYTES, WINDOW, far_end, near_end
from bench.part import Json, Report, WrongAnswerError
from bench.report import FAILED, Benchmark, Grid, figure

WAYS = ("tcp", "loan", "frames", "tcp keys", "frames keys")
NETWORKS = ("loopback", "veth")
# Size → timed messages of each kind in a round.
SIZES = {MIB: 20, 16 * MIB: 8, 64 * MIB: 4, 256 * MIB: 2}
WARM = 2
AHEAD = 4
AIM, CONTROL_AIM = 1.25, 5.0

METHOD = f"""\
Near sends a body with one int64 tensor, far checks its stamp, drops it and answers. In each process
pair and for each size these take turns in random order: the floor (the same bytes by sendall into one
plain TCP connection, recv_into a pre-faulted buffer at far, one byte back) and one message by the
column's way; {AHEAD} of each sent before the first answer is waited for. tcp copies the tensor into near's
ring and lands it in far's; with "loan" it lies in near's ring already; frames are zmq frames over tcp;
"keys" with CURVE and, for tcp, TLS with pinned certificates. Rings are {RING_BYTES // GIB} GiB, the window is
{WINDOW // MIB} MiB. {WARM} untimed messages of each size go first, whose every byte is checked. veth: each
end in a network namespace with its own /dev/shm. "control": round trips of a message without a tensor, idle
and while another thread sends 1 GiB. "memory": what both sides take, beyond idle, while 2 GiB are sent as
fast as they go to a far end that takes them one by one. CPU is that of all threads of a process, user and
system. Figures: median [lowest..highest round];
ratios are taken within the pair."""


class Turn(NamedTuple):
    """So many messages of one size by floor or column, ahead of the first answer; `checked`: not timed."""

    nbytes: int
    kind: str
    ahead: int
    checked: bool = False


def _schedule(plan: Sequence[tuple[int, int]]) -> list[Turn]:
    """The turns of a plan (size, timed messages of each kind), in an order that both ends know."""
    turns: list[Turn] = []
    for nbytes, messages in plan:
        turns += [Turn(nbytes, "column", 1, checked=True)] * WARM
        draw = random.Random(nbytes)
        for _ in range(messages):
            kinds = [Turn(nbytes, kind, ahead) for kind in ("floor", "column") for ahead in (1, AHEAD)]
            turns += draw.sample(kinds, len(kinds))
    return turns


def near(folder: Path, *, column: str, layout: str, plan: Sequence[tuple[int, int]]) -> Report:
    """The sending end: seconds of every turn, by kind, number and size."""
    times: dict[str, list[float]] = {}
    source: payload.Words = np.empty(max(plan)[0] // 8, np.int64)
    payload.fill(source, 1)
    sent = 0
    with near_end(folder, column, layout) as (endpoint, floor):
        for turn in _schedule(plan):
            words, used = source[: turn.nbytes // 8], time.process_time()
            if turn.kind == "floor":
                seconds = _by_floor(floor, words, turn.ahead)
            else:
                seconds = _by_column(endpoint, words, sent, turn, lent=column == "loan")
                sent += turn.ahead
            if not turn.checked:
                times.setdefault(_key(turn.kind, turn.ahead, turn.nbytes), []).append(seconds)
                times.setdefault(_cpu("near", turn), []).append(time.process_time() - used)
    return Report(values=dict(times), expected=sent)


def _cpu(end: str, turn: Turn) -> str:
    return f"cpu of {end} {_key(turn.kind, turn.ahead, turn.nbytes)}"


def _key(kind: str, ahead: int, nbytes: int) -> str:
    return f"{kind} {ahead} {nbytes}"


def _by_floor(floor: socket.socket, source: payload.Words, ahead: int) -> float:
    start = time.perf_counter()
    for _ in range(ahead):
        floor.sendall(source.data.cast("B"))
    for _ in range(ahead):
        if floor.recv(1) != b"x":
            raise WrongAnswerError("the floor's far end is gone")
    return time.perf_counter() - start


def _by_column(
    endpoint: transport.Endpoint,
    source: payload.Words,
    first: int,
    turn: Turn,
    *,
    lent: bool,
) -> float:
    tensor = torch.from_numpy(source)
    seconds = 0.0
    for message in range(first, first + turn.ahead):
        payload.stamp(source, message)
        crc = payload.checksum(source) if turn.checked else -1
        with endpoint.loan(tensor.shape, torch.int64) if lent else contextlib.nullcontext(tensor) as place:
            if lent:
                np.copyto(place.numpy(), source)
            start = time.perf_counter()
            endpoint.send({"n": message, "crc": crc, "data": place})
            seconds += time.perf_counter() - start
        del place
    start = time.perf_counter()
    for message in range(first, first + turn.ahead):
        if endpoint.receive().body != message:
            raise WrongAnswerError(f"message {message} was answered as another")
    return seconds + time.perf_counter() - start


def far(folder: Path, *, column: str, layout: str, plan: Sequence[tuple[int, int]]) -> Report:
    """The receiving end: takes, checks and answers every turn."""
    verified, spent = 0, dict[str, list[float]]()
    buffer = payload.pages(max(plan)[0]).data.cast("B")
    with far_end(folder, column, layout) as (endpoint, floor):
        for turn in _schedule(plan):
            used = time.process_time()
            for _ in range(turn.ahead):
                if turn.kind == "floor":
                    _take_floor(floor, buffer[: turn.nbytes])
                else:
                    _take_column(endpoint, verified, turn.nbytes)
                    verified += 1
            if not turn.checked:
                spent.setdefault(_cpu("far", turn), []).append(time.process_time() - used)
        _check_way(endpoint, column)
        endpoint.close()
    return Report(values=dict(spent), verified=verified)


def _take_floor(floor: socket.socket, buffer: memoryview) -> None:
    filled = 0
    while filled < buffer.nbytes:
        came = floor.recv_into(buffer[filled:])
        if not came:
            raise WrongAnswerError("the floor's near end is gone")
        filled += came
    floor.sendall(b"x")


def _take_column(endpoint: transport.Endpoint, message: int, nbytes: int) -> None:
    body = endpoint.receive().body
    words = body["data"].numpy()
    if body["n"] != message or words.nbytes != nbytes:
        raise WrongAnswerError(f"message {message} came as {body['n']}, {words.nbytes} bytes")
    payload.check_stamp(words, message)
    if body["crc"] >= 0:
        payload.check(words, message, body["crc"])
    del words, body
    endpoint.send(message)


def _check_way(endpoint: transport.Endpoint, way: str) -> None:
    received = endpoint.statistics()["received"]
    wanted = "bytes frames" if way.startswith("frames") else "bytes tcp"
    if received.get("parts") or not received.get(wanted):
        raise WrongAnswerError(f"not everything came whole by {way}: {dict(received)}")


# ------------------------------------------------------------------------------------ tables


def _rows(quick: bool) -> list[Row]:
    networks = NETWORKS[:1] if quick else NETWORKS
    plan: Json = [[nbytes, messages] for nbytes, messages in SIZES.items()]
    rows = [
        _row("bench.tcp:", way, network, _name(network, way), plan=plan)
        for network in networks
        for way in WAYS
    ]
    rows += [
        _row("bench.underway:control_", way, network, f"control {network} {way}", nbytes=GIB)
        for network in networks
        for way in ("tcp", "frames")
    ]
    rows += [
        _row("bench.underway:memory_", way, "loopback", f"memory {way}", nbytes=2 * GIB)
        for way in ("tcp", "frames")
    ]
    return rows


def _row(function: str, way: str, network: str, name: str, **sizes: Json) -> Row:
    parts = {end: f"{function}{end}" for end in ("near", "far")}
    arguments: dict[str, Json] = {"column": way, "layout": network, **sizes}
    return Row(name=name, parts=parts, arguments=arguments, sample_memory="memory" in function, limit=240.0)


def _name(network: str, way: str) -> str:
    return f"{network} {way}"


def _median(kind: str) -> Callable[[Mapping[str, Json]], float]:
    return lambda values: statistics.median(numbers(values[kind]))


def _ratio(kind: str, to: str) -> Callable[[Mapping[str, Json]], float]:
    return lambda values: _median(kind)(values) / _median(to)(values)


def _cell(result: Result, measure: Callable[[Mapping[str, Json]], float]) -> str:
    return FAILED if result.failure is not None else figure(result.spread(measure))


def _rate(kind: str, nbytes: int) -> Callable[[Mapping[str, Json]], float]:
    return lambda values: nbytes / _median(kind)(values) / 1e9


def _show(results: Sequence[Result]) -> list[Grid]:
    by_name = {result.row.name: result for result in results}
    grids = [_throughput(by_name, network, ahead) for network in NETWORKS for ahead in (1, AHEAD)]
    grids += [_processor(by_name, network) for network in NETWORKS]
    return [grid for grid in [*grids, _control(results), _memory(results)] if grid.rows]


def _throughput(by_name: Mapping[str, Result], network: str, ahead: int) -> Grid:
    rows = []
    ways = [way for way in WAYS if _name(network, way) in by_name]
    of = [by_name[_name(network, way)] for way in ways]
    for nbytes in SIZES if of else ():
        floor, column = _key("floor", ahead, nbytes), _key("column", ahead, nbytes)
        total, size = nbytes * ahead, f"{nbytes // MIB} MiB"
        rates = [_cell(result, _rate(column, total)) for result in of]
        rows.append([size, _cell(of[0], _rate(floor, total)), *rates])
        rows.append(
            [
                f"{size}, x floor",
                _cell(of[0], _ratio(floor, floor)),
                *(_cell(result, _ratio(column, floor)) for result in of),
            ]
        )
    what = "one at a time" if ahead == 1 else f"{ahead} at a time"
    note = f"aim: tcp within {AIM}x of the floor from 16 MiB on."
    columns = ["", "floor", *ways]
    return Grid(title=f"{network}, {what}: GB/s", columns=columns, rows=rows, notes=[note])


def _processor(by_name: Mapping[str, Result], network: str) -> Grid:
    """What does not depend on who else uses the machine."""
    ways = [way for way in WAYS if _name(network, way) in by_name]
    of = [by_name[_name(network, way)] for way in ways]
    rows = []
    for nbytes in SIZES if of else ():
        turns = [Turn(nbytes, kind, 1) for kind in ("floor", "column")]
        floor, column = (_seconds(turn) for turn in turns)
        cells = [_cell(of[0], floor), *(_cell(result, column) for result in of)]
        rows.append([f"{nbytes // MIB} MiB", *cells])
    title = f"{network}, one at a time: CPU seconds of both ends for 1 GB"
    return Grid(title=title, columns=["", "floor", *ways], rows=rows)


def _seconds(turn: Turn) -> Callable[[Mapping[str, Json]], float]:
    """Of both ends for 10^9 bytes."""
    return lambda values: sum(
        statistics.mean(numbers(values[_cpu(end, turn)])) * 1e9 / turn.nbytes for end in ("near", "far")
    )


def _control(results: Sequence[Result]) -> Grid:
    rows = [
        [
            result.row.name,
            _cell(result, _median("idle")),
            _cell(result, _median("loaded")),
            _cell(result, _ratio("loaded", "idle")),
        ]
        for result in results
        if result.row.name.startswith("control")
    ]
    note = f"aim: within {CONTROL_AIM}x of idle."
    columns = ["", "idle", "while 1 GiB goes", "ratio"]
    return Grid(title="round trip of a small message, µs", columns=columns, rows=rows, notes=[note])


def _peak(values: Mapping[str, Json]) -> float:
    memory = values["memory"]
    assert isinstance(memory, Mapping)
    listed = memory["samples"]
    assert isinstance(listed, Sequence)
    samples = np.array([numbers(row) for row in listed])
    total = samples[:, 1:].sum(axis=1) / MIB
    idle = (samples[:, 0] >= number(values["idle_from"])) & (samples[:, 0] <= number(values["idle_to"]))
    return float(total[samples[:, 0] > number(values["idle_to"])].max() - total[idle].mean())


def _memory(results: Sequence[Result]) -> Grid:
    rows = [
        [result.row.name, _cell(result, _peak)] for result in results if result.row.name.startswith("memory")
    ]
    windows = 2 * WINDOW // MIB
    notes = [
        f"aim: the window ({WINDOW // MIB} MiB) at each end and no more, {windows} MiB. A ring takes pages in"
    ]
    notes += ["steps of 16 MiB, one ahead."]
    return Grid(title="memory of both sides beyond idle, MiB", columns=["", "peak"], rows=rows, notes=notes)


BENCHMARK = Benchmark(
    title="tensors between two hosts, 1 to 256 MiB: plain sockets, tcp, loan, frames, with and without keys",
    method=METHOD,
    rows=_rows,
    show=_show,
)
