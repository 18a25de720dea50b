"""Whether vLLM will find the plugin and is what it knows, and what it does in the processes that run."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator
from importlib import metadata
from typing import Any, Literal, NamedTuple

from engine.vllm.counts import saved

TESTED = ("0.25.1", "0.33.0")
_GROUP, _NAME = "vllm.general_plugins", "tensorferry"

# What each hop hooks. vLLM calls none of it public.
POINTS = {
    "hop 1, front end": (
        "vllm.v1.engine.core_client:MPClient.__init__",
        "vllm.v1.engine.core_client:SyncMPClient._send_input",
        "vllm.v1.engine.core_client:AsyncMPClient._send_input",
        "vllm.v1.serial_utils:OOBTensorConsumer",
    ),
    "hop 1, EngineCore": (
        "vllm.v1.engine.core:EngineCoreProc.process_input_sockets",
        "vllm.v1.engine.core:EngineCoreProc._handle_request_preproc_error",
        "vllm.v1.engine.core:EngineCore.preprocess_add_request",
    ),
    "hop 2, workers": (
        "vllm.distributed.device_communicators.shm_broadcast:MessageQueue.enqueue",
        "vllm.v1.worker.worker_base:WorkerWrapperBase.init_device",
    ),
}


class Line(NamedTuple):
    """One look: as `engine.doctor.Finding`, which this becomes."""

    what: str
    status: Literal["ok", "note", "problem"]
    found: str
    advice: str = ""


def lines() -> Iterator[Line]:
    """What there is to say. Imports vLLM, which takes seconds."""
    try:
        version = metadata.version("vllm")
    except metadata.PackageNotFoundError:
        yield Line("vLLM", "problem", "not installed here", "Install tensorferry into vLLM's environment.")
        return
    yield Line("vLLM", "ok", f"{version}; known are {TESTED[0]} up to {TESTED[1]}")
    yield _plugin()
    for hop, points in POINTS.items():
        absent = [point for point in points if not _is_there(point)]
        if absent:
            yield Line(hop, "problem", f"not there: {', '.join(absent)}", "That hop goes vLLM's own way.")
        else:
            yield Line(hop, "ok", "all that is hooked is there")
    yield from _running()


def _plugin() -> Line:
    allowed = os.environ.get("VLLM_PLUGINS")
    if not metadata.entry_points(group=_GROUP, name=_NAME):
        return Line("plugin", "problem", f"no {_NAME} in {_GROUP}", "pip install tensorferry (again)")
    if allowed is not None and _NAME not in allowed.split(","):
        return Line("plugin", "problem", f"VLLM_PLUGINS={allowed} leaves it out", f"Add {_NAME} to it.")
    return Line("plugin", "ok", f"{_NAME} in {_GROUP}")


def _is_there(point: str) -> bool:
    module, _, path = point.partition(":")
    try:
        with contextlib.redirect_stdout(sys.stderr):  # vLLM logs to what is standard output as it is imported
            found: Any = importlib.import_module(module)
        for name in path.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError):
        return False
    return True


def _running() -> Iterator[Line]:
    processes = list(saved())
    if not processes:
        advice = """vllm serve … --additional-config '{"tensorferry": true}'"""
        yield Line("running", "note", "no vLLM of this user goes through rings now", advice)
    for process in processes:
        peers = [f"{name} ({how})" for name, how in process.get("peers", {}).items()]
        ways = [f"{hop}: {how} {count} ({size / 1e6:.1f} MB)" for hop, how, count, size in process["tensors"]]
        text = f"linked with {', '.join(peers) or 'nobody'}; {'; '.join(ways) or 'no tensors yet'}"
        yield Line(f"{process['role']} {process['pid']}", "ok", text)
