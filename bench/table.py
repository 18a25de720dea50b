"""The table of vLLM's pull request 16432: prompts of images from one process to another, by every way."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from bench import links, payload, sampler, usage, ways
from bench.floor import TIMEOUT
from bench.harness import Outcome, Result, Row, number, numbers
from bench.memory import above_idle, blank, expect
from bench.part import Json, Report, WrongAnswerError
from bench.report import Benchmark, Grid, met, table

MB = 10**6
IMAGE, QUICK_IMAGE = 16 * MB, 4 * MB
COLUMNS = (
    "pickle",
    "inline",
    "frames",
    "zmq ipc",
    "shm",
    "loan",
    "vllm rpc",
    "vllm torch_shm",
    "vllm shm store",
    "torch fd",
    "torch fs",
    "segment",
    "iceoryx2",
    "ray",
)
# Images of each prompt, by layout, in the order in which a row's processes go through them. Each needs no
# less memory at once than those before it, but for mix, which finds the memory of 1x64.
LAYOUTS: Mapping[str, tuple[int, ...]] = {
    "8x4": (4,) * 8,
    "4x8": (8,) * 4,
    "2x16": (16,) * 2,
    "1x32": (32,),
    "1x64": (64,),
    "mix": (4,) * 8 + (8,) * 4 + (16,) * 2 + (32,),
}
# Consumer → seconds that it takes for an image.
CONSUMERS: Mapping[str, float] = {"drain": 0.0, "20 ms": 0.02}
# The ring grows in steps of 16 MiB and is one step ahead.
RING_STEP = 2 * 16 << 20
HOLD = 20
# Seconds between two samples, and part of a layout's time: a row that was unseen for longer than both is
# refused, so one that was seen but once. The kernel answers late while a process that is asked about gets
# or gives back much memory.
LONGEST_GAP, LONGEST_PART = 0.1, 0.5
_WARM = 64 << 10

METHOD = f"""\
Near makes the images of a prompt (int64 vectors of {IMAGE // MB} MB, each in a mapping of its own; with
"loan" in the ring), sends the prompt as one message, drops its own, and goes on to the next; far
checks the sum of all words of every image where it arrived (and the first word of each page by
its place), takes 0 or 20 ms for each image, drops the prompt and answers. First every prompt
of a layout goes alone: the next is made when far has answered. Then, timed, all are sent one after the
other without waiting; "seconds" run from then to the last answer, less the time that near spends making
images, "whole" is with it: what a way does in the background while near makes the next images is seen in
"whole" alone. 8x4 are 8 prompts of 4 images, and so on; "mix" are the prompts of 8x4, 4x8, 2x16 and 1x32,
128 images. Memory is sampled every {sampler.INTERVAL * 1000:g} ms by a process outside: Pss_Anon +
Pss_File of the process tree from smaps_rollup, less their mean while both ends were idle after a small
first message, and what is allocated to the files in /dev/shm that they map or that are named after the row
(or, where there are none, Pss_Shmem), idle or not; "peak" is the highest sum of a layout's samples. Kernel
socket buffers are not seen.
CPU and page faults are those of the process tree in the timed part, from /proc/PID/stat. Each row (a way
with a reader) is fresh processes each round, which go through the layouts in the order of the table: a layout
finds the memory that those before it left, and what a way keeps of them counts. Figures: medians."""


def near(
    folder: Path, link: links.Link, *, layouts: Sequence[str], consumer: str, image: int, lent: bool
) -> Report:
    """The sending end: of every layout every prompt alone, then all of them, timed."""
    _send(link, -1, 1, _WARM, lent=False)
    pids = [os.getpid(), int(link.receive()["pid"])]
    before = time.monotonic()
    sampler.wait_for_samples(folder, HOLD, timeout=TIMEOUT)
    after = time.monotonic()
    figures: dict[str, Json] = {}
    first = 0
    for layout in layouts:
        figures[layout] = _layout(link, layout, first, pids, image, lent=lent)
        first += 2 * len(LAYOUTS[layout])
    values: dict[str, Json] = {"idle_from": before, "idle_to": after, "layouts": figures}
    return Report(values=values, expected=sum(_schedule(layouts)) + 1)


def _schedule(layouts: Sequence[str]) -> list[int]:
    """How many images each prompt has, in the order in which they are sent; its place is its number."""
    return [images for layout in layouts for images in 2 * LAYOUTS[layout]]


def _layout(
    link: links.Link, layout: str, first: int, pids: Sequence[int], nbytes: int, *, lent: bool
) -> dict[str, Json]:
    """Both passes of one layout; what they took, and from when to when they ran (time.monotonic())."""
    count = len(LAYOUTS[layout])
    values: dict[str, Json] = {"from": time.monotonic()}
    for name, alone in (("alone", True), ("together", False)):
        start, used, making = time.perf_counter(), usage.of(pids), 0.0
        for prompt, images in enumerate(LAYOUTS[layout], first):
            making += _send(link, prompt, images, nbytes, lent=lent)
            if alone:
                expect(link.receive(), prompt)
        if not alone:
            for prompt in range(first, first + count):
                expect(link.receive(), prompt)
        seconds, used = time.perf_counter() - start, usage.of(pids) - used
        values |= {f"{name} seconds": seconds - making, f"{name} making": making}
        values |= {f"{name} cpu": used.cpu, f"{name} faults": used.faults}
        first += count
    return values | {"to": time.monotonic()}


def _send(link: links.Link, prompt: int, images: int, nbytes: int, *, lent: bool) -> float:
    """Make the images of one prompt and send them; the seconds that making them took."""
    making = 0.0
    with contextlib.ExitStack() as stack:
        tensors, folds = [], []
        for image in range(images):
            tensor = blank(link, nbytes, stack, lent=lent)
            start = time.perf_counter()
            words = tensor.numpy()
            payload.fill(words, (prompt + 2) * 100 + image)
            folds.append(payload.fold(words))
            making += time.perf_counter() - start
            tensors.append(tensor)
            del words, tensor
        link.send({"prompt": prompt, "folds": folds, "tensors": tensors})
        tensors.clear()
    return making


def far(
    folder: Path, link: links.Link, *, layouts: Sequence[str], consumer: str, image: int, lent: bool
) -> Report:
    """The receiving end: checks every image of every prompt and answers."""
    pause = CONSUMERS[consumer]
    verified = _take(link, -1, 1, _WARM, 0.0)
    for prompt, images in enumerate(_schedule(layouts)):
        verified += _take(link, prompt, images, image, pause)
    link.check_way()
    return Report(verified=verified)


def _take(link: links.Link, prompt: int, images: int, nbytes: int, pause: float) -> int:
    """Check one prompt as the model would read it, drop it, answer; how many images were good."""
    _check(link.receive(), prompt, images, nbytes, pause)
    link.send({"prompt": prompt, "pid": os.getpid()})
    return images


def _check(body: links.Body, prompt: int, images: int, nbytes: int, pause: float) -> None:
    expect(body, prompt)
    if len(body["tensors"]) != images:
        raise WrongAnswerError(f"prompt {prompt} has {len(body['tensors'])} images, not {images}")
    for image, (tensor, fold) in enumerate(zip(body["tensors"], body["folds"], strict=True)):
        words = tensor.numpy()
        if words.nbytes != nbytes:
            raise WrongAnswerError(f"image {image} has {words.nbytes} bytes, not {nbytes}")
        payload.check_fold(words, image, fold)
        if pause:
            time.sleep(pause)


def _rows(quick: bool) -> list[Row]:
    layouts = ["8x4", "1x32"] if quick else list(LAYOUTS)
    nbytes = QUICK_IMAGE if quick else IMAGE
    return [
        Row(
            name=f"{way}, {consumer}",
            parts=ways.parts(way),
            arguments=ways.arguments(
                way,
                "bench.table",
                nbytes=nbytes,
                count=max(max(LAYOUTS[layout]) for layout in layouts),
                layouts=layouts,
                consumer=consumer,
                image=nbytes,
                lent=way == "loan",
            ),
            limit=600.0,
            sample_memory=True,
            accept=_accept,
            lacking=ways.lacking(way),
        )
        for consumer in CONSUMERS
        for way in COLUMNS
    ]


def _accept(values: Mapping[str, Json]) -> None:
    """ValueError unless there are samples of idle processes, and of every layout without a long gap."""
    figures = values["layouts"]
    assert isinstance(figures, Mapping)
    for layout in figures:
        own = _of(values, layout)
        if not len(above_idle(own)):
            raise ValueError(f"no sample in {layout}")
        gap, took = longest_gap(own), number(own["to"]) - number(own["from"])
        if gap > max(LONGEST_GAP, LONGEST_PART * took):
            raise ValueError(f"{layout}: memory was not sampled for {gap * 1000:.0f} ms of {took:.2f} s")


def longest_gap(values: Mapping[str, Json]) -> float:
    """Seconds of a layout, from its beginning to its end, for which its memory was not sampled."""
    memory = values["memory"]
    assert isinstance(memory, Mapping)
    samples = memory["samples"]
    assert isinstance(samples, Sequence)
    start, end = number(values["from"]), number(values["to"])
    times = [at for sample in samples if start <= (at := numbers(sample)[0]) <= end]
    return max(after - before for before, after in itertools.pairwise([start, *times, end]))


def _of(values: Mapping[str, Json], layout: str) -> dict[str, Json]:
    """What one layout has of a round: its figures, and the samples of idle processes and of its time."""
    memory, figures = values["memory"], values["layouts"]
    assert isinstance(memory, Mapping)
    assert isinstance(figures, Mapping)
    own, samples = figures[layout], memory["samples"]
    assert isinstance(own, Mapping)
    assert isinstance(samples, Sequence)
    start, end, idle = number(own["from"]), number(own["to"]), number(values["idle_to"])
    times = [numbers(sample)[0] for sample in samples]
    kept = [sample for sample, at in zip(samples, times, strict=True) if at <= idle or start <= at <= end]
    return {**own, "idle_from": values["idle_from"], "idle_to": idle, "memory": {**memory, "samples": kept}}


def cells(results: Sequence[Result]) -> list[Result]:
    """A result for each layout of each row, named "layout way, consumer"."""
    found = []
    for result in results:
        layouts = result.row.arguments["layouts"]
        assert isinstance(layouts, Sequence)
        for layout in map(str, layouts):
            row = dataclasses.replace(
                result.row,
                name=f"{layout} {result.row.name}",
                arguments={**result.row.arguments, "layout": layout},
            )
            found.append(Result(row=row, outcomes=[_outcome(each, layout) for each in result.outcomes]))
    return found


def _outcome(outcome: Outcome, layout: str) -> Outcome:
    return dataclasses.replace(outcome, values=_of(outcome.values, layout)) if outcome.values else outcome


def _value(name: str) -> Callable[[Mapping[str, Json]], float]:
    return lambda values: number(values[name])


seconds = _value("together seconds")


def peak(values: Mapping[str, Json]) -> float:
    """GB above idle at the worst moment."""
    return float(above_idle(values).sum(axis=1).max()) * (1 << 20) / 1e9


def beyond(result: Result) -> Callable[[Mapping[str, Json]], float]:
    """GB at the worst moment beyond the images of the largest prompt."""
    images = number(result.row.arguments["image"]) * max(LAYOUTS[str(result.row.arguments["layout"])])
    return lambda values: peak(values) - images / 1e9


def _show(results: Sequence[Result]) -> list[Grid]:
    results = cells(results)
    grids = []
    for consumer, what in _READERS.items():
        chosen = [result for result in results if result.row.arguments["consumer"] == consumer]
        if not chosen:
            continue
        grids += [
            dataclasses.replace(
                table(f"{what}: peak memory in GB, and seconds", chosen, ("column", "layout"), _both),
                notes=_sampled(chosen),
            ),
            table(f"{what}: seconds, lowest..highest round / whole", chosen, ("column", "layout"), _range),
            table(f"{what}: CPU seconds / 1,000 page faults", chosen, ("column", "layout"), _cost),
        ]
    if grids:
        grids[-1] = dataclasses.replace(grids[-1], notes=_verdicts(results))
    return grids


def _sampled(results: Sequence[Result]) -> list[str]:
    """How long the memory sampler saw nothing, at worst."""
    gaps = [(r.spread(longest_gap).high, r.row.name) for r in results if r.failure is None]
    return [
        f"longest time between two samples: {gap * 1000:.0f} ms ({name})." for gap, name in sorted(gaps)[-1:]
    ]


def _both(result: Result) -> str:
    return f"{result.spread(peak).median:.2f} GB {result.spread(seconds).median:.2f} s"


def whole(values: Mapping[str, Json]) -> float:
    """Seconds with making the images."""
    return seconds(values) + number(values["together making"])


def _range(result: Result) -> str:
    spread = result.spread(seconds)
    return f"{spread.low:.2f}..{spread.high:.2f} / {result.spread(whole).median:.2f}"


def _cost(result: Result) -> str:
    cpu, faults = result.spread(_value("together cpu")), result.spread(_value("together faults"))
    return f"{cpu.median:.2f} / {faults.median / 1000:.0f}"


def _verdicts(results: Sequence[Result]) -> list[str]:
    """The aims of the project, met or missed, as far as their rows were measured."""
    good = {result.row.name: result for result in results if result.failure is None}
    notes = []
    peers = [good[name] for way in ("rpc", "torch_shm") if (name := f"1x32 vllm {way}, drain") in good]
    ours = good.get("1x32 shm, drain")
    if peers and ours is not None:
        ratio = ours.spread(seconds).median / min(peer.spread(seconds).median for peer in peers)
        notes.append(
            f"aim: 1x32, shm at most half of the time of the better of vLLM's two. {ratio:.2f}:"
            f" {met(ratio <= 0.5)}."
        )
    for way in ("shm", "loan"):
        for layout in ("1x32", "1x64"):
            result = good.get(f"{layout} {way}, drain")
            if result is None:
                continue
            above = result.spread(beyond(result)).median
            # A loan's images are the ring; else the ring holds them once more.
            allowed = RING_STEP / 1e9
            if way == "shm":
                allowed += number(result.row.arguments["image"]) * max(LAYOUTS[layout]) / 1e9
            notes.append(
                f"aim: {layout} by {way}, beyond the images at most what the ring holds of them."
                f" {above:.2f} GB of {allowed:.2f}: {met(above <= allowed)}."
            )
    return notes


def _draw(results: Sequence[Result], folder: Path, caption: str) -> list[Path]:
    """One picture of memory and one of time, for each consumer."""
    from bench import figures  # matplotlib is an extra

    results = cells(results)
    made = []
    for consumer, what in _READERS.items():
        chosen = [result for result in results if result.row.arguments["consumer"] == consumer]
        image = int(number(chosen[0].row.arguments["image"])) if chosen else 0
        for name, (title, more, measure, unit) in _PICTURES.items() if chosen else ():
            made += figures.bars(
                folder / f"table-{name}-{consumer.replace(' ', '')}",
                title,
                f"Images of {image // MB} MB; {what}.{more} Mix: the four layouts of 32 images in turn.",
                chosen,
                columns=_TITLES,
                sort_by="1x32",
                measure=measure,
                unit=unit,
                caption=caption,
            )
    return made


_READERS = {"drain": "the reader drains at once", "20 ms": "the reader takes 20 ms for each image"}
_TITLES = {
    "8x4": "8 prompts of 4 images",
    "4x8": "4 prompts of 8 images",
    "2x16": "2 prompts of 16 images",
    "1x32": "1 prompt of 32 images",
    "1x64": "1 prompt of 64 images",
    "mix": "mix: 15 prompts, 128 images",
}
_PICTURES = {
    "memory": ("Peak memory above idle", "", peak, "GB"),
    "time": ("Time from first image to last answer", " Making the images is included.", whole, "s"),
}

BENCHMARK = Benchmark(
    title="memory and time of prompts of images, beside vLLM, torch, SGLang's way, iceoryx2, Ray",
    method=METHOD,
    rows=_rows,
    show=_show,
    draw=_draw,
)
