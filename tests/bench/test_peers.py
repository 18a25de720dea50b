"""The peers' rows: they keep what the peer keeps, and a wrong or dying far end is a failed row."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing import resource_sharer
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import pytest
import torch.multiprocessing
import zmq

from bench import sampler, ways
from bench.harness import Row, run
from bench.links import Link
from bench.part import Json, WrongAnswerError
from bench.peers import segments
from bench.peers.bodies import split

MIB = 1 << 20

# What is here everywhere is run by `make stress`, as is Ray, which starts a cluster for each row.
PEERS = [
    "iceoryx2",
    "zenoh",
    "vllm rpc",
    "vllm torch_shm",
    "vllm shm store",
    *(pytest.param(way, marks=pytest.mark.stress) for way in ("segment", "ray")),
]

# Greets as vLLM's engine does, then is stopped, so that zmq can't be done with what is sent to it.
ENGINE = """
import sys, zmq
socket = zmq.Context().socket(zmq.DEALER)
socket.identity = b"\\0\\0"
socket.connect(f"ipc://{sys.argv[1]}/in")
socket.send(b"READY")
sys.stdin.read()
"""


def test_tensors_of_a_split_body_stay_when_the_caller_empties_its_list() -> None:
    tensors = [torch.arange(3)]
    _, kept = split({"n": 1, "tensors": tensors})
    tensors.clear()
    assert [tensor.tolist() for tensor in kept] == [[0, 1, 2]]


def test_a_segment_is_counted_while_nobody_maps_it_and_gone_when_the_reader_drops_it(
    short_path: Path,
) -> None:
    near = segments.open_near(short_path, "segment", nbytes=MIB, count=1)
    far = segments.open_far(short_path, "segment", nbytes=MIB, count=1)
    seen = sampler.Segments(f"{short_path.name}.")
    try:
        near.send({"n": 1, "tensors": [torch.arange(MIB // 8)]})
        assert short_path.name not in _maps(), "the sender has closed its own"
        assert seen.allocated([]) == MIB
        body = far.receive()
        assert torch.equal(body["tensors"][0], torch.arange(MIB // 8))
        assert seen.allocated([os.getpid()]) == MIB
        del body
        assert seen.allocated([os.getpid()]) == 0
        assert short_path.name not in _maps()
    finally:
        near.close()
        far.close()
        zmq.Context.instance().term()


@pytest.mark.parametrize("way", ["shm", *PEERS])
def test_small_row_of_latency_runs_and_every_answer_is_checked(way: str) -> None:
    _needed(way)
    ((name, result),) = _run(way, latency="bench.latency").items()
    assert result is None, name


@pytest.mark.parametrize("way", PEERS)
def test_wrong_bytes_and_a_dying_far_end_are_failed_rows(way: str) -> None:
    _needed(way)
    results = _run(way, wrong="tests.bench.wrong", dying="tests.bench.ends")
    assert "message 1: checksum" in str(results["wrong"])
    assert any(said in str(results["dying"]) for said in ("SIGKILL", "status -9", "Actor"))


def _run(way: str, **ends: str) -> dict[str, str | None]:
    """Why a row of each of these ends failed, by this way and small."""
    more: dict[str, dict[str, Json]] = {"latency": {"plan": [[64 << 10, 3], [MIB, 2]]}}
    rows = [
        Row(
            name=name,
            parts=ways.parts(way),
            arguments=ways.arguments(way, module, nbytes=MIB, count=1, **more.get(name, {})),
        )
        for name, module in ends.items()
    ]
    return {result.row.name: result.failure for result in run(rows, rounds=1)}


def _maps() -> str:
    return "".join(
        line for line in Path("/proc/self/maps").read_text().splitlines(True) if "/dev/shm" in line
    )


def _needed(way: str) -> None:
    """Skip where what this way needs is not installed. vLLM as a whole must not be imported to find out."""
    lacking = ways.lacking(way)
    if lacking is not None:
        pytest.skip(lacking)


@pytest.fixture
def engine(short_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that connects as vLLM's engine does."""
    with subprocess.Popen([sys.executable, "-c", ENGINE, str(short_path)], stdin=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def test_vllm_keeps_the_images_of_a_request_until_the_send_after_it_is_sent(
    short_path: Path, engine: subprocess.Popen[bytes]
) -> None:
    _needed("vllm rpc")
    from bench.peers import vllm

    with closing_sockets(near := vllm.Near(short_path, None)):
        _send_and_empty(near, engine)
        ((tracker, request),) = near._pending
        assert not tracker.done
        assert isinstance(request, vllm.Request)
        assert [tensor.nbytes for tensor in request.tensors] == [8 * MIB] * 2
        engine.kill()


def _send_and_empty(near: Link, engine: subprocess.Popen[bytes]) -> None:
    os.kill(engine.pid, signal.SIGSTOP)
    tensors = [torch.zeros(MIB, dtype=torch.int64) for _ in range(2)]
    near.send({"prompt": 1, "tensors": tensors})
    tensors.clear()


def test_vllm_that_goes_over_from_its_queue_to_the_socket_is_a_wrong_answer(
    short_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _needed("vllm torch_shm")
    from bench.peers import vllm

    queue: Queue[Any] = torch.multiprocessing.get_context("spawn").Queue()
    far = vllm.Far(short_path, queue)
    with closing_sockets(near := vllm.Near(short_path, queue), far):
        near.send({"n": 1, "tensors": [torch.arange(1 << 10)]})
        assert far.receive()["tensors"][0].is_shared()
        queue.close()  # what the sender puts is refused from now on
        near.send({"n": 2, "tensors": [torch.arange(1 << 10)]})
        with pytest.raises(WrongAnswerError, match="2 frames came, not 1"):
            far.receive()
    queue.join_thread()
    caplog.clear()  # the exception that vLLM logged, and with it the tensor
    resource_sharer.stop(timeout=10)  # what torch passed descriptors with


@contextlib.contextmanager
def closing_sockets(*ends: Any) -> Iterator[None]:
    """The sockets of vLLM's ends are closed in the end, and their context.

    What waits in them has a second: without, libzmq ends the process where a connection breaks meanwhile.
    """
    try:
        yield
    finally:
        for end in ends:
            end._socket.close(linger=1000)
            end._back.close(linger=1000)
        zmq.Context.instance().term()
