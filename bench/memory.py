"""Peak memory of prompts of large images sent from one process to another, by every way."""

from __future__ import annotations

import contextlib
import mmap
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from bench import links, payload, sampler
from bench.floor import TIMEOUT
from bench.harness import Result, Row, number, numbers
from bench.part import Json, Report, WrongAnswerError
from bench.report import FAILED, Benchmark, Grid, figure

MIB = 1 << 20
COLUMNS = ("shm", "loan", "frames", "pickle")
# Prompts × images in each.
LAYOUTS = ((8, 4), (1, 32))
IMAGE, QUICK_IMAGE = 16 * MIB, 4 * MIB
# A small prompt goes first, so that code and libraries are loaded on both sides when idle memory is measured.
WARM, WARM_BYTES = -1, 64 << 10
_PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
# How many memory samples a state is held for.
HOLD = 20

METHOD = f"""\
Near makes the images of a prompt (int64 tensors that it writes, each in a mapping of its own, so
that a dropped image is not kept by malloc), sends them in one body and drops its own; far checks
the CRC-32 of every byte of every image, holds the prompt for {HOLD} samples, drops it and answers;
then the next prompt. With "loan" the images are made in the ring. Memory is sampled every
{sampler.INTERVAL * 1000:g} ms by a third process: "private" is the sum over both of Pss_Anon +
Pss_File of smaps_rollup, less its mean while both were connected and idle after a small first
prompt; "shared" the bytes allocated to the files in /dev/shm that they map (pages not yet touched
count, shared ones count once) or, where they map none, the sum of Pss_Shmem; kernel socket buffers
are not seen. "peak" is the highest sum of both; "images" what near itself holds of one prompt (for
"loan" nothing: they lie in the ring); "ring" the highest shared memory (the ring grows in steps of
16 MiB, one step ahead); "beyond" the highest private memory less the images; "seconds" the time of
all prompts, making and checking the images included, holding them not. The bound "images plus ring"
holds when no round has as much as one image beyond and the ring keeps to its configured size.
Figures: MiB, median [lowest..highest round]."""


def near(folder: Path, *, column: str, prompts: int, images: int, nbytes: int) -> Report:
    """The sending end: sends every prompt and waits until far has dropped it."""
    link = links.open_near(folder, column)
    with contextlib.closing(link):
        _send_prompt(link, WARM, 1, WARM_BYTES, lent=column == "loan")
        before = time.monotonic()
        sampler.wait_for_samples(folder, HOLD, timeout=TIMEOUT)
        after = time.monotonic()
        held = 0.0
        for prompt in range(prompts):
            held += _send_prompt(link, prompt, images, nbytes, lent=column == "loan")
        seconds = time.monotonic() - after - held
    values = {"idle_from": before, "idle_to": after, "seconds": seconds}
    return Report(values=values, expected=prompts * images + 1)


def _send_prompt(link: links.Link, prompt: int, images: int, nbytes: int, *, lent: bool) -> float:
    """Send one prompt and wait until far has dropped it; the seconds that far held it."""
    with contextlib.ExitStack() as stack:
        tensors, checksums = [], []
        for image in range(images):
            tensors.append(blank(link, nbytes, stack, lent=lent))
            words = tensors[-1].numpy()
            payload.fill(words, (prompt + 1) * images + image + 1)
            checksums.append(payload.checksum(words))
            del words
        link.send({"prompt": prompt, "crcs": checksums, "images": tensors})
        tensors.clear()
    answer = link.receive()
    expect(answer, prompt)
    return float(answer["held"])


