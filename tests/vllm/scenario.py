"""One vLLM in this process and its children, as a program: `python scenario.py OPTIONS`, a JSON object.

Prints one line of JSON: token ids and log-probabilities of every prompt, and which way tensors went.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from typing import Any

from bench.hops.asking import answer, prompts, ways

_SAVED_WITHIN = 60.0  # seconds; else a process has ended, and its counters are lost
_MAPPED_WITHIN = 30.0


def arguments(options: dict[str, Any]) -> dict[str, Any]:
    """vLLM's, small and without anything that depends on timing."""
    return {
        "load_format": "dummy",
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 8192,
        "max_num_batched_tokens": 8192,
        "max_num_seqs": 1,
        "seed": 0,
        "enable_prefix_caching": False,
        "limit_mm_per_prompt": {"image": 8, "video": 0},
        "mm_processor_cache_gb": 0,
        "skip_mm_profiling": True,
        "kv_cache_memory_bytes": 1 << 27,
        "mm_encoder_attn_backend": "TORCH_SDPA",
        "logprobs_mode": "raw_logits",  # of small weights the probabilities are all alike
        **options,
    }


def result(said: list[Any], counted: dict[str, list[int]], held: int = 0) -> str:
    """The line by which the one who started this program gets what it wants."""
    plugin, method = "engine.vllm_plugin" in sys.modules, os.environ["VLLM_WORKER_MULTIPROC_METHOD"]
    found = {"said": said, "ways": counted, "plugin": plugin, "held": held, "method": method}
    return "RESULT " + json.dumps(found)


def fronts() -> list[Any]:
    """The plugin's front ends in this process."""
    plugin = sys.modules.get("engine.vllm_plugin")
    return list(plugin._fronts) if plugin else []


def held() -> int:
    """Records that are still in their rings."""
    rings = [front.endpoint.statistics()["backend"].get("ring") for front in fronts()]
    return sum(ring.live for ring in rings if ring is not None)


def await_workers(options: dict[str, Any]) -> None:
    """Until the workers map the front end's ring, which takes them longest; not for ever: some never do."""
    each = options.get("tensor_parallel_size", 1) * options.get("pipeline_parallel_size", 1)
    workers = each * options.get("data_parallel_size", 1)
    deadline = time.monotonic() + _MAPPED_WITHIN
    for front in fronts() if workers > 1 else ():
        while time.monotonic() < deadline:
            if sum(name.startswith("worker") for name in front.admitted()) == workers:
                time.sleep(0.5)  # until their EngineCores know
                break
            time.sleep(0.05)


def child(name: str) -> int:
    """The pid of a living descendant with that in its title."""
    import psutil

    found = [p.pid for p in psutil.Process().children(recursive=True) if name in " ".join(p.cmdline())]
    return found[0]


def final_ways() -> dict[str, list[int]]:
    """`ways`, once each process has saved all it counted: it looks every second whether its file is there."""
    import psutil

    from engine.vllm.settings import folder

    ours = {os.getpid(), *(process.pid for process in psutil.Process().children(recursive=True))}
    files = [file for file in folder().glob("*.json") if int(file.stem.partition("-")[0]) in ours]
    for file in files:
        file.unlink()
    deadline = time.monotonic() + _SAVED_WITHIN
    while not all(file.exists() for file in files) and time.monotonic() < deadline:
        time.sleep(0.05)
    return ways()


def lose(numbers: list[int]) -> None:
    """The front end's tensors of these numbers never leave it, though vLLM's messages name them."""
    from transport import Endpoint

    send = Endpoint.try_send

    def sometimes(endpoint: Endpoint, body: Any, **named: Any) -> None:
        if body["key"][-1] not in numbers:
            send(endpoint, body, **named)

    Endpoint.try_send = sometimes  # type: ignore[assignment,method-assign]


Said = tuple[list[Any], dict[str, list[int]], int]
"""What `result` takes, found while vLLM still lives."""


def offline(options: dict[str, Any], batches: list[list[dict[str, Any]]], kill: str) -> Said:
    """`LLM.generate`."""
    from vllm import LLM, SamplingParams

    llm = LLM(**options)
    await_workers(options)
    said: list[Any] = []
    for batch in batches:
        outputs = llm.generate(batch, SamplingParams(max_tokens=2, temperature=0, logprobs=3), use_tqdm=False)
        said += map(answer, outputs)
        if kill == "front":
            print(result(said, ways()), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        elif kill:
            os.kill(child(kill), signal.SIGKILL)
            resources = llm.llm_engine.engine_core.resources
            while not resources.engine_dead:  # until vLLM has seen it
                time.sleep(0.05)
            try:
                llm.generate(batch, SamplingParams(max_tokens=2), use_tqdm=False)
            except Exception as error:  # noqa: BLE001  # its name is the result
                return [*said, type(error).__name__], ways(), 0
    return said, final_ways(), held()


async def served(options: dict[str, Any], batches: list[list[dict[str, Any]]]) -> Said:
    """`AsyncLLM`, what `vllm serve` runs, with several engines if need be; all prompts of a batch at once."""
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**options))
    await asyncio.to_thread(await_workers, options)
    params = SamplingParams(max_tokens=2, temperature=0, logprobs=3)

    async def ask(prompt: dict[str, Any], name: str) -> list[Any]:
        async for output in llm.generate(prompt, params, name):
            last = output
        return answer(last)

    said: list[Any] = []
    for number, batch in enumerate(batches):
        tasks = [ask(prompt, f"{number}-{index}") for index, prompt in enumerate(batch)]
        said += await asyncio.gather(*tasks)
    return said, await asyncio.to_thread(final_ways), held()


def main() -> None:
    given = json.loads(sys.argv[1])
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = given.pop("method", "spawn")
    layout, side = given.pop("layout", [2, 2]), given.pop("side", 280)
    firsts, kill = given.pop("firsts", [0, 1000]), given.pop("kill", "")
    mode = given.pop("mode", "offline")
    batches = [prompts(layout[0], layout[1], side, first) for first in firsts]
    if given.pop("same", False):  # every image of a prompt is its first one
        for images in (prompt["multi_modal_data"]["image"] for batch in batches for prompt in batch):
            images[:] = images[:1] * len(images)
    if "lose" in given:
        lose(given.pop("lose"))
    options = arguments(given)
    offline_ = mode == "offline"
    found = offline(options, batches, kill) if offline_ else asyncio.run(served(options, batches))
    print(result(*found), flush=True)


if __name__ == "__main__":
    main()
