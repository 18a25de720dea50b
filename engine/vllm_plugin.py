"""vLLM's entry point: its images go through tensorferry's rings, where `--additional-config` asks for it.

`register` is called by vLLM (group `vllm.general_plugins`) in every process. It hooks a few of vLLM's
functions; without `{"tensorferry": {...}}` in the configuration every hook passes straight through. Where
vLLM's inside is not what is known here, that hop is left alone; where rings are asked for, a warning says
what is missing. A hook takes whatever arguments vLLM gives and hands them on as they came; what fails in our
part of it ends there (`engine/vllm/guard.py`).

Hop 1: an `OOBTensorConsumer` on the encoder of an `MPClient` and a provider on its `EngineCoreProc`, which is
how vLLM lets tensors go beside its messages. Hop 2: the executor's `MessageQueue` pickles tensors otherwise
(`engine/vllm/pickling.py`). `engine/vllm/roles.py` says who keeps what alive meanwhile.
"""

from __future__ import annotations

import _thread
import functools
import logging
import os
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from enum import Enum
from importlib import metadata
from multiprocessing import util
from typing import Any

import torch

from engine.vllm import pickling, points
from engine.vllm.guard import Around, Harmless, pick
from engine.vllm.roles import Core, Front, Worker
from engine.vllm.settings import Settings, options_in, settings_of, sweep
from transport import RateLimit

_log = logging.getLogger("vllm.tensorferry")

_READY_TIMEOUT = 3.0  # of the engines of this host, which have loaded their models already
_core: Core | None = None
_fronts: weakref.WeakSet[Front] = weakref.WeakSet()
_unsaid: dict[str, Exception] = {}  # what was not hooked, and why, until a configuration asks for rings


def register() -> None:
    """Hook vLLM; safe to call again. Never raises: vLLM runs on without."""
    for name, hook in _HOOKS.items():
        try:
            if hook():
                points.hooked[name] = ""
        except Exception as error:  # noqa: BLE001  # an import may raise anything
            if name not in points.hooked:
                _unsaid[name] = error
            points.hooked[name] = str(error)


def _say_what_is_not_known() -> None:
    """Once in each process, by whichever hook is the first to see a configuration that asks for rings."""
    for name, error in list(_unsaid.items()):
        del _unsaid[name]
        odd = not isinstance(error, ImportError | AttributeError)
        text = "tensorferry: %s is not as known here (%s); it goes vLLM's way"
        _log.warning(text, name, error, exc_info=error if odd else None)


def _asked(*given: Any) -> bool:
    """Whether the configuration that is among these, or that one of them has, asks for rings.

    It is found by what it is. Where there is none nobody can tell, and vLLM is left alone without a word.
    """
    inner = (value for thing in given for value in list(_attributes(thing).values()))
    found = (_attributes(value) for value in (*given, *inner))
    config = next((attributes for attributes in found if "additional_config" in attributes), {})
    if options_in(config.get("additional_config")) is None:
        return False
    _say_what_is_not_known()
    return True


def _attributes(thing: Any) -> dict[str, Any]:
    """Those of its own; no property of vLLM's is asked, which may raise anything."""
    found: dict[str, Any] = getattr(thing, "__dict__", {})
    return found