def blank(link: links.Link, nbytes: int, stack: contextlib.ExitStack, *, lent: bool) -> torch.Tensor:
    """Where an image is made, int64 [nbytes / 8]: a mapping of its own or, lent, the ring."""
    if not lent:
        return torch.frombuffer(mmap.mmap(-1, nbytes, flags=_PRIVATE), dtype=torch.int64)
    assert isinstance(link, links.EndpointLink)
    return stack.enter_context(link.loan((nbytes // 8,)))


def expect(answer: links.Body, prompt: int) -> None:
    """`WrongAnswerError` unless this message is about that prompt."""
    if answer["prompt"] != prompt:
        raise WrongAnswerError(f"prompt {prompt} was answered with {answer['prompt']}")


def far(folder: Path, *, column: str, prompts: int, images: int, nbytes: int) -> Report:
    """The receiving end: checks every image, holds the prompt, drops it, answers."""
    link = links.open_far(folder, column)
    with contextlib.closing(link):
        verified = _take_prompt(folder, link, WARM, 1, WARM_BYTES)
        for prompt in range(prompts):
            verified += _take_prompt(folder, link, prompt, images, nbytes)
        link.check_way()
    return Report(verified=verified)


def _take_prompt(folder: Path, link: links.Link, prompt: int, images: int, nbytes: int) -> int:
    """Check, hold and drop one prompt, then answer; how many images were good."""
    held = _check_and_hold(folder, link.receive(), prompt, images, nbytes)
    # The body is gone with the call: its records are free before near hears of it.
    link.send({"prompt": prompt, "held": held})
    return images


def _check_and_hold(folder: Path, body: links.Body, prompt: int, images: int, nbytes: int) -> float:
    expect(body, prompt)
    if len(body["images"]) != images:
        raise WrongAnswerError(f"prompt {prompt} has {len(body['images'])} images, not {images}")
    for image, (tensor, checksum) in enumerate(zip(body["images"], body["crcs"], strict=True)):
        words = tensor.numpy()
        if words.nbytes != nbytes:
            raise WrongAnswerError(f"image {image} has {words.nbytes} bytes, not {nbytes}")
        payload.check(words, image, checksum)
    start = time.monotonic()
    sampler.wait_for_samples(folder, HOLD, timeout=TIMEOUT)
    return time.monotonic() - start


def _rows(quick: bool) -> list[Row]:
    return [
        Row(
            name=_name(column, prompts, images),
            parts={"near": "bench.memory:near", "far": "bench.memory:far"},
            arguments={
                "column": column,
                "prompts": prompts,
                "images": images,
                "nbytes": QUICK_IMAGE if quick else IMAGE,
            },
            sample_memory=True,
            accept=above_idle,
        )
        for prompts, images in LAYOUTS
        for column in COLUMNS
    ]


def _name(column: str, prompts: int, images: int) -> str:
    return f"{prompts} x {images} {column}"


def _held(row: Row) -> float:
    """MiB of images that near holds outside the ring while it sends."""
    if row.arguments["column"] == "loan":
        return 0.0
    return number(row.arguments["images"]) * number(row.arguments["nbytes"]) / MIB


def _samples(values: Mapping[str, Json]) -> np.ndarray:
    memory = values["memory"]
    assert isinstance(memory, Mapping)
    rows = memory["samples"]
    assert isinstance(rows, Sequence)
    return np.array([numbers(row) for row in rows])


def above_idle(values: Mapping[str, Json]) -> np.ndarray:
    """Samples [n, 2] in MiB: private (anon + file) above the idle mean, shared."""
    samples = _samples(values)
    times, private, shared = samples[:, 0], (samples[:, 1] + samples[:, 2]) / MIB, samples[:, 3] / MIB
    idle = (times >= number(values["idle_from"])) & (times <= number(values["idle_to"]))
    if not idle.any():
        raise ValueError("no sample while both processes were idle")
    return np.stack([private - private[idle].mean(), shared], axis=1)[times > number(values["idle_to"])]


def _longest_gap(values: Mapping[str, Json]) -> float:
    return float(np.diff(_samples(values)[:, 0]).max())


def _peak(values: Mapping[str, Json]) -> float:
    return float(above_idle(values).sum(axis=1).max())


def _ring(values: Mapping[str, Json]) -> float:
    return float(above_idle(values)[:, 1].max())


def _beyond(images: float) -> Callable[[Mapping[str, Json]], float]:
    return lambda values: float(above_idle(values)[:, 0].max()) - images


def _seconds(values: Mapping[str, Json]) -> float:
    return number(values["seconds"])


def _show(results: Sequence[Result]) -> list[Grid]:
    columns = ["prompts x images", "peak", "images", "ring", "beyond", "images + ring", "seconds"]
    rows, failed = [], set()
    for result in results:
        if result.failure is not None:
            rows.append([result.row.name, *[FAILED] * (len(columns) - 1)])
            failed.add(result.row.name)
            continue
        rows.append(_line(result))
    return [Grid(title="memory above idle, MiB", columns=columns, rows=rows, notes=_notes(results))]


def _line(result: Result) -> list[str]:
    held = _held(result.row)
    measures = (_peak, _ring, _beyond(held), _seconds)
    peak, ring, beyond, seconds = (figure(result.spread(measure)) for measure in measures)
    return [
        result.row.name,
        peak,
        f"{held:g}",
        ring,
        beyond,
        "holds" if _holds(result) else "broken",
        seconds,
    ]


def _holds(result: Result) -> bool:
    image = number(result.row.arguments["nbytes"]) / MIB
    within = result.spread(_ring).high <= links.RING_BYTES / MIB * 1.02
    return within and result.spread(_beyond(_held(result.row))).high < image


def _notes(results: Sequence[Result]) -> list[str]:
    ours = [result for result in results if result.row.arguments["column"] in ("shm", "loan")]
    good = all(result.failure is None and _holds(result) for result in ours)
    verdict = "kept" if good else "BROKEN"
    gaps = [
        _longest_gap(outcome.values)
        for result in results
        if not result.failure
        for outcome in result.outcomes
    ]
    sampled = f"longest time between two samples: {max(gaps, default=0.0) * 1000:.0f} ms."
    return [sampled, f"promise: the peak of shm and loan is the images plus the ring, no more: {verdict}."]


BENCHMARK = Benchmark(
    title="peak memory of 8 prompts of 4 images and 1 of 32, 16 MiB each: shm, loan, frames, pickle",
    method=METHOD,
    rows=_rows,
    show=_show,
)
