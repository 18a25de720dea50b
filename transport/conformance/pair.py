"""The two nouns of a backend by themselves: an outbound and the inbounds for it, without endpoints."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from transport import registry
from transport.backends.base import Bytes, Inbound, Load, Outbound, Parcel, Peer
from transport.config import TransportConfig
from transport.conformance.peers import WAIT
from transport.tensors import Source, source_of


class Both:
    """An outbound and the inbounds for it, introduced to each other without endpoints."""

    def __init__(self, config: TransportConfig) -> None:
        self.outbound: Outbound = registry.load(config.backend).outbound(config)
        self.inbounds: dict[str, Inbound] = registry.inbounds(config)
        self.peer = Peer(1, "reader", os.getpid())
        self.offered = b""
        if self.outbound.wants_offer(self.peer, [1 << 20]):
            inbound = self.inbounds[self.outbound.reads(self.peer)]
            self.offered = self.outbound.offer(self.peer)
            reason = self.outbound.admit(self.peer, inbound.accept(self.peer, self.offered, "reader"))
            assert not reason
            inbound.settle(self.peer, reason)
            deadline = time.monotonic() + WAIT
            while not self.outbound.serves(self.peer):  # a connection may still be made
                assert time.monotonic() < deadline, self.outbound.explain(self.peer)
                time.sleep(0.001)

    def put(
        self, tensors: Sequence[Any], *, timeout: float, poll: Callable[[], object] = lambda: None
    ) -> Parcel:
        sources = [source for source in map(source_of, tensors) if source is not None]
        parcel = self.outbound.put(sources, [self.peer], timeout=timeout, poll=poll)
        parcel.fill()
        return parcel

    def send(self, tensors: Sequence[Any]) -> tuple[Parcel, list[Bytes]]:
        parcel = self.put(tensors, timeout=WAIT)
        load = self.loaded(parcel)
        views = [
            self.inbounds[name].open(self.peer, handle, tensor.nbytes, load.frames)
            for (name, handle), tensor in zip(load.handles, tensors, strict=True)
        ]
        return parcel, views

    def loaded(self, parcel: Parcel) -> Load:
        """What the reader is sent, once it can open all of it: bytes may come by themselves."""
        load = parcel.load(self.peer)
        deadline = time.monotonic() + WAIT
        while not all(self.inbounds[name].is_ready(self.peer, handle) for name, handle in load.handles):
            assert time.monotonic() < deadline, "the bytes did not come"
            time.sleep(0.001)
        return load

    def close(self) -> None:
        self.outbound.close()
        for inbound in self.inbounds.values():
            inbound.close()


class Broken(Source):
    """A source whose bytes cannot be read."""

    def __init__(self, nbytes: int) -> None:
        whole = source_of(torch.empty(nbytes, dtype=torch.uint8))
        assert whole is not None
        super().__init__(whole.spec, nbytes, whole.tensor)

    def fill(self, destination: Bytes, **options: Any) -> None:
        raise RuntimeError(f"broken source of {destination.nbytes} bytes, {options}")


def repeated(call: Callable[[], object], times: int = 5000) -> None:
    """Call until it raises, which it must before so many times."""
    for _ in range(times):
        call()