def _wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Replace a method by `around(original, self, ...)`, once. AttributeError when it is not there."""
    original = getattr(owner, name)
    if getattr(original, "_tensorferry", False):
        return

    @functools.wraps(original)
    def wrapped(*arguments: Any, **named: Any) -> Any:
        return around(original, *arguments, **named)

    wrapped._tensorferry = True  # type: ignore[attr-defined]
    setattr(owner, name, wrapped)


def _settings(vllm_config: Any, engines: Sequence[int] = ()) -> Settings:
    """Those that were asked for, with defaults for this vLLM. engines: those of a front end."""
    depends: dict[str, int] = {"engines": len(engines) or 1}
    with Harmless("what the size of the ring depends on", tensors=False):
        depends["queues"] = vllm_config.parallel_config.data_parallel_size_local
        depends["cache_bytes"] = _cache_bytes(vllm_config) if engines else 0
    settings = settings_of(vllm_config.additional_config, **depends)
    assert settings is not None  # who calls has looked
    return settings


def _cache_bytes(vllm_config: Any) -> int:
    """What an EngineCore may keep in a cache of images of its own, as vLLM decides whether there is one."""
    parallel, images = vllm_config.parallel_config, vllm_config.model_config.multimodal_config
    alone = parallel.data_parallel_size == 1 or parallel.data_parallel_external_lb
    if images is None or not alone or parallel._api_process_count > 1:
        return 0
    return int(images.mm_processor_cache_gb * (1 << 30)) if images.mm_processor_cache_type == "lru" else 0


# ---------------------------------------------------------------------- the front end


def _has_engines() -> bool:
    """Not so a process that has none, such as one that looks at models."""
    return "vllm.engine.arg_utils" in sys.modules


def _hook_options() -> bool:
    if not _has_engines():
        return False
    points.require(points.OPTIONS)
    from vllm.engine.arg_utils import EngineArgs

    _wrap(EngineArgs, "create_engine_config", _options_given)
    return True


def _options_given(original: Callable[..., Any], given: Any, *arguments: Any, **named: Any) -> Any:
    """ValueError, which is for who wrote them, before anything is loaded."""
    if settings_of(getattr(given, "additional_config", None)) is not None:
        _say_what_is_not_known()
        with Harmless("what is done at the end", tensors=False):
            _sweep_at_exit()
    return original(given, *arguments, **named)


@functools.cache
def _sweep_at_exit() -> None:
    """Several API servers are killed by `vllm serve` at its end: their rings go when they are gone."""
    util.Finalize(None, _sweep, exitpriority=-1)  # below 0: after multiprocessing waited for its own


def _sweep() -> None:
    with Harmless("the sweep at the end", tensors=False):
        sweep()


def _hook_front() -> bool:
    if not _has_engines():
        return False
    points.require(points.FRONT)
    from vllm.v1.engine.core_client import AsyncMPClient, MPClient, SyncMPClient

    for client in (SyncMPClient, AsyncMPClient):
        _wrap(client, "_send_input", _client_sends)
    _wrap(MPClient, "__init__", _client_made)
    return True


def _client_made(original: Callable[..., None], client: Any, *arguments: Any, **named: Any) -> None:
    original(client, *arguments, **named)
    if _asked(client, *arguments, *named.values()):
        with Harmless("the front end"):
            _link(client)


def _link(client: Any) -> None:
    """Make the client's ring and wait for its engines on this host. AttributeError: vLLM is not as known."""
    parallel = client.vllm_config.parallel_config
    engines = client.engine_ranks_managed
    client.core_engine  # noqa: B018  # what `_client_sends` asks for
    with Harmless("the look at vLLM's version", tensors=False):
        if untested := points.untested(metadata.version("vllm")):
            _log.warning("tensorferry: %s", untested)
    if not _has_tensors(client.vllm_config):
        return
    if client.encoder.oob_tensor_consumer is not None:
        _log.warning("tensorferry: mm_tensor_ipc carries the tensors already; take direct_rpc")
        return
    front = Front(_settings(client.vllm_config, engines), _address_of(client.input_socket))
    leave_with(client, front)
    consumer = _consumer(front)
    there = front.wait_for(engines[: parallel.data_parallel_size_local], _READY_TIMEOUT)
    _log.info("tensorferry: engines %s of %s map the ring", there, engines)
    client.encoder.oob_tensor_consumer = consumer
    client._tensorferry = front
    _fronts.add(front)


def leave_with(client: object, front: Front) -> None:
    """Close the front end when the client is gone; at the end of the process it closes by itself."""
    # In a thread of its own: the collection of the client may run in one of the front's, under its locks.
    weakref.finalize(client, _thread.start_new_thread, front.close, ()).atexit = False


def _has_tensors(vllm_config: Any) -> bool:
    model = vllm_config.model_config
    return model is not None and (model.multimodal_config is not None or model.enable_prompt_embeds)


def _address_of(socket: Any) -> str:
    import zmq

    address: bytes = socket.getsockopt(zmq.LAST_ENDPOINT)
    return address.rstrip(b"\0").decode()


def _consumer(front: Front) -> Any:
    from vllm.v1.serial_utils import OOBTensorConsumer

    class Consumer(OOBTensorConsumer):  # type: ignore[misc]
        """What vLLM's encoder offers its tensors to."""

        def __call__(self, tensor: torch.Tensor) -> dict[str, Any] | None:
            with Harmless("a tensor for the engine"):
                return front.lend(tensor)
            return None

        def new_message(self) -> None:
            """The message's tensors were announced by `sending_to`."""

    return Consumer()


