"""The front end: photographs in, embeddings out in the same order, over ranks that it starts and ends."""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import Any, Self, TypeVar

import torch

import transport
from engine.catalog import choose_processor
from engine.config import EngineConfig
from engine.dispatch import Dispatcher
from engine.errors import EngineError, NoRankLeft, StartError
from engine.fleet import Fleet
from engine.job import Job, message_bytes, nbytes_of, split
from engine.loading import Loader, Photograph, Processor, Source
from engine.model import ModelError
from engine.protocol import FRONT, Stop, transport_config
from engine.results import (
    InOrder,
    RankStatus,
    Result,
    Statistics,
    bytes_by_backend,
    copies_per_tensor,
    lent_elsewhere,
    percentile,
    ring_of,
)

_T = TypeVar("_T")
_STOP_TIMEOUT = 0.5
_ID_BITS = 60


class Engine:
    """N data-parallel ranks, each with its own copy of the model, in one process or divided among several.

        with Engine(EngineConfig(data_parallel_size=2)) as engine:
            for result in engine.encode(["a.jpg", "b.jpg"]):
                print(result.name, result.embedding)

    The ranks are ready when the constructor returns. Use it from one thread, in `with`, or call `close`.

    Raises:
        StartError: a rank could not start or load the model, or was not ready within `startup_timeout`;
            or `tensor_transport` is `shm` and /dev/shm can't hold the ring.
    """

    def __init__(self, config: EngineConfig | None = None) -> None:
        self.config = config or EngineConfig()
        self._message_bytes = message_bytes(self.config, self.config.ring_bytes)
        # From somewhere else in every engine: a rank may still answer what an earlier head has asked.
        self._ids = itertools.count(secrets.randbits(_ID_BITS))
        self._images = self._failed = 0
        self._made = self._lent = 0
        self._seconds = 0.0
        self._closed = False
        self._final: Statistics | None = None
        self._fleet = Fleet(self.config)
        self._stack = ExitStack()
        try:
            # First, since it may take seconds to import, and ranks that come meanwhile want to be answered.
            self._loader = Loader(self._processor(), ahead=self.config.images_per_prompt)
            self._stack.callback(self._loader.close)
            self._front = self._listen()
            self._stack.callback(self._front.close)
            self._fleet.start(self._front.addresses)
            self._dispatcher = Dispatcher(self._front, self._fleet, self.config)
            self._dispatcher.wait_until_ready(self.config.startup_timeout)
        except BaseException:
            self._closed = True
            self._fleet.stop(polite=False)
            self._stack.close()
            raise

    def _processor(self) -> Processor:
        try:
            return choose_processor(self.config)
        except ModelError as error:
            raise StartError(str(error)) from error

    def _listen(self) -> transport.Endpoint:
        try:
            front = transport.listen(self._fleet.addresses, name=FRONT, config=transport_config(self.config))
        except transport.TransportError as error:
            raise StartError(str(error)) from error
        if self.config.tensor_transport == "shm":
            try:  # a ring that can't be is better known before the ranks have loaded their models
                with front.loan((1,), torch.uint8):
                    pass
            except transport.TransportError as error:
                front.close()
                raise StartError(f"tensor_transport is shm, but there can be no ring: {error}") from error
        return front

    # ------------------------------------------------------------------ encoding

    def encode(self, images: Iterable[Source]) -> Generator[Result, None, None]:
        """Encode images (paths or PIL images) and give their results in the order of the input.

        `images` is taken bit by bit, a little ahead of what is sent, so it may be endless. An image that
        fails has a result with `error` set, and the others go on. The requests of a rank that dies go to
        the others, once.

        Raises:
            NoRankLeft: the last rank died; all results there are were given before.
        """
        self._check_open()
        if isinstance(images, str):
            raise TypeError("encode() takes a list of images; put a single path into one")
        order = InOrder()
        group: list[Photograph] = []
        started = time.monotonic()
        try:
            for group in _groups(self._loader.load(images), self.config.images_per_prompt):
                self._send_prompt(group, order)
                yield from self._handed_out(order)
            while order.following < order.expected:
                self._dispatcher.progress()
                yield from self._handed_out(order)
        except NoRankLeft as error:
            for photograph in group:  # those of a prompt that was cut short
                if order.lacks(photograph.index):
                    text = f"{photograph.name}: {error}"
                    order.put(Result(photograph.index, photograph.name, error=text))
            yield from self._handed_out(order)
            raise
        finally:
            self._seconds += time.monotonic() - started

    def _handed_out(self, order: InOrder) -> Iterator[Result]:
        for result in order.take():
            if result.error:
                self._failed += 1
            else:
                self._images += 1
            yield result

    def _send_prompt(self, group: Sequence[Photograph], order: InOrder) -> None:
        order.expected += len(group)
        for photograph in group:
            if photograph.error:
                order.put(Result(photograph.index, photograph.name, error=photograph.error))
        good = [photograph for photograph in group if not photograph.error]
        self._message_bytes = message_bytes(self.config, self._capacity())
        for message in split(good, self._message_bytes):
            job = Job(next(self._ids), message, order.put, self._produce)
            try:
                job.prepare()  # before a rank has room, so that it need not wait for this
            except transport.TransportError as error:
                job.fail(str(error))
                continue
            self._dispatcher.submit(job)
            nbytes = nbytes_of(message)
            self._made += nbytes
            self._lent += _made_in_place(message) if self._is_lent(nbytes) else 0

    def _capacity(self) -> int:
        """Bytes of the ring, which is smaller than asked for once /dev/shm turned out to be short."""
        ring = ring_of(self._front.statistics()["backend"])
        return ring.capacity if ring else self.config.ring_bytes

    def _produce(self, message: list[Photograph]) -> list[torch.Tensor]:
        """The tensors of all photographs, written straight into the ring, in one loan.

        One loan takes its whole space at once: waiting for space while holding some could go on for ever.
        """
        nbytes = nbytes_of(message)
        numbers = nbytes // 4
        if not self._is_lent(nbytes):
            return self._loader.write(message, torch.empty(numbers))
        with self._front.loan((numbers,), torch.float32, timeout=self.config.request_timeout) as out:
            return self._loader.write(message, out)

    def _is_lent(self, nbytes: int) -> bool:
        # One photograph above half of the peer's share: the transport takes it through the ring in parts.
        return nbytes <= self._message_bytes

    # ------------------------------------------------------------------ state

    @property
    def peers(self) -> list[RankStatus]:
        """Every rank: where it is, how tensors reach it and why so, what it did; `error` if it is gone."""
        self._check_open()
        return self._dispatcher.status()

    def statistics(self) -> Statistics:
        """The figures since the start; after `close` those at its time."""
        return self._final or self._statistics()

    def _statistics(self) -> Statistics:
        figures: dict[str, Any] = self._front.statistics()
        backend, ring = figures["backend"], ring_of(figures["backend"])
        hops = self._dispatcher.hops
        p50, p99 = percentile(hops, 50), percentile(hops, 99)
        name, sent = self.config.tensor_transport, self._dispatcher.nbytes
        ways = bytes_by_backend(backend, name=name, sent=sent)
        return Statistics(
            requests=self._dispatcher.requests,
            late=self._dispatcher.late,
            images=self._images,
            failed=self._failed,
            image_bytes=self._made,
            bytes_by_backend=ways,
            copies=copies_per_tensor(ways, made=self._made, in_ring=self._lent - lent_elsewhere(backend)),
            detours=dict(backend.get("detours", {})),
            seconds=self._seconds,
            hop_p50=None if p50 is None else p50 / 1e9,
            hop_p99=None if p99 is None else p99 / 1e9,
            ring_bytes=ring.capacity if ring else 0,
            ring_peak=ring.high_water if ring else 0,
        )

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError("this engine is closed")

    # ------------------------------------------------------------------ end

    def close(self) -> None:
        """Ask the ranks to leave, end those that don't, remove everything. Twice is fine."""
        if self._closed:
            return
        self._closed = True
        try:
            self._final = self._statistics()
            for worker in self._front.peers:
                with suppress(transport.TransportError):
                    self._front.send(Stop(), to=worker.name, timeout=_STOP_TIMEOUT)
        finally:
            self._fleet.stop()
            self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self._fleet.members)} ranks"
        return f"<Engine {self.config.model!r}, {self.config.tensor_transport}, {state}>"


def _made_in_place(message: Sequence[Photograph]) -> int:
    """Bytes that a loan gets from where they are made, and from nowhere else."""
    return sum(p.prepared.nbytes for p in message if p.prepared is not None and p.prepared.in_place)


def _groups(items: Iterator[_T], size: int) -> Iterator[list[_T]]:
    while group := list(itertools.islice(items, size)):
        yield group
