"""CPU that a front end and a worker use while they are linked and wait for each other."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import transport
from bench.floor import TIMEOUT, pair
from bench.harness import Result, Row, number
from bench.part import Json, Report, WrongAnswerError
from bench.report import FAILED, Benchmark, Grid, figure
from engine import Engine, EngineConfig

WAYS = ("blocking", "asyncio", "engine", "zmq")
SECONDS, QUICK_SECONDS = 10.0, 2.0
NBYTES = 1 << 20
AIM = 1.0  # percent of one core
_STOP = b"stop"

METHOD = f"""\
A front end sends a worker a tensor of {NBYTES >> 20} MiB through the ring and gets its sum back, so that
they are linked and the worker is admitted. Then both wait in receive for {SECONDS:g} s in which nothing
comes, in blocking calls or in an event loop; "engine" is an Engine that has encoded a photograph and is
asked for nothing more, and its rank; "zmq" is the baseline, two bare sockets in poll. CPU is that of all
threads of the process (user and system, by its CPU clock, which has no ticks), in percent of one core.
Figures: median [lowest..highest round]."""


class _Meter:
    """CPU of a process since now, of all its threads."""

    def __init__(self, pid: int) -> None:
        self._clock = ~pid << 3 | 2  # as clock_getcpuclockid makes it, which Python does not have
        self._wall, self._cpu = time.monotonic(), time.clock_gettime(self._clock)

    def percent(self) -> float:
        """CPU seconds per second, times 100."""
        cpu = time.clock_gettime(self._clock) - self._cpu
        return 100 * cpu / (time.monotonic() - self._wall)


def front(folder: Path, *, column: str, seconds: float) -> Report:
    """Says something, waits `seconds` for nothing, ends the worker's wait."""
    if column == "zmq":
        with closing(pair(f"ipc://{folder}/idle", bind=True)) as socket:
            socket.send(b"%d" % NBYTES)
            verified = int(socket.recv()) == NBYTES
            meter = _Meter(os.getpid())
            if socket.poll(int(seconds * 1000)):
                raise WrongAnswerError(f"{socket.recv()!r} came in the idle time")
            percent = meter.percent()
            socket.send(_STOP)
            socket.recv()
        return Report(values={"front": percent}, expected=1, verified=verified)
    with transport.listen(f"ipc://{folder}/idle") as endpoint:
        endpoint.wait_for_peers(1, timeout=TIMEOUT)
        endpoint.send({"x": torch.ones(NBYTES, dtype=torch.uint8)}, timeout=TIMEOUT)
        verified = endpoint.receive(timeout=TIMEOUT).body == NBYTES
        percent = _idle(column, endpoint, seconds)
        way = endpoint.peers[0].backend
        endpoint.send(_STOP, timeout=TIMEOUT)
        endpoint.receive(timeout=TIMEOUT)
    if not way.startswith("shm"):
        raise WrongAnswerError(f"the worker was not admitted to the ring: {way}")
    return Report(values={"front": percent}, expected=1, verified=verified)


def worker(folder: Path, *, column: str, seconds: float) -> Report:
    """Answers once, then waits until the front end ends it."""
    patience = seconds + TIMEOUT
    if column == "zmq":
        with closing(pair(f"ipc://{folder}/idle", bind=False)) as socket:
            socket.send(socket.recv())
            meter = _Meter(os.getpid())
            socket.poll(int(patience * 1000))
            percent = meter.percent()
            if socket.recv() != _STOP:
                raise WrongAnswerError("something else than the end came in the idle time")
            socket.send(_STOP)
        return Report(values={"worker": percent})
    with transport.connect(f"ipc://{folder}/idle", name="worker", timeout=TIMEOUT) as endpoint:
        body = endpoint.receive(timeout=TIMEOUT).body
        endpoint.send(int(body["x"].sum()), timeout=TIMEOUT)
        del body
        percent = _idle(column, endpoint, patience, until=_STOP)
        endpoint.send(_STOP, timeout=TIMEOUT)
    return Report(values={"worker": percent})


def _idle(column: str, endpoint: transport.Endpoint, seconds: float, *, until: bytes | None = None) -> float:
    """Percent of CPU in a receive of `seconds`, in which nothing comes, or `until` and nothing else."""
    meter = _Meter(os.getpid())
    try:
        if column == "asyncio":
            body = asyncio.run(_awaited(endpoint.receive_async, seconds))
        else:
            body = endpoint.receive(timeout=seconds).body
    except transport.Timeout:
        if until is None:
            return meter.percent()
        raise
    percent = meter.percent()
    if body != until:
        raise WrongAnswerError(f"{body!r} came in the idle time")
    return percent


async def _awaited(receive: Callable[..., Awaitable[transport.Message]], seconds: float) -> Any:
    return (await receive(timeout=seconds)).body


def engine(_folder: Path, *, column: str, seconds: float) -> Report:
    """Both of an engine and its rank, while nobody asks for anything."""
    photograph = Image.new("RGB", (280, 280), "orange")
    with Engine(EngineConfig(data_parallel_size=1, device="cpu")) as engine_:
        (result,) = engine_.encode([photograph])
        if result.error:
            raise WrongAnswerError(result.error)
        (rank,) = engine_.peers
        meters = {"front": _Meter(os.getpid()), "worker": _Meter(rank.pid)}
        time.sleep(seconds)
        values: dict[str, Json] = {name: meter.percent() for name, meter in meters.items()}
    return Report(values=values, expected=1, verified=1)


def _rows(quick: bool) -> list[Row]:
    seconds = QUICK_SECONDS if quick else SECONDS
    return [Row(name=way, parts=_parts(way), arguments={"column": way, "seconds": seconds}) for way in WAYS]


def _parts(way: str) -> dict[str, str]:
    names = ["engine"] if way == "engine" else ["front", "worker"]
    return {name: f"bench.idle:{name}" for name in names}


def _figure(name: str) -> Callable[[Mapping[str, Json]], float]:
    return lambda values: number(values[name])


def _show(results: Sequence[Result]) -> list[Grid]:
    rows, highest = [], []
    for result in results:
        if result.failure is not None:
            rows.append([result.row.name, FAILED, FAILED])
            continue
        spreads = [result.spread(_figure(name)) for name in ("front", "worker")]
        rows.append([result.row.name, *map(figure, spreads)])
        if result.row.name != "zmq":
            highest += [spread.median for spread in spreads]
    notes = []
    if highest:
        met = "met" if max(highest) < AIM else "MISSED"
        notes.append(f"aim: below {AIM:g} % each. Highest median {max(highest):.3f} %: {met}.")
    columns = ["waits in", "front end, % CPU", "worker, % CPU"]
    return [Grid(title="idle: linked, and nothing to do", columns=columns, rows=rows, notes=notes)]


BENCHMARK = Benchmark(
    title="CPU of a front end and a worker that wait for each other",
    method=METHOD,
    rows=_rows,
    show=_show,
)