def _client_sends(original: Callable[..., Any], client: Any, *arguments: Any, **named: Any) -> Any:
    front: Front | None = getattr(client, "_tensorferry", None)
    if front is None:
        return original(client, *arguments, **named)
    with Around("a request", lambda: _announced(front, client, (*arguments, *named.values()))):
        return original(client, *arguments, **named)


def _announced(front: Front, client: Any, given: tuple[Any, ...]) -> AbstractContextManager[None] | None:
    """The consumer is not told for which engine it is asked; of a utility call a loss could not be told.

    LookupError where there is an argument that is not known: it may say another engine.
    """
    kind = pick(given, "kind of request", lambda value: isinstance(value, Enum))
    if kind.name != "ADD":
        return None
    request = pick(given, "request", lambda value: hasattr(value, "mm_features"))
    others = [value for value in given if value is not None and value is not kind and value is not request]
    engine = others.pop() if others and isinstance(others[-1], bytes) else client.core_engine
    if others:
        raise LookupError(f"{others!r} is not known among the arguments")
    return front.sending_to(engine, list(_tensors_of(request)))


def _tensors_of(request: Any) -> Iterator[torch.Tensor]:
    """Those of a request's images, videos and sounds; what is not found here is met by the consumer."""
    for feature in getattr(request, "mm_features", None) or ():
        yield from _tensors_of_feature(feature)


def _tensors_of_feature(feature: Any) -> Iterator[torch.Tensor]:
    for element in (getattr(feature, "data", None) or {}).values():
        yield from _tensors_in(getattr(element, "data", None))


def _tensors_in(data: Any) -> Iterator[torch.Tensor]:
    """Those of nested lists, in the order of vLLM's encoder."""
    if type(data) is torch.Tensor:
        yield data
    elif isinstance(data, list | tuple):
        for inner in data:
            yield from _tensors_in(inner)


def _hook_log() -> bool:
    if not _has_engines():
        return False
    points.require(points.LOG)
    from vllm.v1.metrics.loggers import LoggingStatLogger

    _wrap(LoggingStatLogger, "log", _statistics_logged)
    return True


