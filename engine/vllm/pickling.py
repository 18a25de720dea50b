"""Hop 2: the executor's queue to the workers pickles a tensor as a call of `take`, which the worker makes.

vLLM's `MessageQueue` has no place for tensors beside its messages. So how they are pickled is changed while
one is written: in the function of the queue's module that does it, in older versions in `copyreg`'s table.
"""

from __future__ import annotations

import copyreg
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from engine.vllm.guard import Around, Harmless
from engine.vllm.mailbox import Key
from engine.vllm.roles import Core, Worker

worker: Worker | None = None  # of this process, where it is one
_pickling = threading.local()  # .core: whose MessageQueue this thread is writing to


def take(sender: str, key: Key) -> torch.Tensor:
    """In a worker: the tensor that its EngineCore handed on. LookupError when it is gone."""
    if worker is None:
        raise RuntimeError("tensorferry: this process is no worker with a link to its EngineCore")
    return worker.take(sender, key)


def hook(queue: Any, core: Core) -> None:
    """From now on tensors that are written to this `MessageQueue` are handed on by `core`."""
    enqueue = queue.enqueue

    @functools.wraps(enqueue)
    def wrapped(*arguments: Any, **named: Any) -> Any:
        with Around("the queue to the workers", lambda: as_calls(core)):
            return enqueue(*arguments, **named)

    queue.enqueue = wrapped


@contextmanager
def as_calls(core: Core) -> Iterator[None]:
    """Until the end, this thread pickles tensors as calls of `take` where the workers have them."""
    from vllm.distributed.device_communicators import shm_broadcast

    core.begin_message()
    _pickling.core = core
    later = hasattr(shm_broadcast, "_reduce_tensor")
    before: Any = shm_broadcast._reduce_tensor if later else copyreg.dispatch_table.get(torch.Tensor)
    if later:
        shm_broadcast._reduce_tensor = functools.partial(_reduce, before)
    else:
        copyreg.dispatch_table[torch.Tensor] = functools.partial(_reduce, before or _reduce_as_torch)
    try:
        yield
    finally:
        _pickling.core = None
        if later:
            shm_broadcast._reduce_tensor = before
        elif before is None:
            del copyreg.dispatch_table[torch.Tensor]
        else:
            copyreg.dispatch_table[torch.Tensor] = before


def _reduce(original: Callable[[torch.Tensor], Any], tensor: torch.Tensor) -> Any:
    core: Core | None = getattr(_pickling, "core", None)
    handed = None
    if core is not None:
        with Harmless("a tensor for the workers"):
            handed = core.hand_on(tensor)
    return original(tensor) if handed is None else (take, handed)


def _reduce_as_torch(tensor: torch.Tensor) -> Any:
    return tensor.__reduce_ex__(5)  # type: ignore[no-untyped-call]
