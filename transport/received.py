"""One message at its receiver: come and waiting, opened, and what the caller is given."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from transport.backends.base import Bytes, Complete, Inbound
from transport.link import Link
from transport.message import Data, Numbered, Reference
from transport.staging import Batch
from transport.tensors import Source, source_of, view

ELSEWHERE: Bytes = np.empty(0, np.uint8)  # for a tensor of which nothing is open here


class Waiting(NamedTuple):
    """A message that came and was not taken; `nbytes` is what it takes up."""

    link: Link
    message: Numbered
    frames: Sequence[Bytes]
    nbytes: int


class Opened:
    """A message whose handles are open here; some of its bytes may still be on their way."""

    __slots__ = ("arrays", "batch", "data", "incomplete", "since", "sizes", "tensors", "waiting")

    def __init__(self, waiting: Waiting, data: Data) -> None:
        self.waiting = waiting
        self.data = data
        self.since = time.monotonic()
        self.sizes: list[int] = []
        self.batch: Batch | None = None
        self.arrays: list[Bytes] = []
        self.tensors: list[Any] = []
        self.incomplete: deque[Complete] = deque()

    def complete(self, patience: float) -> bool:
        """Whether all bytes are there, within so many seconds."""
        if not self.incomplete:
            return True
        deadline = time.monotonic() + patience
        while self.incomplete:
            if not self.incomplete[0](max(0.0, deadline - time.monotonic())):
                return False
            self.incomplete.popleft()
        return True

    def copy(self) -> None:
        """Memory of this process's own in the place of every view."""
        for index, reference in enumerate(self.data.tensors):
            if self.arrays[index] is not ELSEWHERE:
                self.arrays[index] = self.arrays[index].copy()
                self.tensors[index] = view(self.arrays[index], reference.spec)

    def clear(self) -> None:
        """Let go of all memory."""
        self.arrays.clear()
        self.tensors.clear()
        self.incomplete.clear()


class Message:
    """A received message. Its tensors are views of the sender's memory until the last of them is gone.

    body: what was sent. sender: the peer's name. number: counted by the sender from 1, for this link.
    Tensors in shared memory are read-only: numpy refuses to write; an in-place operation of torch (or a
    write through `tensor.numpy()`) ends this process with SIGSEGV. Use `receive(copy=True)` or `.clone()`.
    staged: what the stage given to `receive` made for this message, else None.
    """

    __slots__ = (
        "_inbounds",
        "_tensors",
        "arrays",
        "body",
        "encoded",
        "number",
        "references",
        "sender",
        "staged",
    )

    def __init__(
        self,
        sender: str,
        data: Data,
        body: Any,
        arrays: list[Bytes],
        tensors: list[Any],
        inbounds: Mapping[str, Inbound],
        staged: Batch | None = None,
    ) -> None:
        self.body = body
        self.staged = staged
        self.sender = sender
        self.number = data.number
        self.encoded = data.body
        self.references = data.tensors
        self.arrays = arrays
        self._tensors = tensors
        self._inbounds = inbounds

    def store_of(self, reference: Reference) -> int | None:
        """The store whose other readers can open this tensor's handle themselves."""
        inbound = self._inbounds.get(reference.backend)
        return None if inbound is None else inbound.store_of(bytes(reference.handle))

    def source(self, index: int) -> Source:
        """A tensor as something to be sent again."""
        source = source_of(self._tensors[index])
        assert source is not None  # it came as a tensor
        return source

    def __repr__(self) -> str:
        return f"<Message {self.number} from {self.sender!r} with {len(self.references)} tensors>"
