"""The three parties inside of one vLLM, and who keeps what alive between them.

    front end  --hop 1-->  EngineCore  --hop 2-->  workers (tensor and pipeline parallel)

Each is one endpoint. The front end listens; its engines and their workers link with it and map its ring.
An EngineCore listens for its workers. Who puts a tensor sends it as a message of ours and gives vLLM a key
(who, message, number) to carry in its place; the receiver takes our message by that key.

- In flight the sender's link counts on the record until the receiver's thread has opened and acknowledged it.
- The view that the receiver gets keeps the record, for as long as vLLM keeps the tensor.
- In hop 2 an EngineCore hands the front end's record on: its own view is kept until the worker has it open.
- Nobody waits to send. A peer not linked or not admitted, a full ring, a small tensor: vLLM's own way.
- A record that is gone is an error of the receiver, never other bytes: that is the ring's own rule.
"""

from __future__ import annotations

import atexit
import functools
import itertools
import logging
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch.utils.weak import WeakIdKeyDictionary

from engine.vllm.counts import FRONT, WORKERS, Counts
from engine.vllm.mailbox import Key, Mailbox
from engine.vllm.settings import Settings, core_address, exists, front_address, sweep
from transport import Endpoint, Full, Message, RateLimit, TransportError

_log = logging.getLogger("vllm.tensorferry")

_PIECE = 16 << 20  # at most this much is copied by one thread in one go
_LEAST_PIECE = 1 << 20
_LINKS_WITHIN = 60.0  # seconds since the start in which a party looks often for who is to link with it
_PROVES_WITHIN = 60.0  # seconds since the handshake; who has not by then shares no /dev/shm with this process
_TAKE_TIMEOUT = 10.0  # for all of a request: they were sent before vLLM's message that asks for them
_HAND_ON_TIMEOUT = (
    60.0  # a worker that raises ends, and vLLM with it; of an EngineCore that left it is at once
)
_ENGINE, _WORKER = "engine{}", "worker-{}-{}"  # the latter: pid of its EngineCore, own pid


