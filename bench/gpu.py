"""Tensors in the memory of a GPU: single copies out of the ring, the way from process to device, a worker."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from bench import device_worker, tensor_parallel
from bench.device_ways import WAYS
from bench.harness import Result, Row, number, numbers
from bench.part import Json
from bench.report import Benchmark, Grid, cell, figure, met

KIB, MIB = 1 << 10, 1 << 20
COPIES = [64 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB]
KINDS = ("ring", "pinned", "pageable", "to ring", "to pinned", "to pageable")
SIZES = [16 * MIB, 64 * MIB]
THREADS = [1, 8]
AIM = 0.95

METHOD = f"""\
copies   one process, one copy at a time, kinds in random order; from the call until the stream is
         done. "ring": the mapping of a reader, registered read-only; "to ring": the writer's; "pinned"
         and "pageable": torch's. Before that, bytes through ring and device and back are compared.
ways     from the call of send in one process until it hears that the tensor is on the device in the
         other. "send 1" and "send 8": copy threads; "cut-through": eight, the device reads what is
         written already; "loan": the tensor is in the ring already (filling it is not timed); "on
         the GPU": it lies there, and the other process uses the same GPU (CUDA IPC);
         pickle and zmq frames over one PAIR socket and torch.multiprocessing, then .to("cuda").
         Each message's stamp is looked at on the device, of the first and the last every byte.
floor    one process: a copy by the CPU into a registered ring, then one to the device; "overlapped"
         is the same piece by piece.
worker   {device_worker.IMAGES} images of 16 MiB, {device_worker.IN_A_MESSAGE} in a message, through a rank
         of the engine (built-in model) and back as embeddings; "idle" is the share of that time that
         the model alone, on images that lie on the GPU, would not have needed; "memory": the highest
         of both processes together above what they had between two prompts (images at the sender, which
         it makes beforehand, are not in it).
