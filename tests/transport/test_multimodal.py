"""Multimodal keyword arguments in the shapes vLLM builds, through two real processes and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import transport
from transport.conformance import WAIT, noise, same, serving


def keyword_arguments() -> dict[str, Any]:
    pixels = noise(59 * 59 * 1176 * 4).view(torch.float32).view(-1, 1176)
    return {
        "image": {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 59, 59]])},
        "ragged": [torch.randn(3, n, generator=torch.Generator().manual_seed(n)) for n in (336, 200, 7)],
        "nested": [[noise(50).view(5, 10), noise(60)], [], [noise(7)]],
        "video": {"second_per_grid_ts": [1.0], "grids": torch.tensor([[2, 4, 6]]), "fps": 2.5, "none": None},
        "embeddings": torch.ones(9, 64, dtype=torch.bfloat16),
        "mask": torch.tensor([True, False, True]),
        "positions": [[0, 5], [7, 2]],
        "hashes": ["a1", "b2"],
        "audio": (np.arange(16_000, dtype=np.float32), 16_000),
    }


def compare(one: Any, other: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            compare(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert isinstance(other, list)
        assert len(one) == len(other)
        for mine, theirs in zip(one, other, strict=True):
            compare(mine, theirs)
    elif isinstance(one, torch.Tensor | np.ndarray):
        assert same(one, other)
    else:
        assert (type(one), one) == (type(other), other)


@pytest.mark.parametrize("backend", ["auto", "frames"])
def test_they_go_to_another_process_and_come_back_as_they_were(address: str, backend: str) -> None:
    options: dict[str, Any] = {
        "backend": backend,
        "ring_bytes": 128 << 20,
        "timeout": WAIT,
        "admission_timeout": WAIT,
    }
    sent = keyword_arguments()
    with (
        transport.listen(address, config=transport.TransportConfig(**options)) as front,
        serving(front, "peer", options),
    ):
        for _ in range(2):
            front.send({"do": "echo", "value": sent}, to="peer")
            message = front.receive()
            compare(sent, message.body["value"])
        if backend == "auto":
            counts = front.statistics()
            assert counts["received"]["bytes shm"] == 2 * sent["image"]["pixel_values"].nbytes
            assert counts["backend"]["detours"] == {}
        del message
