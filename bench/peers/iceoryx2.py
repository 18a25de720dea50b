"""iceoryx2: tensors are copied into loaned samples and read in place; the reader blocks or spins."""

from __future__ import annotations

import ctypes
import hashlib
import time
import weakref
from pathlib import Path
from typing import Any

import iceoryx2
import numpy as np
import torch

from bench.floor import TIMEOUT
from bench.links import Body
from bench.peers.baselines import leave, wait_for
from bench.peers.bodies import join, split, vector

_HEAD = 4096  # bytes before a tensor in its sample: length of the head, head
_WAIT_MS = 50


class IceoryxLink:
    """One publisher and one subscriber, each with an event; one sample for each tensor of a body."""

    def __init__(self, folder: Path, out: str, into: str, nbytes: int, count: int, *, spin: bool) -> None:
        iceoryx2.set_log_level(iceoryx2.LogLevel.Error)
        self._spin = spin
        self._node = iceoryx2.NodeBuilder.new().create(iceoryx2.ServiceType.Ipc)
        # As many samples as a message has, and one more, so that the next can be written meanwhile.
        self._depth = count + 1
        unique = hashlib.sha256(str(folder).encode()).hexdigest()[:16]
        out_service, out_event = self._services(f"tfbench/{unique}/{out}")
        in_service, in_event = self._services(f"tfbench/{unique}/{into}")
        self._publisher = (
            out_service.publisher_builder()
            .initial_max_slice_len(_HEAD + nbytes)
            .backpressure_strategy(iceoryx2.BackpressureStrategy.RetryUntilDelivered)
            .create()
        )
        self._subscriber = in_service.subscriber_builder().buffer_size(self._depth).create()
        self._notifier = out_event.notifier_builder().create()
        self._listener = in_event.listener_builder().create()
        self._out_service = out_service

    def _services(self, name: str) -> tuple[Any, Any]:
        payload = iceoryx2.Slice[ctypes.c_uint8]
        service = (
            self._node.service_builder(iceoryx2.ServiceName.new(name))
            .publish_subscribe(payload)
            .payload_alignment(iceoryx2.Alignment.new(64))
            .enable_safe_overflow(False)
            .subscriber_max_buffer_size(self._depth)
            .subscriber_max_borrowed_samples(self._depth)
            .max_publishers(1)
            .max_subscribers(1)
            .open_or_create()
        )
        event = self._node.service_builder(iceoryx2.ServiceName.new(name)).event().open_or_create()
        return service, event

    def wait_for_peer(self) -> None:
        """Until the other end subscribes: nothing is kept for who comes later."""
        deadline = time.monotonic() + TIMEOUT
        while not self._out_service.dynamic_config.number_of_subscribers:
            if time.monotonic() > deadline:
                raise TimeoutError(f"nobody subscribed in {TIMEOUT:g} s")
            time.sleep(0.01)

    def send(self, body: Body) -> None:
        """The head goes with the first tensor, or alone."""
        head, tensors = split(body)
        framed = len(head).to_bytes(4, "little") + len(tensors).to_bytes(4, "little") + head
        if not tensors:
            self._publish(framed, None)
        for tensor in tensors:
            self._publish(framed, tensor)
            framed = bytes(8)

    def _publish(self, framed: bytes, tensor: torch.Tensor | None) -> None:
        nbytes = 0 if tensor is None else tensor.nbytes
        sample = self._publisher.loan_slice_uninit(_HEAD + nbytes)
        place = np.frombuffer(sample.payload().as_memory_view(), np.uint8)
        place[: len(framed)] = np.frombuffer(framed, np.uint8)
        if tensor is not None:
            np.copyto(place[_HEAD:].view(np.int64), tensor.numpy())
        del place
        sample.assume_init().send()
        if not self._spin:
            self._notifier.notify()

    def receive(self) -> Body:
        """Views into the samples, each of which goes back with its last view."""
        place = self._next()
        length = int.from_bytes(place[:4].tobytes(), "little")
        count = int.from_bytes(place[4:8].tobytes(), "little")
        head = place[8 : 8 + length].tobytes()
        places = [place, *(self._next() for _ in range(count - 1))] if count else []
        return join(head, [vector(each[_HEAD:]) for each in places])

    def _next(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        deadline = time.monotonic() + TIMEOUT
        while (sample := self._subscriber.receive()) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"no sample in {TIMEOUT:g} s")
            if not self._spin:
                self._listener.timed_wait(iceoryx2.Duration.from_millis(_WAIT_MS))
        place = np.frombuffer(sample.payload().as_memory_view(), np.uint8)
        # The memory view does not keep its sample (0.10.0): without this the array changes under its reader.
        weakref.finalize(place, sample.delete)
        return place

    def check_way(self) -> None:
        """There is one way only."""

    def close(self) -> None:
        """Everything goes with this object."""


def open_near(folder: Path, way: str, *, nbytes: int, count: int) -> IceoryxLink:
    """The end that sends tensors."""
    link = IceoryxLink(folder, "there", "back", nbytes, count, spin=way == "iceoryx2 spin")
    leave(folder, "there", "")
    link.wait_for_peer()
    return link


def open_far(folder: Path, way: str, *, nbytes: int, count: int) -> IceoryxLink:
    """The end that receives them; its own samples are small."""
    wait_for(folder, "there")
    link = IceoryxLink(folder, "back", "there", 0, count, spin=way == "iceoryx2 spin")
    link.wait_for_peer()
    return link
