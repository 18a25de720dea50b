"""Writing the bytes of tensors into a buffer: the one copy on the CPU, in parts and by threads on demand."""

from __future__ import annotations

import math
import os
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeAlias

import numpy as np
import torch

from .devices import copy_out, flat_bytes, queued, to_host
from .specs import Bytes, Tensor, TensorSpec, Window, is_aligned, shaped

Progress: TypeAlias = Callable[[int], None]

PARALLEL_PIECE = 1 << 20  # of less, handing it to a thread costs more than copying it
# Bytes between two reports of progress: a 64th of all, but not so few that reporting costs much. Pieces for
# threads are larger, as handing them out costs more. What one thread copies and is larger than the last goes
# whole: the C library copies such blocks past the caches, half as fast again, if it gets them in one call.
PROGRESS_LEAST, PROGRESS_PARALLEL, PROGRESS_NEVER = 1 << 20, 8 << 20, 64 << 20
RANGE_PIECE = 1 << 20
_PAGE = 4096


class Source:
    """Something whose bytes, in C order, can be written into a buffer. Made by `source_of`.

    spec, nbytes: what is written. tensor: the object that is read, kept alive (of a subclass its plain
    tensor over the same memory). The bytes are read when `fill` or `fill_range` is called, not before.
    """

    __slots__ = ("_pieces_at", "_scratch", "nbytes", "spec", "tensor")

    def __init__(self, spec: TensorSpec, nbytes: int, tensor: Any) -> None:
        self.spec = spec
        self.nbytes = nbytes
        self.tensor = tensor
        self._pieces_at: tuple[list[int], list[Source]] | None = None
        self._scratch: tuple[int, Bytes] | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.spec.dtype}, {self.spec.shape})"

    @property
    def address(self) -> int | None:
        """Address of the first byte, if all lie in CPU memory just as they are to be sent; else None."""
        return None

    def fill(
        self, destination: Bytes, *, threads: int = 1, progress: Progress | None = None, step: int = 0
    ) -> None:
        """Write all bytes into `destination`, uint8 [nbytes]: the one copy on the CPU.

        threads: how many copy at the same time, 1 MiB or more each. Strided torch tensors are the exception:
        torch splits those over threads of its own (`torch.set_num_threads`). When this returns or raises,
        no thread writes any more. progress: called in this thread with the number of bytes complete from
        the start, growing up to nbytes. step: bytes between two such calls, 0: as suits the copy.
        ValueError: a destination of another form.
        """
        _check_destination(destination, self.nbytes)
        if not self._suits(destination):
            scratch = np.empty(self.nbytes, np.uint8)
            self.fill(scratch, threads=threads)
            flat = _Flat(TensorSpec("|u1", scratch.shape), self.nbytes, scratch)
            flat.fill(destination, progress=progress, step=step)
            return
        workers = max(1, min(threads, self.nbytes // PARALLEL_PIECE)) if self._is_parallel() else 1
        limit = _round_up(-(-self.nbytes // workers), _PAGE)
        if progress is not None:
            limit = min(limit, step or self._step(workers))
        if self.nbytes > limit and workers > 1:
            _write_parallel(self._pieces(limit), destination, workers, progress)
        elif self.nbytes > limit:
            self._write_in_order(limit, destination, progress)
        else:
            if self.nbytes:
                self._write(destination)
            _report(progress, self.nbytes)

    def _step(self, workers: int) -> int:
        if workers > 1:
            return PROGRESS_PARALLEL
        if self.nbytes > PROGRESS_NEVER:
            return self.nbytes
        return max(PROGRESS_LEAST, _round_up(self.nbytes // 64, _PAGE))

    def fill_range(self, destination: Bytes, start: int, stop: int) -> None:
        """Write the bytes [start, stop) into `destination`, uint8 [stop - start].

        Contiguous tensors are copied from directly. Of others, a piece of about 1 MiB that lies in the
        range only in part is made contiguous beside and kept for the next call, so reading a tensor from
        front to back touches each element once. ValueError: a range outside, a destination of another form.
        """
        if not 0 <= start <= stop <= self.nbytes:
            raise ValueError(f"bytes {start} to {stop} of a tensor of {self.nbytes} bytes")
        _check_destination(destination, stop - start)
        self._write_range(destination, start, stop)

    def _write_range(self, destination: Bytes, start: int, stop: int) -> None:
        if self._pieces_at is None:
            pieces = list(self._pieces(RANGE_PIECE)) if self.nbytes else []
            self._pieces_at = list(_offsets(pieces)), pieces
        offsets, pieces = self._pieces_at
        index = bisect_right(offsets, start) - 1
        while start < stop:
            piece, offset = pieces[index], offsets[index]
            end = min(stop, offset + piece.nbytes)
            into, destination = destination[: end - start], destination[end - start :]
            if len(into) == piece.nbytes and piece._suits(into):
                piece._write(into)
            else:
                np.copyto(into, self._materialized(offset, piece)[start - offset : end - offset])
            start, index = end, index + 1

    def _materialized(self, offset: int, piece: Source) -> Bytes:
        if self._scratch is None or self._scratch[0] != offset:
            scratch = np.empty(piece.nbytes, np.uint8)
            piece._write(scratch)
            self._scratch = offset, scratch
        return self._scratch[1]

    def _pieces(self, limit: int) -> Iterator[Source]:
        """Split into sources that follow each other in C order, of `limit` bytes or a single element."""
        shape = self.spec.shape
        if self.nbytes <= limit or not shape:
            yield self
            return
        rows = limit // (self.nbytes // shape[0])
        if rows or len(shape) == 1:
            step = max(rows, 1)
            for first in range(0, shape[0], step):
                yield self._select(slice(first, first + step))
        else:
            for row in range(shape[0]):
                yield from self._select(row)._pieces(limit)

    def _select(self, key: int | slice) -> Source:
        """The source of `tensor[key]`."""
        raise NotImplementedError

    def _write(self, destination: Bytes) -> None:
        """Write all bytes in the calling thread; there is at least one."""
        raise NotImplementedError

    def _write_in_order(self, limit: int, destination: Bytes, progress: Progress | None) -> None:
        """Write all bytes in the calling thread, `limit` at a time."""
        for piece, into, complete in _placed(self._pieces(limit), destination):
            piece._write(into)
            _report(progress, complete)

    def _is_parallel(self) -> bool:
        """Whether pieces may be written by several threads of ours."""
        return isinstance(self.tensor, np.ndarray)

    def _suits(self, destination: Bytes) -> bool:
        """Whether the elements may be written there one by one."""
        return is_aligned(shaped(destination, self.spec))


class _Flat(Source):
    """Bytes that already lie in C order in CPU memory."""

    __slots__ = ()

    @property
    def address(self) -> int | None:
        if not self.nbytes:
            return None
        tensor = self.tensor
        return int(tensor.data_ptr() if isinstance(tensor, torch.Tensor) else tensor.ctypes.data)

    def _bytes(self) -> Bytes:
        tensor = self.tensor
        if isinstance(tensor, torch.Tensor):
            return np.asarray(Window(tensor.data_ptr(), (self.nbytes,), "|u1", owner=tensor))
        seen: Bytes = tensor.reshape(-1).view(np.uint8)
        return seen

    def _write(self, destination: Bytes) -> None:
        np.copyto(destination, self._bytes())

    def _write_in_order(self, limit: int, destination: Bytes, progress: Progress | None) -> None:
        flat = self._bytes()
        for start in range(0, self.nbytes, limit):
            complete = min(start + limit, self.nbytes)
            np.copyto(destination[start:complete], flat[start:complete])
            _report(progress, complete)

    def _write_range(self, destination: Bytes, start: int, stop: int) -> None:
        if start < stop:
            np.copyto(destination, self._bytes()[start:stop])

    def _pieces(self, limit: int) -> Iterator[Source]:
        flat = self._bytes()
        for start in range(0, self.nbytes, limit):
            part = flat[start : start + limit]
            yield _Flat(TensorSpec("|u1", part.shape), part.nbytes, part)

    def _is_parallel(self) -> bool:
        return True

    def _suits(self, destination: Bytes) -> bool:  # noqa: ARG002  # the base class needs it
        return True  # bytes go anywhere


class DeviceSource(Source):
    """Bytes that lie in C order in a GPU's memory, behind whatever was queued for them when this was made."""

    __slots__ = ("_after",)

    def __init__(self, spec: TensorSpec, nbytes: int, tensor: torch.Tensor, after: torch.cuda.Event) -> None:
        super().__init__(spec, nbytes, tensor)
        self._after = after

    @property
    def device(self) -> int:
        """The number of the GPU."""
        return int(self.tensor.device.index)

    def copy_out(self, address: int) -> None:
        """Copy all bytes to an address on the same GPU; complete on return."""
        copy_out(address, self.tensor, self._after)

    def _write(self, destination: Bytes) -> None:
        to_host(destination, self.tensor, self._after)

    def _write_range(self, destination: Bytes, start: int, stop: int) -> None:
        if start < stop:
            to_host(destination, flat_bytes(self.tensor)[start:stop], self._after)

    def _pieces(self, limit: int) -> Iterator[Source]:
        flat = flat_bytes(self.tensor)
        for start in range(0, self.nbytes, limit):
            part = flat[start : start + limit]
            yield DeviceSource(TensorSpec("|u1", tuple(part.shape)), part.nbytes, part, self._after)

    def _suits(self, destination: Bytes) -> bool:  # noqa: ARG002  # the base class needs it
        return True  # bytes go anywhere


class _Strided(Source):
    """Anything else: strides, negative strides, conjugates, another device; torch or numpy copies it."""

    __slots__ = ()

    def _write(self, destination: Bytes) -> None:
        _assign(shaped(destination, self.spec), self.tensor)

    def _select(self, key: int | slice) -> Source:
        return source_over(self.tensor[key], self.spec.dtype)


class Combined(Source):
    """Several tensors beside each other along `dim`, which reach the destination without meeting before."""

    __slots__ = ("_dim", "_parts")

    def __init__(self, parts: Sequence[Source], dim: int) -> None:
        spec = combined_spec(parts, dim)
        super().__init__(spec, spec.nbytes, tuple(part.tensor for part in parts))
        self._parts = parts
        self._dim = dim

    def _is_consecutive(self) -> bool:
        """Whether the bytes of each part stay together in the result."""
        return math.prod(self.spec.shape[: self._dim]) <= 1

    def _write(self, destination: Bytes) -> None:
        if self._is_consecutive():
            for offset, part in zip(_offsets(self._parts), self._parts, strict=True):
                if part.nbytes:
                    part._write(destination[offset : offset + part.nbytes])
            return
        whole, first = shaped(destination, self.spec), 0
        for part in self._parts:
            after = first + part.spec.shape[self._dim]
            _assign(whole[(slice(None),) * self._dim + (slice(first, after),)], part.tensor)
            first = after

    def _pieces(self, limit: int) -> Iterator[Source]:
        if not self._is_consecutive():
            yield from super()._pieces(limit)
            return
        for part in self._parts:
            if part.nbytes:
                yield from part._pieces(limit)

    def _select(self, key: int | slice) -> Source:
        parts = [source_over(part.tensor[key], self.spec.dtype) for part in self._parts]
        dim = self._dim - 1 if isinstance(key, int) else self._dim
        return Combined(parts, dim)

    def _is_parallel(self) -> bool:
        if self._is_consecutive():
            return all(part._is_parallel() for part in self._parts)
        return isinstance(self.tensor[0], np.ndarray)


def source_over(tensor: Tensor, dtype: str) -> Source:
    """The source of a tensor that can be sent, under this name of its dtype."""
    spec = TensorSpec(dtype, tuple(tensor.shape))
    if isinstance(tensor, np.ndarray):
        return (_Flat if tensor.flags.c_contiguous else _Strided)(spec, tensor.nbytes, tensor)
    nbytes = tensor.numel() * tensor.itemsize
    if tensor.is_cuda:
        # What is not contiguous becomes so on the device, which is faster at it, in the producer's stream.
        whole = tensor.detach().resolve_conj().resolve_neg().contiguous()
        return DeviceSource(spec, nbytes, whole, queued(whole))
    if not (tensor.is_cpu and tensor.is_contiguous()) or tensor.is_conj() or tensor.is_neg():
        return _Strided(spec, nbytes, tensor.detach())
    return _Flat(spec, nbytes, tensor)


def combined_spec(parts: Sequence[Source], dim: int) -> TensorSpec:
    """What tensors of one dtype make when they are concatenated along `dim`."""
    shape = list(parts[0].spec.shape)
    shape[dim] = sum(part.spec.shape[dim] for part in parts)
    return TensorSpec(parts[0].spec.dtype, tuple(shape))


def _offsets(pieces: Sequence[Source]) -> Iterator[int]:
    offset = 0
    for piece in pieces:
        yield offset
        offset += piece.nbytes


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _check_destination(destination: Bytes, nbytes: int) -> None:
    flags = destination.flags
    if destination.dtype != np.uint8 or destination.ndim != 1 or not (flags.c_contiguous and flags.writeable):
        raise ValueError("the destination must be a writable, contiguous, one-dimensional uint8 array")
    if destination.size != nbytes:
        raise ValueError(f"the destination has {destination.size} bytes, {nbytes} are to be written")


def _assign(target: Tensor, tensor: Tensor) -> None:
    """Copy elements between two tensors of one library, dtype and shape, whatever their strides."""
    if isinstance(target, np.ndarray) or isinstance(tensor, np.ndarray):
        np.copyto(target, tensor)  # type: ignore[arg-type]  # both are arrays, by the caller
    elif target.dtype is torch.bool:
        # As bytes, since torch's bool copy maps every value but 0 to 1.
        target.view(torch.uint8).copy_(tensor.detach().view(torch.uint8))
    else:
        target.copy_(tensor.detach())


_pool: ThreadPoolExecutor | None = None
_pool_lock = threading.Lock()


def _forget_pool() -> None:
    """In a forked child: the threads are not there, and the lock may be held by one that is not."""
    global _pool, _pool_lock
    _pool, _pool_lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget_pool)


def _shared_pool() -> ThreadPoolExecutor:
    global _pool
    with _pool_lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)), thread_name_prefix="tensorferry-copy")
        return _pool


def _report(progress: Progress | None, complete: int) -> None:
    if progress is not None:
        progress(complete)


def _placed(pieces: Iterator[Source], destination: Bytes) -> Iterator[tuple[Source, Bytes, int]]:
    """Each piece, where it goes, and how many bytes are complete with it."""
    start = 0
    for piece in pieces:
        after = start + piece.nbytes
        yield piece, destination[start:after], after
        start = after


def _write_parallel(
    pieces: Iterator[Source], destination: Bytes, workers: int, progress: Progress | None
) -> None:
    """Write `workers` pieces at a time; report the oldest as it is done, so that the numbers only grow."""
    running: deque[tuple[Future[None], int]] = deque()

    def finish_oldest() -> None:
        future, complete = running[0]
        future.result()  # ends by itself: a copy waits for nobody
        running.popleft()
        _report(progress, complete)

    try:
        for piece, into, complete in _placed(pieces, destination):
            if len(running) == workers:
                finish_oldest()
            running.append((_shared_pool().submit(piece._write, into), complete))
        while running:
            finish_oldest()
    finally:
        # The caller may give the destination back as soon as this is left: nobody may still write then.
        wait([future for future, _ in running if not future.cancel()])
