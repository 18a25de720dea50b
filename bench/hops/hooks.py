"""A plugin of vLLM that notes when images leave one of its processes and when they have come to the next.

Found by vLLM in every process through the entry point `vllm.general_plugins` when the folder `plugin` beside
this file is on PYTHONPATH. Each process appends JSON lines to a file of its own in the folder that the
variable `FOLDER` names; without it nothing is done. Times are CLOCK_MONOTONIC, seconds: one clock for all.

| `what` | of | `start` and `end` |
|---|---|---|
| sent | a request, in the front end | entering `_send_input` (encode, send), and leaving it |
| decoded | the same request, in its EngineCore | `end`: the message is a request again |
| put | a message to the workers | handing it to the executor, and leaving the queue's `enqueue` |
| taken | the same message, in each worker | asking the queue for it, and having it unpickled |

tensorferry's plugin wraps some of the same functions, before or after. What it does lies inside of the times
here in either order: `_send_input` is wrapped on the client itself once that is made, and a message counts
from the executor's call, above the queue that the plugin wraps.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.hops.model import larger_weights

FOLDER = "TENSORFERRY_HOPS"

_file: int | None = None
_call = threading.local()  # .start: when this thread called the executor


def register() -> None:
    """Hook what this process of vLLM has. AttributeError where vLLM is not as known: it then ends."""
    global _file
    folder = os.environ.get(FOLDER)
    if folder is None or _file is not None:
        return
    _file = os.open(Path(folder, f"{os.getpid()}.jsonl"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for module, hook in _HOOKS.items():
        if module in sys.modules:
            hook()


def _note(what: str, **more: Any) -> None:
    """At once and unbuffered: vLLM's processes are killed."""
    assert _file is not None
    os.write(_file, (json.dumps({"what": what, "pid": os.getpid(), **more}) + "\n").encode())


def _wrap(owner: type, name: str, around: Callable[..., Any]) -> None:
    """Replace a method by `around(original, self, ...)`."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*arguments: Any, **named: Any) -> Any:
        return around(original, *arguments, **named)

    setattr(owner, name, wrapped)


def _images(request: Any) -> int:
    return sum(feature.data is not None for feature in getattr(request, "mm_features", None) or ())


# ---------------------------------------------------------------------- front end to EngineCore


def _hook_front() -> None:
    from vllm.v1.engine.core_client import MPClient

    _wrap(MPClient, "__init__", _client_made)


def _client_made(original: Callable[..., None], client: Any, *arguments: Any, **named: Any) -> None:
    original(client, *arguments, **named)
    client._send_input = functools.partial(_send, weakref.ref(client), type(client)._send_input)


def _send(
    client: Callable[[], Any],
    original: Callable[..., Any],
    kind: Any,
    request: Any,
    *more: Any,
    **named: Any,
) -> Any:
    start = time.monotonic()
    result = original(client(), kind, request, *more, **named)
    end = time.monotonic()
    if images := _images(request):
        _note("sent", id=request.request_id, start=start, end=end, images=images)
    return result


def _hook_engine() -> None:
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.serial_utils import MsgpackDecoder

    def decode(original: Callable[..., Any], *arguments: Any) -> Any:
        decoded = original(*arguments)
        end = time.monotonic()
        if isinstance(decoded, EngineCoreRequest) and (images := _images(decoded)):
            _note("decoded", id=decoded.request_id, end=end, images=images)
        return decoded

    _wrap(MsgpackDecoder, "decode", decode)


# ---------------------------------------------------------------------- EngineCore to workers


def _hook_executor() -> None:
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor

    _wrap(MultiprocExecutor, "collective_rpc", _called)
    _wrap(MessageQueue, "enqueue", _enqueue)
    _wrap(MessageQueue, "dequeue", _dequeue)


def _called(original: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    _call.start = time.monotonic()
    return original(*arguments, **named)


def _enqueue(original: Callable[..., Any], queue: Any, message: Any, *more: Any, **named: Any) -> Any:
    result = original(queue, message, *more, **named)
    _passed("put", queue, message, getattr(_call, "start", 0.0))
    return result


def _dequeue(original: Callable[..., Any], queue: Any, *more: Any, **named: Any) -> Any:
    start = time.monotonic()
    message = original(queue, *more, **named)
    _passed("taken", queue, message, start)
    return message


def _passed(what: str, queue: Any, message: Any, start: float) -> None:
    """Every reader gets all messages of a queue, in the order in which they were put: they are numbered."""
    end = time.monotonic()
    queue._hops_number = number = getattr(queue, "_hops_number", -1) + 1
    if images := _scheduled(message):
        name = queue.handle.local_subscribe_addr
        _note(what, queue=name, number=number, start=start, end=end, images=images)


def _scheduled(message: Any) -> int:
    """Images in a message of the executor, (method, arguments, …); 0 for what goes the other way."""
    if not isinstance(message, tuple) or len(message) < 2 or message[0] != "execute_model":
        return 0
    return sum(map(_images, message[1][0].scheduled_new_reqs))


def _hook_worker() -> None:
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    def begin(original: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        larger_weights()
        return original(*arguments, **named)

    _wrap(WorkerWrapperBase, "init_device", begin)


# By the module that a process has where there is something to hook.
_HOOKS = {
    "vllm.engine.arg_utils": _hook_front,
    "vllm.v1.engine.core": _hook_engine,
    "vllm.v1.executor.multiproc_executor": _hook_executor,
    "vllm.v1.worker.worker_base": _hook_worker,
}