several  one payload for {tensor_parallel.WORKERS} workers with a GPU each, as `tensor-parallel` says.
Figures: median [lowest..highest round] of the medians of the rounds."""


def _rows(quick: bool) -> list[Row]:
    times, messages, prompts = (5, 5, 2) if quick else (10, 10, 2)
    copies, worker = "bench.device_copies", "bench.device_worker"
    floor: dict[str, Json] = {"sizes": SIZES, "threads": THREADS, "times": messages}
    return [
        Row(
            name="copies",
            parts={"one": f"{copies}:copies"},
            arguments={"sizes": COPIES, "times": times},
        ),
        Row(name="floor", parts={"one": f"{copies}:floor"}, arguments=floor),
        *(_way(way, messages) for way in WAYS),
        Row(
            name="worker tensorferry",
            parts={"near": f"{worker}:tensorferry"},
            arguments={"prompts": prompts},
            sample_memory=True,
        ),
        Row(
            name="worker pickle",
            parts={"near": f"{worker}:pickle_near", "far": f"{worker}:pickle_far"},
            arguments={"prompts": prompts},
            sample_memory=True,
        ),
        Row(name="model alone", parts={"one": f"{worker}:model_alone"}, arguments={"prompts": prompts}),
        *tensor_parallel.rows(quick, device="cuda", lacking=tensor_parallel.gpus_lacking()),
    ]


def _way(way: str, messages: int) -> Row:
    parts = {"near": "bench.device_ways:near", "far": "bench.device_ways:far"}
    if way == "torch.multiprocessing":
        del parts["far"]  # the near end starts it
    return Row(name=way, parts=parts, arguments={"way": way, "sizes": SIZES, "messages": messages})


Measure = Callable[[Mapping[str, Json]], float]


def _median(*keys: str) -> Measure:
    """Of the numbers that lie under these keys, one inside of the other."""

    def measure(values: Mapping[str, Json]) -> float:
        found: Json = values
        for key in keys:
            assert isinstance(found, Mapping)
            found = found[key]
        return statistics.median(numbers(found))

    return measure


def _copy(nbytes: int, kind: str) -> Measure:
    return _median("copies", str(nbytes), kind)


def _cell(result: Result, measure: Measure) -> str:
    return cell(result, lambda good: figure(good.spread(measure)))


def _show(results: Sequence[Result]) -> list[Grid]:
    by_name = {result.row.name: result for result in results}
    return [_copies(by_name["copies"]), _ways(by_name), _worker(by_name), *tensor_parallel.show(results)]


def _copies(result: Result) -> Grid:
    def share(nbytes: int, kind: str) -> Measure:
        pinned = _copy(nbytes, kind.replace("ring", "pinned"))
        return lambda values: pinned(values) / _copy(nbytes, kind)(values)

    rows = [
        [
            f"{nbytes // MIB} MiB" if nbytes >= MIB else f"{nbytes // KIB} KiB",
            *(_cell(result, _copy(nbytes, kind)) for kind in KINDS),
            _cell(result, share(nbytes, "ring")),
            _cell(result, share(nbytes, "to ring")),
        ]
        for nbytes in COPIES
    ]
    notes = []
    if result.failure is None:
        worst = min(result.spread(share(nbytes, "ring")).median for nbytes in COPIES if nbytes >= MIB)
        aim = f"aim: from 1 MiB up at least {AIM:.0%} of the speed of pinned"
        notes.append(f"{aim}. Least {worst:.1%}: {met(worst >= AIM)}.")
    columns = ["", *KINDS, "ring: speed of pinned", "to ring: speed of pinned"]
    return Grid(title="gpu: one copy, µs", columns=columns, rows=rows, notes=notes)


def _ways(by_name: Mapping[str, Result]) -> Grid:
    rows = [[way, *(_cell(by_name[way], _median("us", str(nbytes))) for nbytes in SIZES)] for way in WAYS]
    for kind in ("copy", "transfer", "floor", "overlapped"):
        for threads in THREADS:
            measures = [_median("floor", f"{nbytes} {threads}", kind) for nbytes in SIZES]
            cells = (_cell(by_name["floor"], measure) for measure in measures)
            rows.append([f"in one process: {kind}, threads: {threads}", *cells])
    columns = ["", *(f"{nbytes // MIB} MiB" for nbytes in SIZES)]
    return Grid(title="gpu: from process to device memory of another, µs", columns=columns, rows=rows)


def _worker(by_name: Mapping[str, Result]) -> Grid:
    alone, rows = by_name["model alone"], []
    for name in ("tensorferry", "pickle"):
        result = by_name[f"worker {name}"]
        idle = cell(alone if alone.failure is not None else result, lambda good: _idle(good, alone))
        rows.append([name, _cell(result, _speed), idle, _cell(result, _memory)])
    rows.append(["model alone", _cell(alone, _speed), *[cell(alone, lambda _: "")] * 2])
    title = f"gpu: {device_worker.IMAGES} images of 16 MiB through worker and model"
    return Grid(title=title, columns=["", "images/s", "GPU idle", "memory, MiB"], rows=rows)


def _idle(result: Result, alone: Result) -> str:
    """The share of a prompt's time for which the model alone would not have been busy."""
    busy, whole = (each.spread(_median("seconds")).median for each in (alone, result))
    return f"{1 - busy / whole:.0%}"


def _speed(values: Mapping[str, Json]) -> float:
    """Images a second."""
    return device_worker.IMAGES / _median("seconds")(values)


def _memory(values: Mapping[str, Json]) -> float:
    """MiB at the highest, above the mean between two prompts."""
    memory = values["memory"]
    assert isinstance(memory, Mapping)
    samples = memory["samples"]
    assert isinstance(samples, Sequence)
    table = np.array([numbers(sample) for sample in samples])
    times, total = table[:, 0], table[:, 1:].sum(axis=1) / MIB
    start, end = number(values["idle_from"]), number(values["idle_to"])
    idle = total[(times >= start) & (times <= end)].mean()
    return float(total[times > end].max() - idle)


BENCHMARK = Benchmark(
    title="to a GPU: copies out of the ring, from process to device by every way, a worker with its model",
    method=METHOD,
    rows=_rows,
    show=_show,
)
