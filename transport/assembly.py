"""Messages too large to go at once: planned in parts by the sender, put together by the receiver."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from transport import devices
from transport.backends.base import Bytes
from transport.config import TransportConfig
from transport.errors import ProtocolError
from transport.message import Piece
from transport.staging import Batch, Place
from transport.tensors import Source, TensorSpec


class Span(NamedTuple):
    """Bytes `start` to `stop` of tensor number `tensor`."""

    tensor: int
    start: int
    stop: int


def plan(sizes: Sequence[int], limit: int) -> Iterator[list[Span]]:
    """Cut tensors of these sizes (bytes) into parts of at most `limit` bytes, in order."""
    part: list[Span] = []
    room = limit
    for index, nbytes in enumerate(sizes):
        start = 0
        while start < nbytes:
            stop = min(nbytes, start + room)
            part.append(Span(index, start, stop))
            room -= stop - start
            start = stop
            if not room:
                yield part
                part, room = [], limit
    if part:
        yield part


class Assembly:
    """The tensors of one message in memory of the receiver's own, filled as parts come in.

    The memory is touched only as bytes arrive, so that announced sizes cost nothing.
    `ProtocolError` when they exceed the limits of the configuration. With a `batch` each part goes there as
    it comes, and its memory is the batch's.
    """

    def __init__(self, sizes: Sequence[int], config: TransportConfig, batch: Batch | None = None) -> None:
        if len(sizes) > config.max_tensors:
            raise ProtocolError(f"{len(sizes)} tensors exceed max_tensors ({config.max_tensors})")
        if sum(sizes) > config.max_message_bytes:
            raise ProtocolError(f"{sum(sizes)} bytes exceed max_message_bytes ({config.max_message_bytes})")
        try:
            self._places = [batch.place(nbytes) if batch else _Buffer(nbytes) for nbytes in sizes]
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise ProtocolError(f"there is no memory here for a message of {sum(sizes)} bytes") from error
        self.batch = batch
        self._sizes = list(sizes)
        self._filled = [0] * len(sizes)

    def check(self, piece: Piece) -> None:
        """`ProtocolError` unless a piece follows what came of its tensor: in order, without a gap."""
        if piece.index >= len(self._places):
            raise ProtocolError(f"a piece of tensor {piece.index} of {len(self._places)}")
        nbytes, filled = self._sizes[piece.index], self._filled[piece.index]
        if piece.start != filled or piece.start + piece.nbytes > nbytes:
            raise ProtocolError(
                f"{piece.nbytes} bytes at {piece.start} of a tensor of {nbytes} that has {filled}"
            )

    def write(self, piece: Piece, start: int, array: Bytes | devices.Piece) -> None:
        """Bytes of a piece, from its byte `start` on."""
        self._places[piece.index].write(piece.start + start, array)

    def came(self, piece: Piece) -> None:
        """All bytes of a piece were written."""
        self._filled[piece.index] += piece.nbytes

    def finished(self, index: int, nbytes: int) -> Place:
        """A tensor that has all its bytes."""
        if not 0 <= index < len(self._places) or self._filled[index] != nbytes:
            raise ProtocolError(f"tensor {index} did not come whole")
        return self._places[index]


class _Buffer:
    """A place in this process's own memory."""

    def __init__(self, nbytes: int) -> None:
        self.array: Bytes = np.empty(nbytes, np.uint8)

    @property
    def tensor(self) -> torch.Tensor:
        return torch.from_numpy(self.array)

    def write(self, start: int, array: Bytes | devices.Piece) -> None:
        if isinstance(array, devices.Piece):
            raise ProtocolError("parts of a message do not lie on a GPU")
        self.array[start : start + array.nbytes] = array


class Slice(Source):
    """Bytes `start` to `stop` of another source, as a source of bytes."""

    def __init__(self, whole: Source, start: int, stop: int) -> None:
        super().__init__(TensorSpec("|u1", (stop - start,)), stop - start, whole.tensor)
        self._whole = whole
        self._start = start

    def fill(
        self,
        destination: Bytes,
        *,
        threads: int = 1,  # noqa: ARG002  # a range is copied by one thread
        progress: Callable[[int], None] | None = None,
        step: int = 0,
    ) -> None:
        step = step or max(1, self.nbytes)
        for begin in range(0, self.nbytes, step):
            end = min(begin + step, self.nbytes)
            self._whole.fill_range(destination[begin:end], self._start + begin, self._start + end)
            if progress is not None:
                progress(end)
