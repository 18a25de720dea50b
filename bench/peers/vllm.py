"""vLLM's own code, from its wheel: direct_rpc, torch_shm and the shared-memory object store.

vLLM itself needs CUDA builds of many packages. The four modules that carry tensors need little of it, so the
packages around them are entered as empty shells over vLLM's own folders, which leaves out what their
``__init__`` imports; the code that is measured is the wheel's, unchanged.
"""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import importlib.util
import multiprocessing.synchronize
import sys
import types
from collections import deque
from collections.abc import Mapping
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import msgspec
import torch
import zmq

from bench.floor import TIMEOUT, Pair, pair
from bench.links import Body
from bench.part import Report, WrongAnswerError
from bench.peers import spawned
from bench.peers.bodies import join, split

GIB, MIB = 1 << 30, 1 << 20
STORE_BYTES = 4 * GIB  # mm_processor_cache_gb
STORE_OBJECT_BYTES = 128 * MIB  # mm_shm_cache_max_object_size_mb
START_TIMEOUT = 3 * TIMEOUT  # vLLM's modules take seconds to import, on a busy machine many
_SHELLS = ("", ".multimodal", ".v1", ".v1.engine", ".distributed", ".distributed.device_communicators")
_UNUSED = (".usage", ".v1.core", ".v1.core.sched")
_IDENTITY = b"\x00\x00"  # engine 0, as vLLM names it
_ADD = b"\x00"


class Request(msgspec.Struct):
    """What stands for EngineCoreRequest: something small, and the images."""

    head: bytes
    tensors: list[torch.Tensor]


class StoredRequest(msgspec.Struct):
    """The same, the images as places in the object store: (address, id)."""

    head: bytes
    places: list[tuple[int, int]]


@functools.cache
def load(name: str) -> types.ModuleType:
    """A module of vLLM without what its packages import."""
    if "vllm" not in sys.modules:
        spec = importlib.util.find_spec("vllm")
        assert spec is not None
        assert spec.submodule_search_locations is not None
        (root,) = spec.submodule_search_locations
        for package in (*_SHELLS, *_UNUSED):
            module = types.ModuleType(f"vllm{package}")
            module.__path__ = [root + package.replace(".", "/")]
            # Who asks later whether vLLM is installed is answered by this.
            module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None, is_package=True)
            sys.modules[module.__name__] = module
        # vllm.v1.utils, of which one function is used, names these at import.
        _placeholder("vllm.usage.usage_lib", "is_usage_stats_enabled", "usage_message", "UsageContext")
        _placeholder("vllm.v1.core.sched.output", "SchedulerOutput")
    return importlib.import_module(name)


class _Unused:
    ENGINE_CONTEXT = None


def _placeholder(name: str, *attributes: str) -> None:
    module = types.ModuleType(name)
    for attribute in attributes:
        setattr(module, attribute, _Unused)
    sys.modules[name] = module


class Near:
    """The front end's side of the hop, as vLLM's MPClient has it: ROUTER out, PULL back."""

    def __init__(self, folder: Path, queue: Queue[Any] | None) -> None:
        serial = load("vllm.v1.serial_utils")
        sender = load("vllm.v1.engine.tensor_ipc").TensorIpcSender(queue) if queue is not None else None
        self._encoder = serial.MsgpackEncoder(oob_tensor_consumer=sender)
        network = load("vllm.utils.network_utils")
        self._socket: Pair = network.make_zmq_socket(
            zmq.Context.instance(), f"ipc://{folder}/in", zmq.ROUTER, bind=True
        )
        self._back = pair(f"ipc://{folder}/back", bind=True)
        # Keeps a whole request until the next send after zmq is done with all of it, as MPClient does.
        self._pending: deque[tuple[Any, object]] = deque()
        # ROUTER drops what is for an identity that it has not heard from.
        if not self._socket.poll(int(START_TIMEOUT * 1000)):
            raise TimeoutError(f"no engine in {START_TIMEOUT:g} s")
        self._socket.recv_multipart()

    def send(self, body: Body) -> None:
        """As SyncMPClient._send_input."""
        self._send(Request(*split(body)))

    def _send(self, request: object) -> None:
        while self._pending and self._pending[-1][0].done:
            self._pending.pop()
        message = (_IDENTITY, _ADD, *self._encoder.encode(request))
        if len(message) <= 3:  # no tensor travels beside the message
            self._socket.send_multipart(message, copy=False)
            return
        tracker = self._socket.send_multipart(message, copy=False, track=True)
        if tracker is not None and not tracker.done:
            self._pending.appendleft((tracker, request))

    def receive(self) -> Body:
        """The engine's answer, which has no tensors."""
        return join(self._back.recv(), [])

    def check_way(self) -> None:
        """There is one way only."""

    def close(self) -> None:
        """Close both sockets."""
        self._socket.close(linger=1000)
        self._back.close()


