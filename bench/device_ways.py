"""Part 2 of `bench gpu`: a tensor of one process in the device memory of another, by every way."""

from __future__ import annotations

import contextlib
import pickle
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import zmq

import transport
from bench import payload
from bench.floor import TIMEOUT, Pair, pair
from bench.part import Json, Report, WrongAnswerError
from engine.staging import Stager, staged

OURS = ("send 1", "send 8", "cut-through", "loan", "on the GPU")
WAYS = (*OURS, "pickle", "zmq frames", "torch.multiprocessing")
RING_BYTES = 1 << 30
WARM, OTHERS_WARM = 15, 3  # the first until the ring is registered on both sides
_DEVICE = "cuda"


class Near(Protocol):
    """The sending end: `make` is not timed, `send` is until the other end says that it is on the device."""

    def make(self, words: payload.Words) -> Any:
        """What is sent, with these words in it."""

    def send(self, made: Any) -> int:
        """Send it and wait; the answer."""

    def close(self) -> None:
        """Give everything back."""


def near(folder: Path, *, way: str, sizes: list[int], messages: int) -> Report:
    """Times `messages` messages of each size in microseconds, after some to warm up."""
    times: dict[str, list[float]] = {}
    with contextlib.closing(_NEAR[way](folder)) as end:
        for nbytes in sizes:
            times[str(nbytes)] = _timed(end, nbytes, _warm(way), messages)
    values: dict[str, Json] = {"us": times}
    sent = len(sizes) * (_warm(way) + messages)
    return Report(values=values, expected=sent, verified=sent)


def _warm(way: str) -> int:
    return WARM if way in OURS else OTHERS_WARM


