"""Small photographs for the engine's tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from engine.images import grid_for, write_patches
from tests.engine.models import checksum


def picture(number: int, width: int = 84, height: int = 56) -> Image.Image:
    """Noise, another one for each number."""
    generator = np.random.default_rng(number)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def save(folder: Path, count: int, width: int = 84, height: int = 56) -> list[Path]:
    """That many files, `0.png` and on, in a folder that is there."""
    paths = [folder / f"{number}.png" for number in range(count)]
    for number, path in enumerate(paths):
        picture(number, width, height).save(path)
    return paths


def expected(image: Image.Image, *, megapixels: float | None = None) -> torch.Tensor:
    """What the model `Checksum` makes of a photograph."""
    grid = grid_for(*image.size, megapixels=megapixels)
    patches = torch.empty(grid.shape)
    write_patches(image, grid, patches)
    return torch.tensor(checksum(patches))
