"""One payload for several workers: how often it is copied, when all have it, how fast each device is fed."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

import transport
from bench import links, payload
from bench.floor import TIMEOUT
from bench.harness import Result, Row, number, numbers
from bench.part import Json, Report, WrongAnswerError
from bench.report import Benchmark, Grid, cell, figure, met

MIB = 1 << 20
WORKERS = 2
PLAN, QUICK_PLAN = [[16 * MIB, 20], [64 * MIB, 10]], [[16 * MIB, 6]]
"""[bytes, messages] of each size."""
Plan = Sequence[Sequence[int]]
WAYS = ("one copy", "copy each", "loan", "pickle")
PHASES = ("alone", "ring", "pinned")
WARM = 3
AIM = 0.95

METHOD = f"""\
ways    one process sends an int64 tensor to {WORKERS} workers; each copies it to its device, looks at the
        stamp there and answers; timed from the call of send until all have answered. "one copy": one send
        to all; "copy each": a send for each; "loan": one send of what lies in the ring already (filling
        it is not timed); "pickle": a pickle for each over zmq. In {WARM} messages before, not timed, the
        CRC-32 of every byte is checked on what came back from the device.
feed    the same tensor in the ring is copied to the devices over and over: by the first worker "alone",
        by all at once ("ring"), and by all at once from pinned memory of their own ("pinned").
