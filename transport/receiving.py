"""The receiving side of an endpoint: what came and was not taken, opening handles, putting parts together."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from transport import codec
from transport.assembly import Assembly
from transport.backends.base import Bytes, Inbound
from transport.config import TransportConfig
from transport.cudart import DeviceError
from transport.errors import GivenUp, PeerGone, ProtocolError, Timeout
from transport.link import Link
from transport.message import Abandon, Data, Numbered, Part, Piece, Ping, Reference
from transport.received import ELSEWHERE, Message, Opened, Waiting
from transport.sending import PARTS
from transport.specs import shaped_on_device
from transport.staging import Batch, Stage, finished
from transport.tensors import Tensor, view


class Receiver:
    """One queue for all links, in the order of arrival."""

    def __init__(self, config: TransportConfig, inbounds: Mapping[str, Inbound]) -> None:
        self._config = config
        self.inbounds = inbounds
        self._in_place = {name for name, inbound in inbounds.items() if inbound.in_place}
        self._on_device = {name for name, inbound in inbounds.items() if inbound.on_device}
        self.queue: deque[Waiting] = deque()
        self._assemblies: dict[int, Assembly | None] = {}
        self._receiving = threading.Lock()
        self._written: dict[Link, Opened] = {}  # the message of a link that its sender is still writing
        self._later = {PARTS, *(name for name, inbound in inbounds.items() if inbound.comes_later)}
        self.counts: Counter[str] = Counter()

    # ------------------------------------------------------------------ arrival

    def arrive(self, link: Link, message: Numbered, frames: Sequence[Bytes], nbytes: int) -> None:
        """A numbered message came, of `nbytes` bytes in all. Nothing is opened before somebody takes it."""
        if message.number != link.arrived + 1:
            raise ProtocolError(f"message {message.number} follows message {link.arrived}")
        if link.waiting >= self._config.max_queued_messages:
            raise ProtocolError(
                f"more than {link.waiting} messages were not waited for (max_queued_messages)"
            )
        if link.waiting_bytes and link.waiting_bytes + nbytes > self._config.max_queued_bytes:
            raise ProtocolError(
                f"{nbytes} bytes more than the {link.waiting_bytes} that wait exceed max_queued_bytes"
            )
        link.arrived = message.number
        link.arrived_bytes += nbytes
        self.queue.append(Waiting(link, message, frames, nbytes))

    # ------------------------------------------------------------------ taking

    def take(self, type_: Any, *, copy: bool, patience: float, stage: Stage | None = None) -> Message | None:
        """The next message, opened and decoded; None when there is none. `stage`: where its tensors go.

        patience: for how many seconds to wait for the bytes of one that is still being written. When they
        are over, `is_being_written` says so. `ProtocolError` and `PeerGone` for a message that cannot be
        opened, which is gone then; `Timeout` for one that can be opened later, where there is no other.
        """
        take = partial(self._take_data, type_=type_, copy=copy, stage=stage)
        stalled: dict[Link, Timeout] = {}
        with self._receiving:
            while True:
                for opened in list(self._written.values()):
                    message = take(opened.waiting, patience=0.0)
                    if message is not None:
                        return message
                waiting = self._next(stalled)
                if waiting is not None:
                    try:
                        message = self._take_one(waiting, take, stage)
                    except Timeout as error:  # its sender stopped in mid-step, which holds up no other
                        stalled[waiting.link] = error
                        continue
                    if message is not None:
                        return message
                elif self._written:
                    first = next(iter(self._written.values())).waiting
                    message = take(first, patience=patience)
                    if message is not None or first.link in self._written:
                        return message
                elif stalled:
                    raise next(iter(stalled.values()))
                else:
                    return None

    def _take_one(
        self, waiting: Waiting, take: Callable[..., Message | None], stage: Stage | None
    ) -> Message | None:
        if isinstance(waiting.message, Data):
            return take(waiting, patience=0.0)
        self._take_other(waiting, stage)
        return None

    @property
    def is_being_written(self) -> bool:
        """Whether a message that could be taken is there but for bytes that its sender still writes."""
        return bool(self._written)

    def what_is_unfinished(self) -> str:
        """Which messages came without all their bytes, for a person; "" when there is none."""
        now = time.monotonic()
        written = [
            f"message {opened.data.number} from {link} is not written to its end: {sum(opened.sizes)} bytes,"
            f" begun {now - opened.since:.1f} s ago"
            for link, opened in list(self._written.items())
        ]
        first = {waiting.link: waiting for waiting in reversed(list(self.queue))}  # of each link
        return "; ".join([*written, *filter(None, map(self._what_is_late, first.values()))])

    def _what_is_late(self, waiting: Waiting) -> str:
        """The same of the first message of a link, where its bytes come by themselves."""
        link, message = waiting.link, waiting.message
        for place in _places(message):
            inbound = self.inbounds.get(place.backend)
            handle = bytes(place.handle)
            if inbound is not None and inbound.comes_later and not inbound.is_ready(link.peer, handle):
                came = inbound.progress(link.peer, handle)
                who = f"message {message.number} from {link}, the first of {link.waiting} there,"
                return f"{who} waits for its bytes: {came}"
        return ""

    def has_next(self) -> bool:
        """Whether there is a message that can be taken now, or soon without anything more coming."""
        return bool(self._written) or self._next() is not None

    def _next(self, stalled: Collection[Link] = ()) -> Waiting | None:
        """The first message whose bytes have come, of a link that isn't `stalled`.

        Those whose bytes come by themselves are taken in the order of their link; others overtake them. One
        that is being written is overtaken by those of other links alone.
        """
        queue, written = self.queue, self._written
        if not queue or not (written or stalled or self._comes_later(queue[0].message)):
            return queue[0] if queue else None
        late: set[Link] = set()
        behind = set(stalled)
        for waiting in list(queue):  # others append to it meanwhile
            link, message = waiting.link, waiting.message
            if link in behind or (link in written and written[link].waiting is waiting):
                behind.add(link)
                continue
            if not self._comes_later(message):
                return waiting
            if link not in late and self._is_ready(waiting):
                return waiting
            late.add(link)
        return None

    def _comes_later(self, message: Numbered) -> bool:
        """Whether a message keeps its place among those of its link whose bytes come by themselves."""
        if isinstance(message, Data):
            return any(reference.backend in self._later for reference in message.tensors)
        return not isinstance(message, Ping)

    def _is_ready(self, waiting: Waiting) -> bool:
        link, message = waiting.link, waiting.message
        return all(
            self.inbounds[place.backend].is_ready(link.peer, bytes(place.handle))
            for place in _places(message)
            if place.backend in self._later and place.backend in self.inbounds
        )

    def _take_data(
        self, waiting: Waiting, type_: Any, *, copy: bool, stage: Stage | None, patience: float
    ) -> Message | None:
        """The message; None when it is not complete yet, or was given up and is gone."""
        link, data = waiting.link, waiting.message
        assert isinstance(data, Data)
        opened = self._written.pop(link, None)
        if opened is None or opened.waiting is not waiting:
            opened = Opened(waiting, data)
        try:
            if not opened.tensors:
                self._open_all(opened, stage)
            if not opened.complete(patience):
                self._written[link] = opened
                return None
            if copy:
                opened.copy()
            body = codec.decode(data.body, opened.tensors, type_)
        except Timeout:
            opened.clear()
            raise
        except (ProtocolError, PeerGone) as error:
            opened.clear()  # the traceback keeps this frame, which must not keep the sender's memory
            self._taken(waiting, 0)
            self._assembled(link, data.tensors)
            if isinstance(error, GivenUp):
                self.counts["given up"] += 1
                return None
            self.counts["refused"] += 1
            raise type(error)(f"message {data.number} from {link}: {error}") from error
        self._config.emit("receive.opened", peer=link.peer.name, number=data.number)
        in_ring = sum(
            [
                nbytes
                for reference, nbytes in zip(data.tensors, opened.sizes, strict=True)
                if reference.backend in self._in_place
            ]
        )
        self._taken(waiting, sum(opened.sizes), in_ring)
        self._config.emit("receive.taken", peer=link.peer.name, number=data.number)
        self._assembled(link, data.tensors)
        self.counts["messages"] += 1
        for reference, nbytes in zip(data.tensors, opened.sizes, strict=True):
            self.counts[f"bytes {reference.backend}"] += nbytes
        # Of a copy nothing is open here, so that its handles cannot be handed on.
        inbounds = {} if copy or opened.batch is not None else self.inbounds
        return Message(link.peer.name, data, body, opened.arrays, opened.tensors, inbounds, opened.batch)

    def _open_all(self, opened: Opened, stage: Stage | None) -> None:
        """Open every tensor of a message, whether all its bytes are there or not; no local keeps one."""
        link, _, frames, _ = opened.waiting
        self._config.emit("receive.opening", peer=link.peer.name, number=opened.data.number)
        references = opened.data.tensors
        opened.sizes = self._check_sizes(references)
        batch = opened.batch = self._batch(link, references, stage)
        for reference, nbytes in zip(references, opened.sizes, strict=True):
            if (batch is not None or reference.backend in self._on_device) and reference.spec.is_torch:
                opened.tensors.append(self._bring(link, reference, nbytes, frames, batch))
                opened.arrays.append(ELSEWHERE)
            else:
                self._open(opened, reference, nbytes)
                opened.tensors.append(view(opened.arrays[-1], reference.spec))

    def _check_sizes(self, references: Sequence[Reference]) -> list[int]:
        """The bytes of each tensor, whose dtype and shape are checked with that."""
        config = self._config
        if len(references) > config.max_tensors:
            raise ProtocolError(f"{len(references)} tensors exceed max_tensors ({config.max_tensors})")
        sizes = [reference.spec.check() for reference in references]
        if sum(sizes) > config.max_message_bytes:
            raise ProtocolError(f"{sum(sizes)} bytes exceed max_message_bytes ({config.max_message_bytes})")
        return sizes

    def _assembled(self, link: Link, references: Sequence[Reference]) -> None:
        """A message that came in one piece may stand between the parts of another, which go on then."""
        if self._assemblies and any(reference.backend == PARTS for reference in references):
            self._assemblies.pop(link.peer.link, None)

    def _open(self, opened: Opened, reference: Reference, nbytes: int) -> None:
        link, _, frames, _ = opened.waiting
        if reference.backend == PARTS:
            opened.arrays.append(self._assembled_bytes(link, reference, nbytes))
            return
        inbound = self._inbound(reference.backend)
        array, complete = inbound.open_early(link.peer, bytes(reference.handle), nbytes, frames)
        opened.arrays.append(array)
        if complete is not None:
            opened.incomplete.append(complete)

    def _assembled_bytes(self, link: Link, reference: Reference, nbytes: int) -> Bytes:
        assembly = self._assemblies.get(link.peer.link)
        if assembly is None:
            raise ProtocolError("its parts did not all come")
        array: Bytes = assembly.finished(_index(reference), nbytes).tensor.cpu().numpy()
        return array

    def _batch(self, link: Link, references: Sequence[Reference], stage: Stage | None) -> Batch | None:
        """Where the tensors of a message go: where its parts went already, if it has any."""
        if self._assemblies and any(reference.backend == PARTS for reference in references):
            assembly = self._assemblies.get(link.peer.link)
            if assembly is not None and assembly.batch is not None:
                return assembly.batch
        return None if stage is None else stage.batch()

    def _bring(
        self, link: Link, reference: Reference, nbytes: int, frames: Sequence[Bytes], batch: Batch | None
    ) -> Tensor:
        """A tensor elsewhere, on a device for one; its bytes may be on their way when this returns."""
        try:
            return self._brought(link, reference, nbytes, frames, batch)
        except (torch.OutOfMemoryError, DeviceError) as error:
            raise ProtocolError(f"a tensor of {nbytes} bytes cannot be brought there: {error}") from error

    def _brought(
        self, link: Link, reference: Reference, nbytes: int, frames: Sequence[Bytes], batch: Batch | None
    ) -> Tensor:
        if batch is None:
            inbound = self._inbound(reference.backend)
            flat = inbound.open_on_device(link.peer, bytes(reference.handle), nbytes)
            return shaped_on_device(flat, reference.spec)
        assembly = self._assemblies.get(link.peer.link)
        if reference.backend == PARTS and assembly is not None and assembly.batch is batch:
            return finished(assembly.finished(_index(reference), nbytes), reference.spec)
        place = batch.place(nbytes)
        if reference.backend == PARTS:
            place.write(0, self._assembled_bytes(link, reference, nbytes))
        else:
            handle, inbound = bytes(reference.handle), self._inbound(reference.backend)
            for start, array in inbound.follow(link.peer, handle, nbytes, frames):
                place.write(start, array)
                del array  # should the next one fail, the traceback keeps this frame, but no record
        return finished(place, reference.spec)

    def _inbound(self, name: str) -> Inbound:
        inbound = self.inbounds.get(name)
        if inbound is None:
            raise ProtocolError(f"this endpoint does not read the backend {name!r}")
        return inbound

    def _take_other(self, waiting: Waiting, stage: Stage | None) -> None:
        link, message, frames, _ = waiting
        try:
            if isinstance(message, Part):
                self._take_part(link, message, frames, stage)
            elif isinstance(message, Abandon):
                self._assemblies.pop(link.peer.link, None)
        except Timeout:
            raise
        except (ProtocolError, PeerGone, DeviceError):
            self._assemblies[link.peer.link] = None  # the message itself will say so
            self.counts["refused"] += 1
        self._taken(waiting, 0)
        link.acknowledge()  # the sender waits for it

    def _take_part(self, link: Link, part: Part, frames: Sequence[Bytes], stage: Stage | None) -> None:
        if part.sizes:
            batch = None if stage is None else stage.batch()
            self._assemblies[link.peer.link] = Assembly(part.sizes, self._config, batch)
        assembly = self._assemblies.get(link.peer.link)
        if assembly is None:
            raise ProtocolError("a part of no message")
        for piece in part.pieces:
            assembly.check(piece)
            inbound = self._inbound(piece.backend)
            for start, array in inbound.follow(link.peer, bytes(piece.handle), piece.nbytes, frames):
                assembly.write(piece, start, array)
                del array  # as in `_bring`
            assembly.came(piece)
            self._config.emit("receive.part", peer=link.peer.name, number=part.number)
            self.counts[f"bytes {piece.backend}"] += piece.nbytes
        self.counts["parts"] += 1

    def _taken(self, waiting: Waiting, nbytes: int, in_ring: int = 0) -> None:
        link, message = waiting.link, waiting.message
        index = 0
        if self.queue[0] is not waiting:
            index = next(index for index, other in enumerate(list(self.queue)) if other is waiting)
        del self.queue[index]
        link.taken_bytes += waiting.nbytes
        for place in _places(message):
            if place.backend in self._later and place.backend in self.inbounds:
                self.inbounds[place.backend].taken(link.peer, bytes(place.handle))
        link.take(message.number, nbytes, in_ring)
        if link.ended and not link.waiting:
            self.forget(link)

    # ------------------------------------------------------------------ ending

    def forget(self, link: Link) -> None:
        """The link ended and nothing that came over it is left."""
        self._assemblies.pop(link.peer.link, None)
        for inbound in self.inbounds.values():
            inbound.drop(link.peer)

    def close(self) -> None:
        """Drop what was not taken."""
        with self._receiving:
            self.queue.clear()
            self._written.clear()
            self._assemblies.clear()
            for inbound in self.inbounds.values():
                inbound.close()


def _index(reference: Reference) -> int:
    """Which tensor of a message in parts it is."""
    index: int = codec.decode(bytes(reference.handle), (), int)
    return index


def _places(message: Numbered) -> Sequence[Reference | Piece]:
    """Where the tensors of a message are, or the pieces of a part."""
    if isinstance(message, Data):
        return message.tensors
    return message.pieces if isinstance(message, Part) else ()