def _statistics_logged(original: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """vLLM has a logger for each engine; the counters of all engines are said once, and when they grew."""
    result = original(*arguments, **named)
    _asked(*arguments)  # where neither the options nor the client is as known, nobody else here sees them
    with Harmless("the line of counters", tensors=False):
        for front in _fronts:
            if line := front.counts.news():
                _log.info("tensorferry: %s", line)
    return result


# ---------------------------------------------------------------------- the engine


def _hook_engine() -> bool:
    if "vllm.v1.engine.core" not in sys.modules:
        return False
    points.require(points.ENGINE)
    from vllm.v1.engine.core import EngineCore, EngineCoreProc

    _wrap(EngineCore, "preprocess_add_request", _request_came)
    _wrap(EngineCoreProc, "process_input_sockets", _input_begins)
    return True


def _input_begins(original: Callable[..., Any], engine: Any, *arguments: Any, **named: Any) -> Any:
    """In the engine's input thread, before its decoders are built."""
    if _asked(engine):
        with Harmless("the EngineCore"):
            if _has_tensors(engine.vllm_config) and engine.tensor_ipc_receiver is None:
                _meet(engine, pick((*arguments, *named.values()), "list of addresses", _is_addresses))
    return original(engine, *arguments, **named)


def _has_children(vllm_config: Any) -> bool:
    """Whether its workers are child processes of the EngineCore. Ray's are not, and make no end of ours."""
    return bool(vllm_config.parallel_config.distributed_executor_backend == "mp")


def _is_addresses(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(text, str) for text in value)


def _meet(engine: Any, addresses: list[str]) -> None:
    """Make this engine's end. Its decoder gets the provider last, whatever became of hop 2."""
    global _core
    queue: Any = getattr(engine.model_executor, "rpc_broadcast_mq", None)
    workers = 0
    if queue is not None:
        with Harmless("the queue to the workers"):
            points.require(points.WORKERS)
            if _has_children(engine.vllm_config) and not queue.n_remote_reader:
                workers = queue.n_local_reader
    core = Core(_settings(engine.vllm_config), engine.engine_index, addresses, workers)
    if workers:
        with Harmless("the queue to the workers"):
            pickling.hook(queue, core)
    # It is linked from now on, and a decoder without a provider would not survive what front ends send.
    _core, engine.tensor_ipc_receiver = core, _Provider(core)


class _Provider:
    """What vLLM's decoder asks for tensors. It runs on the input thread, which must live: it never raises.

    A tensor that is gone is noted, a tensor without data stands in its place, and the request fails alone
    in `preprocess_add_request`.
    """

    def __init__(self, core: Core) -> None:
        self._core = core
        self._warnings = RateLimit()
        self.lost: list[str] = []

    def __call__(self, dtype: str, shape: tuple[int, ...], meta: dict[str, Any]) -> torch.Tensor:
        try:
            return self._core.provide(shape, dtype, meta)
        except Exception as error:  # noqa: BLE001  # the input thread must live
            self._warnings.tell(_log.exception, f"tensorferry: a tensor is lost: {error}", "lost")
            self.lost.append(str(error))
            return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")


def _request_came(original: Callable[..., Any], engine: Any, *arguments: Any, **named: Any) -> Any:
    provider = getattr(engine, "tensor_ipc_receiver", None)
    if not isinstance(provider, _Provider):
        return original(engine, *arguments, **named)
    lost, provider.lost = provider.lost, []
    request = next((given for given in (*arguments, *named.values()) if hasattr(given, "request_id")), None)
    try:
        if lost:
            name = getattr(request, "request_id", "?")
            raise RuntimeError(f"tensors of request {name} are lost: {'; '.join(lost)}")
        handed = original(engine, *arguments, **named)
    except Exception:
        with Harmless("the cache of images", tensors=False):
            _cache_what_is_whole(engine, request)
        raise
    with Harmless("the end of a request", tensors=False):
        return _let_go_later(request, handed)
    return handed


def _let_go_later(request: Any, handed: Any) -> Any:
    """vLLM's input thread keeps its last request, and with that the images, until the next one comes, however
    long it idles. What it keeps here leads to no image once the engine has the request.

    request: as it was decoded. handed: (the engine's own request, its wave), or what is not known.
    """
    if not isinstance(handed, tuple) or not getattr(next(iter(handed), None), "mm_features", None):
        return handed
    passing = _Passing(*handed)
    request.mm_features = None
    return passing


class _Passing(Sequence[Any]):
    """A tuple that forgets its first thing when it is unpacked, unless somebody else keeps that."""

    def __init__(self, first: Any, *rest: Any) -> None:
        self._first: Any = first
        self._kept = weakref.ref(first)
        self._rest = rest

    def __iter__(self) -> Iterator[Any]:
        whole = self[:]
        self._first = None
        return iter(whole)

    def __getitem__(self, index: Any) -> Any:
        first = self._kept() if self._first is None else self._first
        return (first, *self._rest)[index]

    def __len__(self) -> int:
        return 1 + len(self._rest)


def _cache_what_is_whole(engine: Any, request: Any) -> None:
    """The front end takes every image of a request that failed for cached here, and sends none again.

    vLLM's own look ends at the first that is not: at one that was lost, in this request or before.
    """
    cache = getattr(engine, "mm_receiver_cache", None)
    for feature in getattr(request, "mm_features", None) or ():
        if cache is not None and not any(tensor.is_meta for tensor in _tensors_of_feature(feature)):
            with suppress(AssertionError, KeyError):  # not cached, and without data: the lost one, by name
                cache.get_and_update_features([feature])


# ---------------------------------------------------------------------- the workers


def _hook_worker() -> bool:
    if "vllm.v1.worker.worker_base" not in sys.modules:
        return False
    points.require(points.WORKERS)
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    _wrap(WorkerWrapperBase, "init_device", _worker_begins)
    return True


def _worker_begins(original: Callable[..., Any], wrapper: Any, *arguments: Any, **named: Any) -> Any:
    if _asked(wrapper):
        with Harmless("the worker"):
            config = wrapper.vllm_config
            inside = _core is not None and _core.pid == os.getpid()
            if not inside and _has_children(config) and _has_tensors(config):
                pickling.worker = Worker(_settings(config), os.getppid())
    return original(wrapper, *arguments, **named)


# ---------------------------------------------------------------------- for people

_HOOKS = {
    "the configuration": _hook_options,
    "the front end": _hook_front,
    "the line of counters": _hook_log,
    "the EngineCore": _hook_engine,
    "the worker": _hook_worker,
}