The devices are GPUs, one for each worker, where there are {WORKERS}; else each worker has a warm place in its
own memory, and a plain copy (np.copyto) stands for the transfer and plain memory for pinned.
Figures: median [lowest..highest round] of the medians of the rounds."""


class _Device:
    """Where one worker's tensors go: a GPU, fed from registered memory, or a place in ordinary memory."""

    def __init__(self, name: str, worker: int, nbytes: int) -> None:
        self._nbytes = nbytes  # of the last copy
        self._gpu = torch.device("cuda", worker) if name == "cuda" else None
        self._place = torch.empty(nbytes, dtype=torch.uint8, device=self._gpu or "cpu")
        self.pinned = torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._gpu is not None).numpy()
        self.pinned.fill(1)
        if self._gpu is not None:
            transport.register_rings(self._gpu.index)
            self._stream = transport.copies_from_host(self._gpu.index)

    def copy(self, source: transport.Bytes) -> None:
        """Copy bytes to the device; complete on return."""
        self._nbytes = source.nbytes
        if self._gpu is None:
            np.copyto(self._place[: source.nbytes].numpy(), source)
        else:
            transport.copy_in(self._place, 0, source, self._stream).synchronize()

    def check(self, stamp: int, checksum: int) -> None:
        """`WrongAnswerError` unless the device has the payload of that message; -1: its stamp is enough."""
        words = self._place[: self._nbytes].view(torch.int64)
        found = words if checksum >= 0 else words[[0, len(words) // 2, len(words) - 1]]
        host = found.cpu().numpy()
        payload.check_stamp(host, stamp)
        if checksum >= 0:
            payload.check(host, stamp, checksum)

    def registered(self) -> None:
        """Wait until the rings that are mapped here are registered, as far as they are used."""
        deadline = time.monotonic() + TIMEOUT
        while self._gpu is not None and not (state := transport.registered()).nbytes:
            if state.refused or time.monotonic() > deadline:
                raise WrongAnswerError(f"the ring is not registered: {state.refused or 'not in time'}")
            time.sleep(0.01)


# ---------------------------------------------------------------------- the sending end


class _Near:
    """The sending end of a row: by tensorferry to names, or by pickle to one link for each worker."""

    def __init__(self, folder: Path, way: str, stack: contextlib.ExitStack) -> None:
        self._way = way
        self._names = [f"worker{place}" for place in range(WORKERS)]
        self._links = []
        if way == "pickle":
            folders = [_own(folder, place) for place in range(WORKERS)]
            self._links = [links.PickleLink(own, bind=True) for own in folders]
        self.endpoint = transport.listen(
            f"ipc://{folder}/near", config=transport.TransportConfig(backend="shm", peer_share=1.0)
        )
        stack.callback(self.endpoint.close)
        for link in self._links:
            stack.callback(link.close)
        if not self._links:
            self.endpoint.wait_for_peers(self._names, timeout=TIMEOUT)

    def send(self, body: links.Body) -> None:
        """To all workers, by the way of this row."""
        for link in self._links:
            link.send(body)
        if not self._links:
            together = [self._names] if self._way != "copy each" else [[name] for name in self._names]
            for names in together:
                self.endpoint.send(body, to=names, timeout=TIMEOUT)

    def wait(self, number_: int) -> None:
        """Until every worker has answered."""
        answers = [link.receive() for link in self._links]
        answers += [self.endpoint.receive(timeout=TIMEOUT).body for _ in self._names if not self._links]
        if any(answer["n"] != number_ for answer in answers):
            raise WrongAnswerError(f"message {number_} was answered with {answers}")

    def exchange(self, number_: int, source: payload.Words, *, checked: bool) -> float:
        """One message to all; seconds."""
        payload.stamp(source, number_)
        body = {"n": number_, "crc": payload.checksum(source) if checked else -1}
        if self._way != "loan":
            return self._timed(body | {"data": torch.from_numpy(source)})
        with self.endpoint.loan((len(source),), torch.int64, timeout=TIMEOUT) as place:
            np.copyto(place.numpy(), source)
            return self._timed(body | {"data": place})

    def _timed(self, body: links.Body) -> float:
        start = time.perf_counter()
        self.send(body)
        self.wait(body["n"])
        return time.perf_counter() - start

    def copied(self) -> int:
        """Bytes that went into the ring, or a whole number for each worker where there is none."""
        return int(self.endpoint.statistics()["backend"]["nbytes"])


def near(folder: Path, *, way: str, plan: Plan, device: str) -> Report:
    """Sends every message to all workers; milliseconds and copies made for one payload, of each size."""
    times: dict[str, list[float]] = {}
    copies: dict[str, float] = {}
    with contextlib.ExitStack() as stack:
        end = _Near(folder, way, stack)
        for nbytes, messages in plan:
            source = _words(nbytes)
            for number_ in range(WARM):
                end.exchange(number_, source, checked=True)
            before, timed = end.copied(), range(WARM, WARM + messages)
            times[str(nbytes)] = [end.exchange(number_, source, checked=False) * 1e3 for number_ in timed]
            written = (end.copied() - before) / (nbytes * messages)
            copies[str(nbytes)] = written if way != "pickle" else WORKERS
    return Report(values={"ms": times, "copies": copies}, expected=WORKERS * _messages(plan))


def worker(folder: Path, *, place: int, way: str, plan: Plan, device: str) -> Report:
    """Copies every message to its device and answers."""
    fed = _Device(device, place, max(nbytes for nbytes, _ in plan))
    with contextlib.ExitStack() as stack:
        link = _far(folder, place, way, stack)
        for _nbytes, messages in plan:
            for number_ in range(WARM + messages):
                body = link.receive()
                fed.copy(body["data"].numpy().view(np.uint8))
                fed.check(number_, body["crc"])
                del body
                if number_ == 0 and way != "pickle":
                    fed.registered()
                link.send({"n": number_})
        if way != "pickle":
            link.check_way()
    return Report(verified=_messages(plan))


def _words(nbytes: int) -> payload.Words:
    words: payload.Words = np.empty(nbytes // 8, np.int64)
    payload.fill(words, nbytes)
    return words


def _messages(plan: Plan) -> int:
    return sum(WARM + messages for _, messages in plan)


def _far(folder: Path, place: int, way: str, stack: contextlib.ExitStack) -> links.Link:
    if way == "pickle":
        link: links.Link = links.PickleLink(_own(folder, place), bind=False)
    else:
        config = transport.TransportConfig(backend="shm", handshake_timeout=TIMEOUT)
        link = links.EndpointLink(
            transport.connect(f"ipc://{folder}/near", name=f"worker{place}", config=config)
        )
    stack.callback(link.close)
    return link


def _own(folder: Path, place: int) -> Path:
    own = folder / f"worker{place}"
    own.mkdir(exist_ok=True)
    return own


# ---------------------------------------------------------------------- feeding


def feed_near(folder: Path, *, plan: Plan, device: str) -> Report:
    """Sends a tensor of each size, then says when each phase begins."""
    with contextlib.ExitStack() as stack:
        end = _Near(folder, "one copy", stack)
        for nbytes, _ in plan:
            end.exchange(0, _words(nbytes), checked=True)
            for number_, _phase in enumerate(PHASES, start=1):
                end.send({"n": number_})
                end.wait(number_)
    return Report(expected=WORKERS * len(plan) * (1 + len(PHASES)))


def feed_worker(folder: Path, *, place: int, plan: Plan, device: str) -> Report:
    """Copies each tensor over and over; GB/s of each copy by size and phase."""
    fed = _Device(device, place, max(nbytes for nbytes, _ in plan))
    rates: dict[str, list[float]] = {}
    with contextlib.ExitStack() as stack:
        link = _far(folder, place, "one copy", stack)
        for nbytes, messages in plan:
            body = link.receive()
            ring = body["data"].numpy().view(np.uint8)
            fed.copy(ring)
            fed.check(0, body["crc"])
            fed.registered()
            link.send({"n": 0})
            for number_, phase in enumerate(PHASES, start=1):
                link.receive()
                if phase != "alone" or place == 0:
                    array = fed.pinned[:nbytes] if phase == "pinned" else ring
                    rates[f"{nbytes} {phase} {place}"] = [_rate(fed, array) for _ in range(messages)]
                link.send({"n": number_})
            del body, ring, array
    return Report(values=rates, verified=len(plan) * (1 + len(PHASES)))


def _rate(fed: _Device, array: transport.Bytes) -> float:
    start = time.perf_counter()
    fed.copy(array)
    return float(array.nbytes) / (time.perf_counter() - start) / 1e9


worker0, worker1 = partial(worker, place=0), partial(worker, place=1)
feed_worker0, feed_worker1 = partial(feed_worker, place=0), partial(feed_worker, place=1)


# ---------------------------------------------------------------------- rows and tables


def rows(quick: bool, *, device: str, lacking: str | None = None) -> list[Row]:
    """A row for each way and one for the feeding, with devices of that type."""
    common: dict[str, Json] = {"plan": QUICK_PLAN if quick else PLAN, "device": device}
    ways = [
        Row(name=_name(way), parts=_parts(""), arguments={"way": way, **common}, lacking=lacking)
        for way in WAYS
    ]
    return [*ways, Row(name=_name("feed"), parts=_parts("feed_"), arguments=common, lacking=lacking)]


def _parts(kind: str) -> dict[str, str]:
    names = ["near", *(f"worker{place}" for place in range(WORKERS))]
    return {name: f"bench.tensor_parallel:{kind}{name}" for name in names}


def _name(what: str) -> str:
    return f"{WORKERS} workers: {what}"


Measure = Callable[[Mapping[str, Json]], float]


def _of(what: str, nbytes: int) -> Measure:
    """Milliseconds, or copies, of one size."""

    def measure(values: Mapping[str, Json]) -> float:
        sizes = values[what]
        assert isinstance(sizes, Mapping)
        found = sizes[str(nbytes)]
        return number(found) if what == "copies" else statistics.median(numbers(found))

    return measure


def _slowest(nbytes: int, phase: str) -> Measure:
    """GB/s of the worker that is fed most slowly."""

    def measure(values: Mapping[str, Json]) -> float:
        series = [numbers(value) for name, value in values.items() if name.startswith(f"{nbytes} {phase} ")]
        return min(statistics.median(rates) for rates in series)

    return measure


def _ratio(nbytes: int) -> Measure:
    ring, pinned = (_slowest(nbytes, phase) for phase in ("ring", "pinned"))
    return lambda values: ring(values) / pinned(values)


def show(results: Sequence[Result]) -> list[Grid]:
    """Tables of what `rows` asked for."""
    by_name = {result.row.name: result for result in results}
    each, feed = [by_name[_name(way)] for way in WAYS], by_name[_name("feed")]
    device, sizes = feed.row.arguments["device"], _sizes(feed.row)

    def grid(title: str, columns: Sequence[str], line: Callable[[int], list[str]]) -> Grid:
        rows_ = [[f"{nbytes // MIB} MiB", *line(nbytes)] for nbytes in sizes]
        return Grid(title=f"tensor-parallel: {title}", columns=["", *columns], rows=rows_)

    def fed(nbytes: int) -> list[str]:
        return [_cell(feed, m) for m in (*(_slowest(nbytes, phase) for phase in PHASES), _ratio(nbytes))]

    return [
        grid(f"until {WORKERS} workers ({device}) have it, ms", WAYS, lambda n: _line(each, _of("ms", n))),
        grid("how often a payload is written", WAYS, lambda n: _line(each, _of("copies", n))),
        dataclasses.replace(
            grid("the worker fed most slowly, GB/s", [*PHASES, "ring to pinned"], fed),
            notes=_aims(feed, sizes) if device == "cuda" and feed.failure is None else [],
        ),
    ]


def _sizes(row: Row) -> list[int]:
    plan = row.arguments["plan"]
    assert isinstance(plan, Sequence)
    return [int(numbers(entry)[0]) for entry in plan]


def _line(results: Sequence[Result], measure: Measure) -> list[str]:
    return [_cell(result, measure) for result in results]


def _cell(result: Result, measure: Measure) -> str:
    return cell(result, lambda good: figure(good.spread(measure)))


def _aims(feed: Result, sizes: Sequence[int]) -> list[str]:
    lines = []
    for nbytes in sizes:
        ratio = feed.spread(_ratio(nbytes)).median
        aim = f"aim: every GPU at {AIM:.0%} of pinned, all at once"
        lines.append(f"{aim}. {nbytes // MIB} MiB: {ratio:.1%}: {met(ratio >= AIM)}.")
    return lines


def gpus_lacking() -> str | None:
    """Why the workers can't have a GPU each here; None when they can."""
    count = torch.cuda.device_count()
    return None if count >= WORKERS else f"needs {WORKERS} GPUs, {count} here"


BENCHMARK = Benchmark(
    title="one payload for several workers: copies, time until all have it, rate of each device",
    method=METHOD,
    rows=lambda quick: rows(quick, device="cpu" if gpus_lacking() else "cuda"),
    show=show,
)
