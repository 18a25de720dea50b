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

PLACEHOLDER = "<|vision_start|><|image_pad|><|vision_end|>"


def prompts(count: int, images: int, side: int, first: int = 0) -> list[dict[str, Any]]:
    """Prompts with images of noise, the same for the same numbers."""
    import numpy as np
    from PIL import Image

    def image(seed: int) -> Image.Image:
        return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))

    text = f"<|im_start|>user\n{PLACEHOLDER * images}Say.<|im_end|>\n"
    numbers = range(first, first + count * images)
    seeds = [numbers[start : start + images] for start in range(0, count * images, images)]
    return [{"prompt": text, "multi_modal_data": {"image": [image(n) for n in some]}} for some in seeds]


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


def answer(output: Any) -> list[Any]:
    """What the model said to a prompt, as exact as floats are."""
    said = output.outputs[0]
    return [list(said.token_ids), [sorted((k, v.logprob) for k, v in top.items()) for top in said.logprobs]]


def ways() -> dict[str, list[int]]:
    """Tensors and bytes by hop and way, of all processes that live, here and below."""
    import psutil

    from engine.vllm.counts import saved

    ours = {os.getpid(), *(process.pid for process in psutil.Process().children(recursive=True))}
    rows: dict[str, list[int]] = {}
    for process in saved():
        if process["pid"] not in ours:
            continue
        for hop, how, count, nbytes in process["tensors"]:
            row = rows.setdefault(f"{process['role']}: {hop}: {how}", [0, 0])
            row[0] += count
            row[1] += nbytes
    return rows


def child(name: str) -> int:
    """The pid of a living descendant with that in its title."""
    import psutil

    found = [p.pid for p in psutil.Process().children(recursive=True) if name in " ".join(p.cmdline())]
    return found[0]


Said = tuple[list[Any], dict[str, list[int]]]


def offline(options: dict[str, Any], batches: list[list[dict[str, Any]]], kill: str) -> Said:
    """`LLM.generate`."""
    from vllm import LLM, SamplingParams

    llm = LLM(**options)
    said: list[Any] = []
    for batch in batches:
        outputs = llm.generate(batch, SamplingParams(max_tokens=2, temperature=0, logprobs=3), use_tqdm=False)
        said += map(answer, outputs)
        if kill:
            os.kill(child(kill), signal.SIGKILL)
            resources = llm.llm_engine.engine_core.resources
            while not resources.engine_dead:  # until vLLM has seen it
                time.sleep(0.05)
            try:
                llm.generate(batch, SamplingParams(max_tokens=2), use_tqdm=False)
            except Exception as error:  # noqa: BLE001  # its name is the result
                return [*said, type(error).__name__], ways()
    time.sleep(2.5)  # the counters are saved every second
    return said, ways()


async def served(options: dict[str, Any], batches: list[list[dict[str, Any]]]) -> Said:
    """`AsyncLLM`, what `vllm serve` runs, with several engines if need be; all prompts of a batch at once."""
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**options))
    params = SamplingParams(max_tokens=2, temperature=0, logprobs=3)

    async def ask(prompt: dict[str, Any], name: str) -> list[Any]:
        async for output in llm.generate(prompt, params, name):
            last = output
        return answer(last)

    said: list[Any] = []
    for number, batch in enumerate(batches):
        tasks = [ask(prompt, f"{number}-{index}") for index, prompt in enumerate(batch)]
        said += await asyncio.gather(*tasks)
    await asyncio.sleep(2.5)
    return said, ways()


def main() -> None:
    given = json.loads(sys.argv[1])
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = given.pop("method", "spawn")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # several workers on a small machine
    layout, side = given.pop("layout", [2, 2]), given.pop("side", 280)
    repeats, same, kill = given.pop("repeats", 2), given.pop("same_images", False), given.pop("kill", "")
    mode = given.pop("mode", "offline")
    batches = [
        prompts(layout[0], layout[1], side, first=0 if same else 1000 * repeat) for repeat in range(repeats)
    ]
    options = arguments(given)
    offline_ = mode == "offline"
    said, counted = offline(options, batches, kill) if offline_ else asyncio.run(served(options, batches))
    print("RESULT " + json.dumps({"said": said, "ways": counted}), flush=True)


if __name__ == "__main__":
    main()
