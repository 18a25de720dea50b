"""Real vLLM says the same with and without the plugin, and the counters say which way its images went."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
RING = 256 << 20
TENSOR = 400 * 1176 * 4  # an image of 280 x 280, as float32
_TIMEOUT = 1500

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="no vLLM here: make test-vllm"),
    pytest.mark.timeout(2 * _TIMEOUT),
]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from bench.hops.model import write_model

    folder = tmp_path_factory.mktemp("model")
    write_model(folder)
    return folder


def run(model: Path, *before: str, **options: Any) -> dict[str, Any]:
    """One vLLM as a program of its own; `before` is put before the command. What it printed last."""
    environ = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE.parent.parent), str(HERE / "platform")]),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    command = [
        *before,
        sys.executable,
        str(HERE / "scenario.py"),
        json.dumps({"model": str(model), **options}),
    ]
    done = subprocess.run(
        command,
        env=environ,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT,
        check=False,
        start_new_session=True,
    )
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert results, f"exit code {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    result: dict[str, Any] = json.loads(results[-1].removeprefix("RESULT "))
    return result


_stock: dict[str, Any] = {}


def stock(model: Path, **options: Any) -> list[Any]:
    """What vLLM says without the plugin, once for each set of options."""
    key = json.dumps(options, sort_keys=True)
    if key not in _stock:
        _stock[key] = run(model, **options)["said"]
    said: list[Any] = _stock[key]
    return said


def ferry(**options: Any) -> dict[str, Any]:
    return {"tensorferry": {"ring_bytes": RING, **options}}


def test_offline(model: Path) -> None:
    said = stock(model)
    assert len({json.dumps(answer) for answer in said}) == len(said), "each prompt has other images"
    result = run(model, additional_config=ferry())
    assert result["said"] == said
    assert result["ways"] == {"front: front end to engine: ring": [8, 8 * TENSOR]}


def test_copied_out_above_the_fill_level(model: Path) -> None:
    result = run(model, additional_config=ferry(copy_above=0))
    assert result["said"] == stock(model)
    assert result["ways"] == {"front: front end to engine: copied out": [8, 8 * TENSOR]}


def test_a_ring_that_is_too_small(model: Path) -> None:
    result = run(model, additional_config=ferry(ring_bytes=4 << 20))
    assert result["said"] == stock(model)
    assert 0 < result["ways"]["front: front end to engine: ring"][0] <= 8


def test_the_processor_cache(model: Path) -> None:
    options = {"mm_processor_cache_gb": 1, "same_images": True}
    result = run(model, additional_config=ferry(), **options)
    assert result["said"] == stock(model, **options)
    assert result["ways"]["front: front end to engine: ring"][0] == 4  # the second time nothing travels


def test_tensor_parallel_workers_get_handles(model: Path) -> None:
    result = run(model, additional_config=ferry(), tensor_parallel_size=2)
    assert result["said"] == stock(model, tensor_parallel_size=2)
    ways = result["ways"]
    # A worker that maps the front end's ring only just now has the first tensors pickled.
    handles, pickled = (
        ways.get(f"engine: engine to workers: {way}", [0])[0] for way in ("handle", "vLLM (Full)")
    )
    assert handles >= 4
    assert handles + pickled == 8
    assert ways["worker: taken by a worker: ring"] == [2 * handles, 2 * handles * TENSOR]


def test_data_parallel(model: Path) -> None:
    options = {"mode": "served", "data_parallel_size": 2, "layout": [4, 2]}
    result = run(model, additional_config=ferry(), **options)
    assert result["said"] == stock(model, mode="served", layout=[4, 2])
    assert result["ways"] == {"front: front end to engine: ring": [16, 16 * TENSOR]}


def test_an_engine_core_is_killed(model: Path) -> None:
    result = run(model, additional_config=ferry(), kill="EngineCore")
    assert result["said"][-1] == "EngineDeadError"


def test_a_dev_shm_of_64_mb(model: Path) -> None:
    unshare = shutil.which("unshare")
    if unshare is None or os.getuid():
        pytest.skip("a mount of its own needs root and unshare")
    mount = 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$0" "$@"'
    result = run(model, unshare, "--mount", "sh", "-c", mount, additional_config=ferry())
    assert result["said"] == stock(model)
    assert "front: front end to engine: ring" not in result["ways"]