class _Party:
    """An endpoint with its mailbox, and tensors sent through it."""

    def __init__(self, settings: Settings, name: str, hop: str, role: str) -> None:
        self.settings = settings
        self.name = name
        self.counts = Counts(role)
        self.endpoint = Endpoint(name, settings.transport)
        self.mailbox = Mailbox(self.endpoint, self.notice, self.look)
        self.pid = os.getpid()
        self._hop = hop
        self._ringless = False  # no ring can be made here
        self._offered = False  # to whoever was linked then; others are offered it when they link
        self._warnings = RateLimit()
        self._numbers = itertools.count(1)
        self._message = 0  # of vLLM's
        self._since = time.monotonic()
        # Of the ring, asked for once in a message of vLLM's with tensors; then what these add.
        self._used: int | None = None
        self._most = 0  # what of it may be used before tensors are copied out
        # Before the endpoint's own finalizer takes the sockets from under the mailbox's thread.
        atexit.register(self.close)

    def put(self, tensor: torch.Tensor, readers: list[str]) -> Key | None:
        """Send a tensor, or a loan of the ring, to those readers; None: it must go vLLM's way."""
        nbytes = tensor.nbytes
        if not self.suits(tensor):
            return None
        if nbytes > self.settings.largest:
            self._refused("larger than the ring", nbytes)
            return None
        key = (self.name, self._message, next(self._numbers))
        self._used = self._measured() + nbytes
        copy = self._used > self._most
        body = {"key": key, "copy": copy, "tensor": tensor.detach()}
        try:
            self.endpoint.try_send(body, to=readers)
        except (TransportError, TypeError) as error:
            self._refused(self._why(error, readers), nbytes)
            return None
        self.counts.add(self._hop, "copied out" if copy else "ring", nbytes)
        return key

    def suits(self, tensor: torch.Tensor) -> bool:
        """Whether it is worth the ring; what is small, or on a device, is vLLM's."""
        return tensor.is_cpu and tensor.nbytes >= self.settings.transport.inline_below

    def begin_message(self) -> None:
        """A message of vLLM's begins; most have no tensors."""
        self._message += 1
        self._used = None

    def _measured(self) -> int:
        """Bytes of the ring in use, and sets how much that may be: the ring may be smaller than asked for."""
        if self._used is None:
            ring = self.endpoint.statistics()["backend"].get("ring")
            self._used = ring.used if ring is not None else 0
            capacity = ring.capacity if ring is not None else self.settings.transport.ring_bytes
            self._most = int(self.settings.copy_above * capacity)
        return self._used

    def _refused(self, why: str, nbytes: int) -> None:
        self.counts.add(self._hop, f"vLLM ({why})", nbytes)

    def _why(self, error: Exception, readers: Sequence[str]) -> str:
        """What is counted for an error: `Full` is raised, too, where somebody does not map the ring yet."""
        unproved = isinstance(error, Full) and not self.admitted().issuperset(readers)
        return "not linked" if unproved else type(error).__name__

    def admitted(self) -> set[str]:
        """The peers that proved that they map this party's ring."""
        return {peer.name for peer in self.endpoint.peers if peer.held is not None}

    def offer(self) -> bool:
        """Let peers that have not proved it prove that they map the ring; whether one is still to answer."""
        unproved = [peer for peer in self.endpoint.peers if peer.held is None]
        late = all(peer.connected > _PROVES_WITHIN for peer in unproved)
        if self._ringless or not unproved or (late and self._offered):
            return False
        try:
            with self.endpoint.loan((1,), torch.uint8, timeout=0.1):
                self._offered = True  # making room is what makes the offers
        except Full as error:
            made = "ring" in self.endpoint.statistics()["backend"]  # and is full, or has no page yet
            self._ringless = not made
            text = f"tensorferry: tensors go vLLM's way{' as long as that is so' if made else ''}: {error}"
            if not late:  # or it was said for a minute
                self._warnings.tell(_log.warning, text, "offer")
        return not self._ringless and not late

    def notice(self, sender: str, body: dict[str, Any]) -> None:
        """A message without a tensor came."""

    def look(self) -> bool:
        """Called again and again; whether to look again soon."""
        raise NotImplementedError

    def _is_young(self) -> bool:
        return time.monotonic() < self._since + _LINKS_WITHIN

    def close(self) -> None:
        """Leave. Tensors that were taken stay."""
        if os.getpid() == self.pid:
            self.mailbox.close()
            self.counts.remove()
        atexit.unregister(self.close)  # now: the process may end while a thread closes, and waits for that


