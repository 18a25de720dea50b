"""What a vLLM is asked, what it answered, and which way its tensors went. Shared with tests/vllm."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

Answer = list[Any]
"""Token ids; for each token the likeliest ones: (token, logit)."""

PLACEHOLDER = "<|vision_start|><|image_pad|><|vision_end|>"


def prompts(count: int, images: int, side: int, first: int = 0) -> list[dict[str, Any]]:
    """Prompts with images of noise, the same for the same numbers; each image with colours of its own, since
    a model's mean over much noise of one kind is the same for all.
    """
    import numpy as np
    from PIL import Image

    def image(seed: int) -> Image.Image:
        draw = np.random.default_rng(seed)
        noise = draw.integers(0, 256, (side, side, 3), dtype=np.uint8)
        return Image.fromarray((noise * draw.uniform(0.2, 1, 3).astype(np.float32)).astype(np.uint8))

    text = f"<|im_start|>user\n{PLACEHOLDER * images}Say.<|im_end|>\n"
    numbers = range(first, first + count * images)
    seeds = [numbers[start : start + images] for start in range(0, count * images, images)]
    return [{"prompt": text, "multi_modal_data": {"image": [image(n) for n in some]}} for some in seeds]


def answer(output: Any) -> Answer:
    """What the model said to a prompt, as exact as floats are."""
    said = output.outputs[0]
    return [list(said.token_ids), [sorted((k, v.logprob) for k, v in top.items()) for top in said.logprobs]]


def difference(one: Answer, other: Answer) -> float:
    """Of two answers: 0 when they are the same, else the largest difference of a logit, or infinity where
    other tokens were said or likely.
    """
    if json.dumps(one) == json.dumps(other):
        return 0.0
    rows, others = ([row for top in said[1] for row in top] for said in (one, other))
    if one[0] != other[0] or [token for token, _ in rows] != [token for token, _ in others]:
        return float("inf")
    return max(abs(float(a) - float(b)) for (_, a), (_, b) in zip(rows, others, strict=True))


def distinct(answers: Sequence[Answer]) -> bool:
    """Whether no two are the same."""
    return len({json.dumps(said) for said in answers}) == len(answers)


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
