"""Real vLLM says the same with and without the plugin, and the counters say which way its images went."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.runs import MARKS, RING_OF_TWO, TENSOR, ferry, run, stock

pytestmark = MARKS
RING_1 = "front: front end to engine: ring"


def handed_on(ways: dict[str, list[int]], tensors: int, readers: int) -> None:
    """Every worker got handles, but for the first tensors: it maps the front end's ring only just then.

    Those are pickled, or copied once into the EngineCore's own ring.
    """
    handles, copied, pickled = (
        ways.get(f"engine: engine to workers: {way}", [0])[0]
        for way in ("handle", "ring", "vLLM (not linked)")
    )
    assert handles >= tensors // 2
    assert handles + copied + pickled == tensors
    taken = readers * (handles + copied)
    assert ways["worker: taken by a worker: ring"] == [taken, taken * TENSOR]


def test_offline(model: Path) -> None:
    said = stock(model)
    assert len({json.dumps(answer) for answer in said}) == len(said), "each prompt has other images"
    result = run(model, additional_config=ferry())
    assert result["said"] == said
    assert result["ways"] == {RING_1: [8, 8 * TENSOR]}
    assert result["held"] == 0, "an engine that idles keeps no image"


def test_copied_out_above_the_fill_level(model: Path) -> None:
    result = run(model, additional_config=ferry(copy_above=0))
    assert result["said"] == stock(model)
    assert result["ways"] == {"front: front end to engine: copied out": [8, 8 * TENSOR]}


def test_a_ring_that_is_too_small(model: Path) -> None:
    """It holds a prompt's two images, while vLLM is still at the last prompt's."""
    result = run(model, additional_config=ferry(ring_bytes=RING_OF_TWO))
    assert result["said"] == stock(model)
    counts = {way: count for way, (count, _) in result["ways"].items()}
    assert sum(counts.values()) == 8
    assert set(counts) <= {
        f"front: front end to engine: {way}" for way in ("ring", "copied out", "vLLM (Full)")
    }
    assert counts["front: front end to engine: vLLM (Full)"] > 0


def test_a_ring_that_holds_no_image(model: Path) -> None:
    result = run(model, additional_config=ferry(ring_bytes=RING_OF_TWO // 4))
    assert result["said"] == stock(model)
    assert result["ways"] == {"front: front end to engine: vLLM (larger than the ring)": [8, 8 * TENSOR]}


@pytest.mark.parametrize(
    ("cache", "travel"),
    [
        pytest.param({"mm_processor_cache_gb": 0}, 12, id="off"),
        pytest.param({"mm_processor_cache_gb": 1}, 8, id="lru"),  # the second time nothing travels
        pytest.param(
            {"mm_processor_cache_gb": 1, "mm_processor_cache_type": "shm"}, 0, id="shm"
        ),  # vLLM's own way
    ],
)
def test_the_processor_cache(model: Path, cache: dict[str, Any], travel: int) -> None:
    """The same images twice, then new ones."""
    firsts = [0, 0, 1000]
    result = run(model, additional_config=ferry(), firsts=firsts, **cache)
    assert result["said"] == stock(model, firsts=firsts)
    assert result["ways"].get(RING_1, [0, 0]) == [travel, travel * TENSOR]


@pytest.mark.parametrize("kind", ["tensor", "pipeline"])
def test_workers_get_handles(model: Path, kind: str) -> None:
    options = {f"{kind}_parallel_size": 2}
    result = run(model, additional_config=ferry(), **options)
    assert result["said"] == stock(model, **options)
    assert result["ways"][RING_1] == [8, 8 * TENSOR]
    handed_on(result["ways"], tensors=8, readers=2)
    assert result["held"] == 0


def test_processes_that_are_forked(model: Path) -> None:
    """As vLLM does where nothing asks for spawn: what is hooked in them was hooked in the front end."""
    result = run(model, method="fork", tensor_parallel_size=2, additional_config=ferry())
    assert result["method"] == "fork", "and so it was to the end"
    assert result["said"] == stock(model, tensor_parallel_size=2)
    assert result["ways"][RING_1] == [8, 8 * TENSOR]
    handed_on(result["ways"], tensors=8, readers=2)
    assert result["held"] == 0


def test_data_parallel(model: Path) -> None:
    options = {"mode": "served", "data_parallel_size": 2, "layout": [4, 2]}
    result = run(model, additional_config=ferry(), **options)
    assert result["said"] == stock(model, mode="served", layout=[4, 2])
    assert result["ways"][RING_1] == [16, 16 * TENSOR]
    handed_on(result["ways"], tensors=16, readers=1)  # each engine has a worker process


def test_an_image_several_times_in_a_prompt(model: Path) -> None:
    """With several engines vLLM's cache gives one tensor for all of them, which travels once on each hop."""
    options = {"mode": "served", "layout": [4, 3], "same": True, "mm_processor_cache_gb": 1}
    result = run(model, additional_config=ferry(), data_parallel_size=2, **options)
    assert result["said"] == stock(model, **options)
    assert result["ways"][RING_1] == [8, 8 * TENSOR]
    handed_on(result["ways"], tensors=8, readers=1)


def test_a_dev_shm_of_64_mb(model: Path) -> None:
    unshare = shutil.which("unshare")
    if unshare is None or os.getuid():
        pytest.skip("a mount of its own needs root and unshare")
    mount = 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$0" "$@"'
    result = run(model, unshare, "--mount", "sh", "-c", mount, additional_config=ferry())
    assert result["said"] == stock(model)
    assert result["ways"] == {"front: front end to engine: vLLM (not linked)": [8, 8 * TENSOR]}
    warnings = [line for line in result["log"].splitlines() if "tensorferry: tensors go vLLM's way: " in line]
    assert len(warnings) == 1
    assert "a ring of 256 MiB does not fit: /dev/shm has" in warnings[0]