class Front(_Party):
    """In the process of an `MPClient`: an API server, or the one that calls `LLM.generate`."""

    def __init__(self, settings: Settings, vllm_address: str) -> None:
        self._ready: frozenset[str] = frozenset()
        self._target: str | None = None
        self._lent: WeakIdKeyDictionary = WeakIdKeyDictionary()  # of the message that is being encoded
        self._pool = ThreadPoolExecutor(settings.transport.threads, thread_name_prefix="tensorferry-copy")
        super().__init__(settings, f"front-{os.getpid()}-{secrets.token_hex(4)}", FRONT, "front")
        sweep()
        self.endpoint.listen(front_address(vllm_address))
        self.mailbox.start()

    def wait_for(self, engines: list[int], timeout: float) -> list[int]:
        """Wait for engines of this host to map the ring, not longer than that; those that do."""
        deadline = time.monotonic() + timeout
        while True:
            there = [index for index in engines if _ENGINE.format(index) in self._ready]
            if len(there) == len(engines) or time.monotonic() > deadline:
                return there
            time.sleep(0.01)

    @contextmanager
    def sending_to(self, engine: bytes, tensors: Sequence[torch.Tensor] = ()) -> Iterator[None]:
        """What is encoded meanwhile is for the engine of that identity of vLLM's.

        tensors: those of the message as far as they are known: copied all at a time, by several threads.
        One that occurs more than once is sent once, or refused once.
        """
        self._target = _ENGINE.format(int.from_bytes(engine, "little"))
        try:
            if self._target in self._ready:
                self.begin_message()
                once = {id(tensor): tensor for tensor in tensors if self.suits(tensor)}
                if once:
                    self._measured()  # before there are loans
                self._lend_all(list(once.values()), self._target)
            yield
        finally:
            self._target = None
            self._lent.clear()

    def lend(self, tensor: torch.Tensor) -> dict[str, Any] | None:
        """What vLLM's message carries in place of the tensor; None: the tensor itself."""
        if self._target is None or not self.suits(tensor):
            return None
        if self._target not in self._ready:
            self._refused("not linked", tensor.nbytes)
            return None
        if tensor not in self._lent:
            self._lent[tensor] = self.put(tensor, [self._target])
        key: Key | None = self._lent[tensor]
        return None if key is None else {"tensorferry": list(key)}

    def _lend_all(self, tensors: Sequence[torch.Tensor], target: str) -> None:
        """Send the tensors in order, each when its copy is done; what finds no room is left to `lend`."""
        copies = self._copies(tensors) if len(tensors) > 1 else []
        try:
            for tensor, loan, parts in copies:
                for part in parts:
                    part.result()  # a copy waits for nobody
                self._lent[tensor] = self.put(loan, [target])
        finally:
            wait([part for _, _, parts in copies for part in parts])

    def _copies(
        self, tensors: Sequence[torch.Tensor]
    ) -> list[tuple[torch.Tensor, torch.Tensor, list[Future[Any]]]]:
        """Tensors, their places in the ring, and the copies there that are under way."""
        total = sum(tensor.nbytes for tensor in tensors)
        piece = max(_LEAST_PIECE, min(_PIECE, total // (2 * self.settings.transport.threads)))
        copies = []
        for tensor in tensors:
            if tensor.nbytes > self.settings.largest:
                continue
            try:
                with self.endpoint.loan(tensor.shape, tensor.dtype, timeout=0.0) as loan:
                    copies.append((tensor, loan, self._copy(tensor, loan, piece)))
            except (TransportError, TypeError):
                break
        return copies

    def _copy(self, tensor: torch.Tensor, loan: torch.Tensor, piece: int) -> list[Future[Any]]:
        if not tensor.is_contiguous():
            return [self._pool.submit(loan.copy_, tensor.detach())]
        source, target = (t.detach().reshape(-1).view(torch.uint8).numpy() for t in (tensor, loan))
        slices = [slice(start, start + piece) for start in range(0, len(source), piece)]
        return [self._pool.submit(np.copyto, target[part], source[part]) for part in slices]

    def notice(self, sender: str, body: dict[str, Any]) -> None:
        if "counts" in body:
            self.counts.heard(sender, body["counts"])

    def look(self) -> bool:
        waiting = self.offer()
        self._ready = frozenset(self.admitted())
        self.counts.save(peers={peer.name: peer.backend for peer in self.endpoint.peers})
        return waiting or (not self._ready and self._is_young())


class Core(_Party):
    """In the process of an EngineCore: takes from its front ends, hands on to its workers."""

    def __init__(self, settings: Settings, index: int, vllm_addresses: list[str], workers: int) -> None:
        self._workers: list[str] = []
        self._expected = workers
        self._fronts: dict[str, str] = {}  # address → name, in vLLM's order
        self._told: dict[str, tuple[int, float]] = {}  # by worker: how many front ends, and when
        self._reported: list[Any] = []
        # By identity, and outside of the tensors, whose attributes vLLM would pickle.
        self._lent: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._provided: WeakValueDictionary[Key, torch.Tensor] = WeakValueDictionary()
        self._providing: tuple[str, int] | None = None  # of which message the last tensor was
        self._patience = 0.0  # seconds that the others of that message may be waited for
        super().__init__(settings, _ENGINE.format(index), WORKERS, "engine")
        if workers:
            self.endpoint.listen(core_address(os.getpid()))
        self._addresses = [front_address(address) for address in vllm_addresses]
        for address in self._addresses:
            self.mailbox.dial(address, functools.partial(self._linked, address))
        self.mailbox.start()

    def _linked(self, address: str, front: str) -> None:
        self._fronts[address] = front
        self._reported = []  # what it was told in a link before may have been lost

    def provide(self, shape: tuple[int, ...], dtype: str, meta: dict[str, Any]) -> torch.Tensor:
        """The tensor of what `Front.lend` gave, as often as it was lent. LookupError when it is gone."""
        front, of, number = meta["tensorferry"]
        key = (front, of, number)
        tensor = self._provided.get(key)
        if tensor is None:
            tensor = self._provided[key] = self._take(key)
        if tuple(tensor.shape) != tuple(shape) or str(tensor.dtype) != f"torch.{dtype}":
            raise LookupError(f"tensor {number} of {front} is {tensor.dtype} {tuple(tensor.shape)}")
        return tensor

    def _take(self, key: Key) -> torch.Tensor:
        if key[:2] != self._providing:
            self._providing, self._patience = key[:2], _TAKE_TIMEOUT
        begun = time.monotonic()
        try:
            tensor, message = self.mailbox.take(key[0], key, self._patience)
        finally:
            self._patience = max(0.0, self._patience - (time.monotonic() - begun))
        # Another Python object over the same memory: one that the message refers to would make a cycle.
        tensor = tensor.view(tensor.shape)
        if message is not None:
            self._lent[tensor] = message
        return tensor

    def hand_on(self, tensor: torch.Tensor) -> tuple[str, Key] | None:
        """What the workers take the tensor by: (sender, key). None: vLLM must pickle it."""
        if not self.suits(tensor):
            return None
        if len(self._workers) < self._expected:
            self._refused("not linked", tensor.nbytes)
            return None
        message: Message | None = self._lent.get(tensor)  # type: ignore[no-untyped-call]
        if message is None:
            key = self.put(tensor, self._workers)
            return None if key is None else (self.name, key)
        workers = self._workers
        try:
            handles = self.endpoint.forward(message, to=workers, timeout=0.0)
        except TransportError as error:
            self._refused(self._why(error, workers), tensor.nbytes)
            return None
        # A worker that does not map the front end's ring got a copy.
        way = "handle" if handles == len(workers) else "ring"
        self.counts.add(WORKERS, way, tensor.nbytes)
        front, of, number = message.body["key"]
        return self.name, (front, of, number)

    def look(self) -> bool:
        waiting = False
        if self._expected:
            prefix = _WORKER.format(os.getpid(), "")
            workers = [peer for peer in self.endpoint.peers if peer.name.startswith(prefix)]
            fronts = list(self._fronts)  # another may link, in another thread, before the end of this
            for peer in workers:
                told, at = self._told.get(peer.name, (0, 0.0))
                now = time.monotonic()
                # What was told in a link before this one may have been lost with it.
                if told != len(fronts) or now - at > peer.connected:
                    self.endpoint.try_send({"fronts": fronts}, to=peer.name)
                    self._told[peer.name] = len(fronts), now
            there = [peer.name for peer in workers]
            self._workers = there
            # Workers map a front end's ring when they have heard of it: the sooner, the fewer copies.
            complete = len(there) == self._expected and len(fronts) == len(self._addresses)
            waiting = not complete and self._is_young()
        self.counts.save(peers={peer.name: peer.backend for peer in self.endpoint.peers})
        self._report()  # which fails where the front end has just left
        return waiting

    def _report(self) -> None:
        """Only to the first front end: what several would publish would be counted several times."""
        front = self._fronts.get(self._addresses[0]) if self._addresses else None
        rows = [list(row) for row in self.counts.rows()]
        if front is not None and rows != self._reported:
            self.endpoint.try_send({"counts": rows}, to=front)
            self._reported = rows


class Worker(_Party):
    """In a worker process of the multiprocess executor, a child of its EngineCore."""

    def __init__(self, settings: Settings, core: int) -> None:
        """core: the pid of its EngineCore."""
        self._known: set[str] = set()
        super().__init__(settings, _WORKER.format(core, os.getpid()), WORKERS, "worker")
        self.mailbox.dial(core_address(core))
        self.mailbox.start()

    def take(self, sender: str, key: Key) -> torch.Tensor:
        """The tensor that an EngineCore handed on. LookupError when it is gone."""
        tensor, message = self.mailbox.take(sender, key, _HAND_ON_TIMEOUT)
        self.counts.add("taken by a worker", "copied out" if message is None else "ring", tensor.nbytes)
        return tensor

    def notice(self, sender: str, body: dict[str, Any]) -> None:  # noqa: ARG002  # as the others
        for address in body.get("fronts", ()):
            if address not in self._known and exists(address):
                self._known.add(address)
                self.mailbox.dial(address)

    def look(self) -> bool:
        self.counts.save(peers={peer.name: peer.backend for peer in self.endpoint.peers})
        return False