class Far:
    """The engine's side: the socket and the decoder of process_input_sockets, DEALER in.

    vLLM runs that in a thread of its own, which decodes a request while the engine is at those before it.
    Here one thread takes a message, reads its images and answers; only zmq's own thread goes on meanwhile.
    """

    def __init__(self, folder: Path, queue: Queue[Any] | None) -> None:
        serial = load("vllm.v1.serial_utils")
        receiver = load("vllm.v1.engine.tensor_ipc").TensorIpcReceiver(queue) if queue is not None else None
        # Whether tensors travel as frames beside the message.
        self._beside = queue is None
        self._decoder = serial.MsgpackDecoder(self.message_type(), oob_tensor_provider=receiver)
        network = load("vllm.utils.network_utils")
        self._socket: Pair = network.make_zmq_socket(
            zmq.Context.instance(), f"ipc://{folder}/in", zmq.DEALER, identity=_IDENTITY, bind=False
        )
        self._back = pair(f"ipc://{folder}/back", bind=False)
        self._socket.send(b"READY")

    def message_type(self) -> type[msgspec.Struct]:
        """What the decoder decodes."""
        return Request

    def receive(self) -> Body:
        """What process_input_sockets does with a message.

        `WrongAnswerError` if a tensor came another way than is measured.
        vLLM's sender goes over to the socket, with no more than a warning, when it can't use its queue.
        """
        if not self._socket.poll(int(START_TIMEOUT * 1000)):
            raise TimeoutError(f"no request in {START_TIMEOUT:g} s")
        _type, *frames = self._socket.recv_multipart(copy=False)
        body = self._body(self._decoder.decode(frames))
        expected = 1 + (len(body.get("tensors", ())) if self._beside else 0)
        if len(frames) != expected:
            raise WrongAnswerError(f"not the way that is measured: {len(frames)} frames came, not {expected}")
        return body

    def _body(self, request: Any) -> Body:
        return join(request.head, request.tensors)

    def send(self, body: Body) -> None:
        """An answer without tensors."""
        self._back.send(split(body)[0])

    def check_way(self) -> None:
        """Every message was looked at as it came."""

    def close(self) -> None:
        """Close both sockets."""
        self._socket.close(linger=0)
        self._back.close()


class StoreNear(Near):
    """As ShmObjectStoreSenderCache: each image is put into the store, its place goes through the socket."""

    def __init__(self, folder: Path, store: Any) -> None:
        super().__init__(folder, None)
        self._store = store
        self._number = 0

    def send(self, body: Body) -> None:
        """Every image is new to the cache."""
        head, tensors = split(body)
        places = []
        for tensor in tensors:
            self._number += 1
            places.append(self._store.put(str(self._number), tensor))
        self._send(StoredRequest(head, places))

    def close(self) -> None:
        """Close the sockets and remove the store."""
        super().close()
        self._store.close()


class StoreFar(Far):
    """As ShmObjectStoreReceiverCache in the worker: each image is read out of the store."""

    def __init__(self, folder: Path, handle: Any) -> None:
        super().__init__(folder, None)
        self._beside = False
        storage = load("vllm.distributed.device_communicators.shm_object_storage")
        self._store = storage.SingleWriterShmObjectStorage.create_from_handle(_handle(storage, handle))
        # Where there is no platform of vLLM's, it believes that memory can be pinned.
        self._store.ser_de.tensor_decoder.pin_tensors = torch.cuda.is_available()

    def message_type(self) -> type[msgspec.Struct]:
        """Places instead of images."""
        return StoredRequest

    def _body(self, request: Any) -> Body:
        return join(request.head, [self._store.get(*place) for place in request.places])


def _handle(storage: types.ModuleType, parts: tuple[Any, ...]) -> Any:
    ring, lock = parts
    return storage.ShmObjectStorageHandle(
        max_object_size=STORE_OBJECT_BYTES,
        n_readers=1,
        ring_buffer_handle=ring,
        serde_class=storage.MsgpackSerde,
        reader_lock=lock,
    )


def run(folder: Path, way: str, ends: str, sizes: Mapping[str, int], rest: Mapping[str, Any]) -> Report:
    """Both ends."""
    spawner = spawned.context()
    if way == "vllm shm store":
        storage = load("vllm.distributed.device_communicators.shm_object_storage")
        ring = storage.SingleWriterShmRingBuffer(data_buffer_size=STORE_BYTES, create=True)
        store = storage.SingleWriterShmObjectStorage(
            max_object_size=max(STORE_OBJECT_BYTES, 2 * sizes["nbytes"]), n_readers=1, ring_buffer=ring
        )
        lock: multiprocessing.synchronize.Lock = spawner.Lock()
        near = functools.partial(StoreNear, folder, store)
        far = functools.partial(StoreFar, folder, (ring.handle(), lock))
        return spawned.run(spawner, folder, ends, rest, open_near=near, open_far=far)
    queue: Queue[Any] | None = spawner.Queue() if way == "vllm torch_shm" else None
    return spawned.run(
        spawner,
        folder,
        ends,
        rest,
        open_near=functools.partial(Near, folder, queue),
        open_far=functools.partial(Far, folder, queue),
    )
