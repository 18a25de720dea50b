"""Staging without a device: the same path, copies at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import transport
from engine.staging import Stager, choose_device, staged
from transport.conformance import WAIT, acknowledged, joined, noise


def test_tensors_are_copied_out_of_the_ring_as_they_come(address: str) -> None:
    config = transport.TransportConfig(ring_bytes=8 << 20, cut_through=True, timeout=WAIT)
    stager = Stager(torch.device("cpu"))
    with (
        transport.listen(address, config=config) as front,
        joined(front, "near", config) as near,
        ThreadPoolExecutor(1) as pool,
    ):
        for nbytes in (100, 2 << 20, 20 << 20):  # inline, through the ring, in parts
            sending = pool.submit(front.send, {"x": noise(nbytes), "n": nbytes})
            message = near.receive(stage=stager)
            sending.result(WAIT)
            copies = staged(message)
            assert copies is not None
            copies.wait()
            copies.synchronize()
            tensor = message.body["x"]
            del message
            near.try_receive()
            acknowledged(front)
            ring = front.statistics()["backend"]["shm"].get("ring")
            assert ring is None or ring.live == 0  # nothing of the sender's is held, while the tensor lives
            assert tensor.equal(noise(nbytes))
            tensor += 1  # it is this process's own


def test_without_a_stage_there_is_nothing_staged(address: str) -> None:
    config = transport.TransportConfig(timeout=WAIT)
    with transport.listen(address, config=config) as front, joined(front, "near", config) as near:
        front.send({"x": noise(100)})
        assert staged(near.receive()) is None


def test_cuda_where_there_is_none_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="finds no GPU; use auto or cpu"):
        choose_device("cuda")
