"""Starts vLLM as programs of their own, with the plugin and without, for the tests here."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import pytest

from tests.hosts.namespaces import Host

HERE = Path(__file__).parent
RING = 256 << 20
_THERE = importlib.util.find_spec("vllm") is not None
_VERSION = tuple(map(int, metadata.version("vllm").split(".")[:2])) if _THERE else (0, 0)
_ITEM = (
    4 if _VERSION < (0, 33) else 1
)  # bytes: 0.33 sends pixels as they are and normalizes them at the model
TENSOR = 400 * 1176 * _ITEM  # an image of 280 x 280
RING_OF_TWO = _ITEM << 20  # bytes of a ring that holds two of them
TIMEOUT = 1500
_PLATFORM = "tensorferry_dry_platform"  # the entry point of the one plugin that stock vLLM needs here
_SETTLE = 20.0  # seconds in which a vLLM that ends by itself has ended

MARKS = [
    pytest.mark.skipif(not _THERE, reason="no vLLM here: make test-vllm"),
    pytest.mark.timeout(3 * TIMEOUT),
]


def environment() -> dict[str, str]:
    """Where vLLM finds the plugin, and the platform in place of a GPU's."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE.parent.parent), str(HERE / "platform")]),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # several workers on a small machine
        "VLLM_CPU_SIM_MULTI_NUMA": "0",  # its being there lets data-parallel ranks share a memory node
        "VLLM_LOG_STATS_INTERVAL": "1",
    }


def run(model: Path, *before: str, **options: Any) -> dict[str, Any]:
    """One vLLM by `scenario.py`; `before` is put before the command. Its result, with all it printed."""
    command = [sys.executable, str(HERE / "scenario.py"), json.dumps({"model": str(model), **options})]
    with tempfile.TemporaryFile("w+") as output:
        process = start([*before, *command], output)
        try:
            process.wait(TIMEOUT)
        finally:
            end(process)
        output.seek(0)
        lines = output.readlines()
    results = [line for line in lines if line.startswith("RESULT ")]
    assert results, f"exit code {process.returncode}\n{''.join(lines)[-8000:]}"
    result: dict[str, Any] = json.loads(results[-1].removeprefix("RESULT "))
    return result | {"log": "".join(lines)}


def start(
    command: list[str], output: IO[Any], host: Host | None = None, **environ: str
) -> subprocess.Popen[bytes]:
    """A program in a process group of its own, here or on a host; it and all it starts print to `output`."""
    env = environment() | environ
    if host is not None:
        command = host.command(command)
        env |= {"VLLM_HOST_IP": host.address, "GLOO_SOCKET_IFNAME": host.interface}
    return subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of its group: vLLM's own processes may outlive a killed front end."""
    deadline = time.monotonic() + (_SETTLE if process.poll() is not None else 0)
    while (left := list(_group(process.pid))) and time.monotonic() < deadline:
        time.sleep(0.1)
    if left:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _group(leader: int) -> Iterator[int]:
    """The pids of its living members."""
    import psutil

    for process in psutil.process_iter(["status"]):
        with contextlib.suppress(ProcessLookupError):
            if process.info["status"] != psutil.STATUS_ZOMBIE and os.getpgid(process.pid) == leader:
                yield process.pid


def segments() -> set[str]:
    """The names of all rings that there are, with processes or without."""
    return {path.name for path in Path("/dev/shm").glob("tensorferry.*")}


_stock: dict[str, Any] = {}


def stock(model: Path, **options: Any) -> list[Any]:
    """What vLLM says without the plugin, which is not even loaded, once for each set of options."""
    key = json.dumps(options, sort_keys=True)
    if key not in _stock:
        result = run(model, "env", f"VLLM_PLUGINS={_PLATFORM}", **options)
        assert not result["plugin"]
        _stock[key] = result["said"]
    said: list[Any] = _stock[key]
    return said


def ferry(**options: Any) -> dict[str, Any]:
    """The plugin's options, with a small ring."""
    return {"tensorferry": {"ring_bytes": RING, **options}}
