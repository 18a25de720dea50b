"""Tensors of a GPU to a process on the same GPU: they stay there, by CUDA IPC."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import transport
from engine.staging import Stager
from tests.gpu.conftest import MIB, busy, settings, staged, until
from transport.conformance import WAIT, digest, noise, running

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)
SMALL_POOL: dict[str, Any] = {"device_pool_bytes": 24 * MIB}


def _answers(address: str, with_stage: bool, cuda: bool) -> None:
    """A peer that says of each tensor where it is and what is in it, until it is told to stop."""
    if cuda:
        torch.zeros(1, device=CUDA)
    stage = Stager(CUDA) if with_stage else None
    held = []
    with transport.connect(address, name="peer", config=settings(), timeout=WAIT) as endpoint:
        while True:
            message = endpoint.receive(timeout=WAIT, stage=stage)
            body = message.body
            if body["do"] == "stop":
                return
            if stage is not None:
                staged(message).wait()
            if body["do"] == "die":
                busy(torch.cuda.current_stream(), 60_000)
                os.kill(os.getpid(), signal.SIGKILL)
            if body["do"] == "hold":
                held.append(body["x"])
            answer = {"device": body["x"].device.type, "digest": digest(body["x"].cpu())}
            ways = {key: n for key, n in endpoint.statistics()["received"].items() if "bytes" in key}
            del message, body
            endpoint.send({**answer, "ways": ways})


@contextmanager
def peered(
    address: str, *, with_stage: bool = False, cuda: bool = True, **changes: Any
) -> Iterator[transport.Endpoint]:
    torch.zeros(1, device=CUDA)
    with (
        transport.listen(address, config=settings(**changes)) as front,
        running(_answers, address, with_stage, cuda) as process,
    ):
        front.wait_for_peers({"peer"}, timeout=WAIT)
        yield front
        if front.peers:
            front.send({"do": "stop"})
        process.join(WAIT)


def asked(front: transport.Endpoint, tensor: torch.Tensor, do: str = "look") -> Mapping[str, Any]:
    front.send({"do": do, "x": tensor})
    answer: Mapping[str, Any] = front.receive(timeout=WAIT).body
    return answer


def ways(front: transport.Endpoint) -> Mapping[str, Any]:
    backend: Mapping[str, Any] = front.statistics()["backend"]
    return backend


@pytest.mark.parametrize("with_stage", [False, True])
def test_it_stays_on_the_device(address: str, with_stage: bool) -> None:
    with peered(address, with_stage=with_stage) as front:
        for seed, shape in enumerate([(8 * MIB,), (1024, 70), (3, 5 * MIB)]):
            data = noise(torch.Size(shape).numel(), seed).view(shape)
            answer = asked(front, data.to(CUDA))
            assert (answer["device"], answer["digest"]) == ("cuda", digest(data))
        transposed = noise(4 * MIB).view(2048, -1).T
        assert asked(front, transposed.to(CUDA))["digest"] == digest(transposed)
        nbytes = 8 * MIB + 1024 * 70 + 15 * MIB + 4 * MIB
        assert ways(front)["cuda"] == {"tensors": 4, "nbytes": nbytes}
        assert ways(front)["nbytes"]["cuda"] == nbytes
        assert ways(front)["detours"] == {}
        host = noise(8 * MIB, 9)
        answer = asked(front, host)  # and what is not on the device goes by the ring
        assert answer["digest"] == digest(host)
        assert answer["ways"] == {"bytes cuda": nbytes, "bytes shm": 8 * MIB}


def test_pieces_of_the_pool_are_used_again_and_hold_what_was_sent_last(address: str) -> None:
    with peered(address, **SMALL_POOL) as front:
        for seed in range(20):
            data = noise(10 * MIB, seed)
            tensor = data.to(CUDA)
            front.send({"do": "hold", "x": tensor})
            tensor.zero_()  # legal: it was sent
            answer = front.receive(timeout=WAIT).body
            assert (answer["device"], answer["digest"]) == ("cuda", digest(data))
        assert ways(front)["cuda"]["tensors"] >= 18


def test_what_does_not_fit_the_pool_goes_by_the_ring_and_is_counted(address: str) -> None:
    with peered(address, **SMALL_POOL) as front:
        data = noise(30 * MIB)
        answer = asked(front, data.to(CUDA))
        assert (answer["device"], answer["digest"]) == ("cpu", digest(data))
        assert ways(front)["detours"] == {"GPU pool full": {"messages": 1, "nbytes": 30 * MIB}}


def test_a_peer_without_the_device_gets_it_by_the_ring(address: str) -> None:
    with peered(address, cuda=False) as front:
        data = noise(8 * MIB)
        answer = asked(front, data.to(CUDA))
        assert (answer["device"], answer["digest"]) == ("cpu", digest(data))
        assert ways(front)["cuda"]["tensors"] == 0


def test_a_piece_is_held_until_the_receivers_copy_is_done(address: str) -> None:
    """Two processes, one of them stopped in the middle: the sender does not use the piece again meanwhile."""
    with peered(address, **SMALL_POOL) as front:
        data = noise(20 * MIB)
        assert asked(front, data.to(CUDA))["digest"] == digest(data)
        peer = front.peers[0].pid
        os.kill(peer, signal.SIGSTOP)
        front.send({"do": "look", "x": data.to(CUDA)})
        front.send({"do": "look", "x": torch.zeros(20 * MIB, dtype=torch.uint8, device=CUDA)})
        os.kill(peer, signal.SIGCONT)
        first, second = (front.receive(timeout=WAIT).body for _ in range(2))
        assert (first["device"], first["digest"]) == ("cuda", digest(data))
        assert second["digest"] == digest(torch.zeros(20 * MIB, dtype=torch.uint8))
        assert ways(front)["detours"] == {"GPU pool full": {"messages": 1, "nbytes": 20 * MIB}}


def test_a_peer_killed_with_a_piece_open_gives_it_back(address: str) -> None:
    torch.zeros(1, device=CUDA)
    with transport.listen(address, config=settings(**SMALL_POOL)) as front:
        for _ in range(2):
            with running(_answers, address, False, True):
                front.wait_for_peers({"peer"}, timeout=WAIT)
                data = noise(20 * MIB)
                assert asked(front, data.to(CUDA))["digest"] == digest(data)
                front.send({"do": "die", "x": data.to(CUDA)})
                until(lambda: not front.peers, "it is gone")
        assert ways(front)["cuda"]["tensors"] == 4
        assert ways(front)["detours"] == {}