def _timed(end: Near, nbytes: int, warm: int, messages: int) -> list[float]:
    words: payload.Words = np.empty(nbytes // 8, np.int64)
    payload.fill(words, nbytes)
    times = []
    for number in range(warm + messages):
        payload.stamp(words, number)
        made = end.make(words)
        start = time.perf_counter()
        answer = end.send(made)
        seconds = time.perf_counter() - start
        del made
        if answer != number:
            raise WrongAnswerError(f"message {number} was answered with {answer}")
        if number >= warm:
            times.append(seconds * 1e6)
    return times


def far(folder: Path, *, way: str, sizes: list[int], messages: int) -> Report:
    """Answers each message once it is on the device, then looks at its stamp there, or at all of it."""
    torch.zeros(1, device=_DEVICE)
    with contextlib.closing(_FAR[way](folder)) as end:
        for nbytes in sizes:
            expected: payload.Words = np.empty(nbytes // 8, np.int64)
            payload.fill(expected, nbytes)
            last = _warm(way) + messages - 1
            for number in range(last + 1):
                tensor = end.receive()
                end.answer(number)
                _check(tensor, number, expected, whole=number in (0, last))
                del tensor
        if way in OURS:
            end.check_way("bytes cuda" if way == "on the GPU" else "bytes shm")
    return Report()


def _check(tensor: torch.Tensor, number: int, expected: payload.Words, *, whole: bool) -> None:
    """Not timed: the answer is out, and the next message is made only then or waits in the queue."""
    if tensor.device.type != _DEVICE or tensor.numel() != len(expected):
        raise WrongAnswerError(f"message {number}: {tensor.numel()} words on {tensor.device}")
    if whole:
        payload.stamp(expected, number)
        if not np.array_equal(tensor.cpu().numpy(), expected):
            raise WrongAnswerError(f"message {number} has other bytes on the device")
    payload.check_stamp(tensor[[0, len(tensor) // 2, -1]].cpu().numpy(), number)


# ---------------------------------------------------------------------- tensorferry


class _EndpointNear:
    def __init__(self, folder: Path, way: str) -> None:
        config = transport.TransportConfig(
            backend="auto", ring_bytes=RING_BYTES, copy_threads=1 if way == "send 1" else 8
        )
        self._way = way
        self._endpoint = transport.listen(f"ipc://{folder}/near", config=config)
        self._endpoint.wait_for_peers(1, timeout=TIMEOUT)

    def make(self, words: payload.Words) -> torch.Tensor:
        if self._way == "on the GPU":
            return torch.from_numpy(words).to(_DEVICE)
        if self._way != "loan":
            return torch.from_numpy(words)
        with self._endpoint.loan(words.shape, torch.int64, timeout=TIMEOUT) as place:
            place.copy_(torch.from_numpy(words))
        return place  # type: ignore[no-any-return]

    def send(self, made: torch.Tensor) -> int:
        self._endpoint.send({"x": made}, timeout=TIMEOUT)
        answer: int = self._endpoint.receive(timeout=TIMEOUT).body
        return answer

    def close(self) -> None:
        self._endpoint.close()


class _EndpointFar:
    def __init__(self, folder: Path, way: str) -> None:
        self._stager = Stager(torch.device(_DEVICE))
        config = transport.TransportConfig(
            backend="auto", cut_through=way == "cut-through", handshake_timeout=TIMEOUT
        )
        self._endpoint = transport.connect(f"ipc://{folder}/near", name="far", config=config)

    def receive(self) -> torch.Tensor:
        message = self._endpoint.receive(timeout=TIMEOUT, stage=self._stager)
        copies = staged(message)
        assert copies is not None
        copies.synchronize()
        copies.wait()
        tensor: torch.Tensor = message.body["x"]
        return tensor

    def answer(self, number: int) -> None:
        self._endpoint.send(number, timeout=TIMEOUT)

    def check_way(self, expected: str) -> None:
        received = self._endpoint.statistics()["received"]
        others = [key for key in received if key.startswith("bytes ") and key != expected]
        if others or received.get("parts"):
            raise WrongAnswerError(f"not all came by {expected}: {dict(received)}")

    def close(self) -> None:
        self._endpoint.close()


# ---------------------------------------------------------------------- the ways there were


class _SocketEnd:
    def __init__(self, folder: Path, *, bind: bool) -> None:
        self._socket: Pair = pair(f"ipc://{folder}/near", bind=bind)

    def answer(self, number: int) -> None:
        self._socket.send(b"%d" % number)

    def close(self) -> None:
        self._socket.close()


class _PickleNear(_SocketEnd):
    def make(self, words: payload.Words) -> torch.Tensor:
        return torch.from_numpy(words)

    def send(self, made: torch.Tensor) -> int:
        self._socket.send(pickle.dumps(made, protocol=pickle.HIGHEST_PROTOCOL), copy=False)
        return int(self._socket.recv())


class _PickleFar(_SocketEnd):
    def receive(self) -> torch.Tensor:
        tensor: torch.Tensor = pickle.loads(self._socket.recv(copy=False).buffer)
        return tensor.to(_DEVICE)


class _FramesNear(_SocketEnd):
    def make(self, words: payload.Words) -> payload.Words:
        return words

    def send(self, made: payload.Words) -> int:
        self._socket.send(made.data, copy=False)
        return int(self._socket.recv())


class _FramesFar(_SocketEnd):
    def receive(self) -> torch.Tensor:
        frame: zmq.Frame = self._socket.recv(copy=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the frame is read-only; it is only read
            return torch.frombuffer(frame.buffer, dtype=torch.int64).to(_DEVICE)


class _Multiprocessing:
    """Both ends in one: a tensor through a queue of torch.multiprocessing to a process that it starts."""

    def __init__(self, _folder: Path) -> None:
        self._context = torch.multiprocessing.get_context("spawn")
        self._there, self._back = self._context.Queue(), self._context.Queue()
        arguments = (self._there, self._back)
        self._process = self._context.Process(target=_take_from_queue, args=arguments, daemon=True)
        self._process.start()
        self._back.get(timeout=TIMEOUT)

    def make(self, words: payload.Words) -> torch.Tensor:
        # Anew each time: the first `put` moves a tensor into shared memory for good.
        return torch.from_numpy(words).clone()

    def send(self, made: torch.Tensor) -> int:
        self._there.put(made)
        answer: int = self._back.get(timeout=TIMEOUT)
        return answer

    def close(self) -> None:
        self._there.put(None)
        self._process.join(TIMEOUT)


def _take_from_queue(there: Any, back: Any) -> None:
    torch.zeros(1, device=_DEVICE)
    back.put(-1)
    while (tensor := there.get(timeout=TIMEOUT)) is not None:
        on_device = tensor.to(_DEVICE)
        back.put(int(on_device[0].item()))
        payload.check_stamp(tensor.numpy(), int(on_device[-1].item()))
        del tensor, on_device


_NEAR: dict[str, Callable[[Path], Near]] = {
    **{way: lambda folder, way=way: _EndpointNear(folder, way) for way in OURS},  # type: ignore[misc]
    "pickle": lambda folder: _PickleNear(folder, bind=True),
    "zmq frames": lambda folder: _FramesNear(folder, bind=True),
    "torch.multiprocessing": _Multiprocessing,
}
_FAR: dict[str, Callable[[Path], Any]] = {
    **{way: lambda folder, way=way: _EndpointFar(folder, way) for way in OURS},  # type: ignore[misc]
    "pickle": lambda folder: _PickleFar(folder, bind=False),
    "zmq frames": lambda folder: _FramesFar(folder, bind=False),
}
