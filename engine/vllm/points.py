"""What of vLLM's inside the plugin needs, by hop. vLLM calls none of it public.

The hooks look at it before they hook anything, `tensorferry doctor --vllm` before vLLM is started.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from typing import Any

TESTED = ("0.25.1", "0.33.0")

OPTIONS, LOG, FRONT, ENGINE, WORKERS = (
    "options",
    "counters in the log",
    "hop 1, front end",
    "hop 1, EngineCore",
    "hop 2, workers",
)
# `module:path`, or `module:path:names`: the code of that function uses one of these names.
POINTS = {
    OPTIONS: ("vllm.engine.arg_utils:EngineArgs.create_engine_config",),
    LOG: ("vllm.v1.metrics.loggers:LoggingStatLogger.log",),
    FRONT: (
        "vllm.v1.engine.core_client:MPClient.__init__",
        "vllm.v1.engine.core_client:SyncMPClient._send_input:encoder",
        "vllm.v1.engine.core_client:AsyncMPClient._send_input:encoder",
        "vllm.v1.serial_utils:OOBTensorConsumer",
    ),
    ENGINE: (
        "vllm.v1.engine.core:EngineCoreProc.process_input_sockets:tensor_ipc_receiver",
        "vllm.v1.engine.core:EngineCoreProc._handle_request_preproc_error",
        "vllm.v1.engine.core:EngineCore.preprocess_add_request",
    ),
    # 0.25 and 0.26 pickle by `copyreg`'s table, later ones by a function of the queue's module.
    WORKERS: (
        "vllm.distributed.device_communicators.shm_broadcast:MessageQueue.enqueue:dumps|_reduce_tensor",
        "vllm.v1.worker.worker_base:WorkerWrapperBase.init_device",
    ),
}

hooked: dict[str, str] = {}  # in this process: part of the plugin, and "" or why it was left alone


def require(hop: str) -> None:
    """ImportError, AttributeError or what an import raises, where one of a hop's points is not there."""
    for point in POINTS[hop]:
        _find(point)


def absent(hop: str) -> Iterator[str]:
    """A hop's points that are not there, with the reason where it is an odd one. Imports vLLM."""
    for point in POINTS[hop]:
        try:
            # vLLM logs to what is standard output as it is imported.
            with contextlib.redirect_stdout(sys.stderr):
                _find(point)
        except (ImportError, AttributeError):
            yield point
        except Exception as error:  # noqa: BLE001  # what an import may raise is anybody's guess
            yield f"{point} ({type(error).__name__}: {error})"


def untested(version: str) -> str:
    """What to say of a vLLM of a version that nobody tried; "" for the others."""
    number, first, last = (tuple(map(int, re.findall(r"\d+", v)[:3])) for v in (version, *TESTED))
    if first <= number <= last:
        return ""
    return f"vLLM {version} was not tried; known are {TESTED[0]} up to {TESTED[1]}"


def _find(point: str) -> Any:
    module, path, names = (*point.split(":"), "")[:3]
    found: Any = importlib.import_module(module)
    for name in path.split("."):
        found = getattr(found, name)
    if names and not set(names.split("|")) & set(inspect.unwrap(found).__code__.co_names):
        raise AttributeError(f"{path} does not use {names.replace('|', ' or ')}")
    return found
