"""The engine with its model on a GPU."""

from __future__ import annotations

import pytest
import torch

from engine import Engine, EngineConfig
from tests.engine.pictures import picture

pytestmark = pytest.mark.gpu


def embeddings(device: str, images: int) -> torch.Tensor:
    """Of some pictures, by the built-in model: [images, dim]."""
    # One ring serves several prompts, so that its memory is used again.
    config = EngineConfig(device=device, images_per_prompt=3, shm_ring_gb=0.02, inline_below_kb=1)  # type: ignore[arg-type]
    with Engine(config) as engine:
        assert engine.peers[0].device.startswith(device)
        results = list(engine.encode([picture(number, 280, 280) for number in range(images)]))
        assert engine.statistics().detours == {}
    assert not any(result.error for result in results)
    return torch.stack([result.embedding for result in results if result.embedding is not None])


def test_embeddings_are_those_of_the_cpu() -> None:
    torch.testing.assert_close(embeddings("cuda", 20), embeddings("cpu", 20), atol=2e-3, rtol=0)
