"""The part of `bench vllm`: starts one vLLM, gives it every layout in turn, and says what its hops cost."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench import sampler
from bench.harness import ROOT, numbers, sampling
from bench.hops import events, hooks
from bench.hops.asking import Answer, answer, prompts, ways
from bench.hops.model import write_model
from bench.part import Json, Report, WrongAnswerError

ROLE = "vllm"
WARM = 2
"""Prompts of one image before everything: kernels, processor, and the rings are mapped."""

FRONT, WORKERS = "front end to engine", "engine to workers"
"""The hops as tensorferry's counters name them."""

IPC: Mapping[str, Mapping[str, Any]] = {
    "direct_rpc": {},
    "torch_shm": {"mm_tensor_ipc": "torch_shm"},
    "tensorferry": {"additional_config": {"tensorferry": True}},
}
EXECUTORS: Mapping[str, Mapping[str, Any]] = {
    "": {},
    "mp": {"distributed_executor_backend": "mp"},
    "tp2": {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"},
    "dp2": {"data_parallel_size": 2},
    "cache": {"mm_processor_cache_gb": 4},
}
READERS = {"mp": 1, "tp2": 2}
"""Worker processes that hop 2 reaches, where there is one."""

PAUSE = 0.3  # before each repeat, for what the last one left behind
_TOP = 5  # likeliest tokens that are compared
_SAMPLES = 3  # before memory counts
_TIMEOUT = 30.0
_COUNTED = 10.0  # the counters are saved every second
_PLUGIN = Path(__file__).parent / "plugin"
_ENVIRONMENT = {
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # several workers on a small machine
    "HF_HUB_OFFLINE": "1",
}

Ask = Callable[[list[dict[str, Any]]], list[Answer]]


class Repeat(NamedTuple):
    """One layout, asked once; times of time.monotonic()."""

    start: float
    end: float
    said: list[Answer]


def parted(column: str) -> tuple[str, str]:
    """Of a row's name: how tensors go, and the executor ("" for vLLM's own choice)."""
    ipc, _, executor = column.partition(" + ")
    return ipc, executor


def shape(layout: str) -> tuple[int, int]:
    """Prompts, and images in each."""
    count, images = layout.split("x")
    return int(count), int(images)


def measure(
    folder: Path, *, column: str, layouts: Sequence[str], side: int, sampled: int, timed: int, device: str
) -> Report:
    """Each layout `sampled` times with the memory sampler, which slows it, then `timed` times without."""
    noted = folder / "noted"
    noted.mkdir()
    surround(noted)
    write_model(folder / "model")
    begin = time.monotonic()
    with explained(folder), running(column, str(folder / "model"), device) as ask:
        ask(prompts(WARM, 1, side))
        start_seconds = time.monotonic() - begin
        repeats: dict[str, list[Repeat]] = {}
        peaks: dict[str, list[float]] = {}
        for layout in layouts:
            repeats[layout], peaks[layout] = _layout(folder, ask, layout, side, sampled, timed)
        total = WARM + sum(images_in(layout) for layout in layouts) * (sampled + timed)
        went = ways_after(column, total)
    found = events.read(noted)
    values = {
        layout: _figures(column, layout, found, each, each[sampled:]) | {"peak": peaks[layout]}
        for layout, each in repeats.items()
    }
    asked = sum(shape(layout)[0] for layout in layouts) * (sampled + timed)
    answered = sum(len(repeat.said) for each in repeats.values() for repeat in each)
    more: dict[str, Json] = {"ways": went, "images": total, "start seconds": start_seconds}
    return Report(values={"layouts": values, **more}, expected=asked, verified=answered)


def images_in(layout: str) -> int:
    """Of all its prompts."""
    count, images = shape(layout)
    return count * images


# ---------------------------------------------------------------------- vLLM


def surround(noted: Path) -> None:
    """For this process and vLLM's: the plugin and where it writes; nothing that depends on the machine."""
    os.environ.update(_ENVIRONMENT | {hooks.FOLDER: str(noted)})
    os.environ.pop("VLLM_PLUGINS", None)  # would have to name this plugin
    paths = [str(ROOT), str(_PLUGIN), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    sys.path.append(str(_PLUGIN))


def _options(column: str, model: str, device: str) -> dict[str, Any]:
    ipc, executor = parted(column)
    options = {
        "model": model,
        "load_format": "dummy",
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 49152,
        "max_num_batched_tokens": 16384,
        "max_num_seqs": 1,  # a step holds one prompt: what is generated does not depend on when others came
        "seed": 0,
        "enable_prefix_caching": False,
        "limit_mm_per_prompt": {"image": 32, "video": 0},
        "mm_processor_cache_gb": 0,
        "skip_mm_profiling": True,
        "kv_cache_memory_bytes": 1 << 28,
        "mm_encoder_attn_backend": "TORCH_SDPA",
        "logprobs_mode": "raw_logits",  # of small weights the probabilities are all alike
        **IPC[ipc],
        **EXECUTORS[executor],
    }
    if device == "cuda":
        options |= {
            "dtype": "bfloat16",
            "kv_cache_memory_bytes": 1 << 30,
            "gpu_memory_utilization": 0.1,
            "attention_config": {"backend": "TRITON_ATTN"},
            "disable_custom_all_reduce": True,
        }
    return options


@contextlib.contextmanager
def running(column: str, model: str, device: str) -> Iterator[Ask]:
    """A vLLM that answers prompts; ended at the end.

    Its workers may end without removing their queues' files, and the harness kills what would do it later.
    """
    start = _served if parted(column)[1] == "dp2" else _offline
    files: set[str] = set()
    try:
        with start(_options(column, model, device)) as ask:
            try:
                yield ask
            finally:
                files = sampler.mapped(sampler.tree([os.getpid()]))
    finally:
        for name in files:
            Path("/dev/shm", name).unlink(missing_ok=True)


def _params() -> Any:
    from vllm import SamplingParams

    return SamplingParams(max_tokens=2, temperature=0, logprobs=_TOP)


@contextlib.contextmanager
def _offline(options: dict[str, Any]) -> Iterator[Ask]:
    """`LLM.generate`."""
    from vllm import LLM

    llm = LLM(**options)

    def ask(batch: list[dict[str, Any]]) -> list[Answer]:
        return [answer(output) for output in llm.generate(batch, _params(), use_tqdm=False)]

    try:
        yield ask
    finally:
        llm.llm_engine.engine_core.shutdown()


@contextlib.contextmanager
def _served(options: dict[str, Any]) -> Iterator[Ask]:
    """`AsyncLLM`, what `vllm serve` runs, with several engines; all prompts at once."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    numbers_ = itertools.count()

    async def start() -> Any:
        return AsyncLLM.from_engine_args(AsyncEngineArgs(**options))

    async def one(prompt: dict[str, Any]) -> Answer:
        async for output in llm.generate(prompt, _params(), str(next(numbers_))):
            last = output
        return answer(last)

    async def together(batch: list[dict[str, Any]]) -> list[Answer]:
        return list(await asyncio.gather(*map(one, batch)))

    with asyncio.Runner() as runner:
        llm = runner.run(start())
        try:
            yield lambda batch: runner.run(together(batch))
        finally:
            llm.shutdown()


@contextlib.contextmanager
def explained(folder: Path) -> Iterator[None]:
    """What vLLM's processes logged is said with an error: its own is often that another process ended."""
    try:
        yield
    except Exception as error:
        log = (folder / f"{ROLE}.err").read_text(errors="replace").splitlines()
        lines = [match[0] for line in log if (match := re.search(r"\w+(Error|Exception): .*", line))]
        told = " | ".join(dict.fromkeys(line[:300] for line in lines[-3:])) or "no error"
        raise RuntimeError(f"{type(error).__name__}: {error}; logged: {told}") from error


# ---------------------------------------------------------------------- one layout


def _layout(
    folder: Path, ask: Ask, layout: str, side: int, sampled: int, timed: int
) -> tuple[list[Repeat], list[float]]:
    """All repeats, and the peak of memory in those that are sampled, bytes."""
    count, images = shape(layout)

    def repeat(number: int) -> Repeat:
        batch = prompts(count, images, side, first=100_000 * images + 1000 * number)
        time.sleep(PAUSE)
        start = time.monotonic()
        said = ask(batch)
        return Repeat(start, time.monotonic(), said)

    own = folder / f"memory {layout}"
    own.mkdir()
    with sampling([os.getpid()], own, "--mixed") as taken:
        sampler.wait_for_samples(own, _SAMPLES, timeout=_TIMEOUT)
        repeats = [repeat(number) for number in range(sampled)]
        samples, failure = taken.result()
    if failure is not None:
        raise RuntimeError(failure)
    peaks = [_peak(samples, each) for each in repeats]
    return repeats + [repeat(number) for number in range(sampled, sampled + timed)], peaks


def _peak(memory: Json, repeat: Repeat) -> float:
    assert isinstance(memory, Mapping)
    samples = memory["samples"]
    assert isinstance(samples, Sequence)
    table = np.array([numbers(sample) for sample in samples])
    during = (table[:, 0] >= repeat.start) & (table[:, 0] <= repeat.end)
    if not during.any():
        raise RuntimeError("the memory sampler did not see a repeat")
    return float(table[during, 1:].sum(axis=1).max())


def _figures(
    column: str, layout: str, found: Sequence[events.Event], repeats: list[Repeat], timed: list[Repeat]
) -> dict[str, Json]:
    """Milliseconds of each timed repeat; answers of all. `WrongAnswerError`: an image did not come."""
    readers = READERS.get(parted(column)[1], 0)
    first = [events.first_hop(found, each.start, each.end) for each in repeats][-len(timed) :]
    figures: dict[str, Json] = {
        "hop 1": [hop.total for hop in first],
        "span": [hop.span for hop in first],
        "blocked": [hop.blocked for hop in first],
        "made": [hop.made for hop in first],
        "rest": [hop.rest for hop in first],
        "seconds": [each.end - each.start for each in timed],
        "said": [each.said for each in repeats],
    }
    came = [hop.images for hop in first]
    if readers:
        second = [events.second_hop(found, each.start, each.end, readers=readers) for each in timed]
        figures["hop 2"] = [hop.total for hop in second]
        came += [hop.images for hop in second]
    if set(came) != {images_in(layout)}:
        raise WrongAnswerError(f"{layout}: images that came: {came}")
    return figures


# ---------------------------------------------------------------------- which way


def through(went: Mapping[str, Sequence[float]], hop: str) -> float:
    """Tensors that took the ring on a hop, by `ways`."""
    good = [
        f"{role}: {hop}: {how}" for role in ("front", "engine") for how in ("ring", "copied out", "handle")
    ]
    return sum(went[name][0] for name in good if name in went)


def ways_after(column: str, total: int) -> dict[str, list[int]]:
    """As the counters say once they have counted so many images, or are late."""
    ipc, executor = parted(column)
    hops = [FRONT, *([WORKERS] if executor in READERS else [])] if ipc == "tensorferry" else []
    deadline = time.monotonic() + _COUNTED
    while any(through(ways(), hop) < total for hop in hops) and time.monotonic() < deadline:
        time.sleep(0.2)
    return ways()
