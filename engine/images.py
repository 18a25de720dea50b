"""Photographs become patches in the shape Qwen2-VL takes, written straight into the tensor that will be sent.

A photograph of `grid.h` × `grid.w` patches is a float32 tensor `[grid.h * grid.w, 1176]`. Its rows follow the
model's 2×2 merge blocks: all four patches of a block (row by row), then the next block to the right. A row
holds channel (3) × time (2) × height (14) × width (14); a single photograph fills both points of time with
itself.

Technique: dynamic resolution and merge blocks as in Wang et al., "Qwen2-VL" (arXiv 2409.12191), section 2.1;
the normalisation is that of CLIP (Radford et al., arXiv 2103.00020).
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

PATCH: Final = 14
MERGE: Final = 2
TEMPORAL: Final = 2
CHANNELS: Final = 3
ROW: Final = CHANNELS * TEMPORAL * PATCH * PATCH
BLOCK: Final = PATCH * MERGE

MIN_PIXELS: Final = 4 * BLOCK * BLOCK
# The published checkpoints allow 16,384 blocks, 310 MB for one photograph, and the processor's own default of
# 1,280 shrinks one of 1 megapixel. Twice that default lets 1 and 2 megapixels pass and turns 12 into 48 MB.
MAX_PIXELS: Final = 2 * 1280 * BLOCK * BLOCK
MAX_ASPECT_RATIO: Final = 200
# Pillow's own threshold for suspecting a decompression bomb: a small file may decode to 350 MB.
MAX_SOURCE_PIXELS: Final = 89_478_485

SUFFIXES: Final = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
SAMPLES: Final = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "hubble_deep_field.jpg",
    "motorcycle_left.png",
    "motorcycle_right.png",
    "retina.jpg",
    "rocket.jpg",
)

MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
STD = np.array([0.26862954, 0.26130258, 0.27577711])
# (value / 255 - mean) / std as one multiplication and one subtraction for each channel.
_SCALE = (1 / (255 * STD)).astype(np.float32)
_SHIFT = (MEAN / STD).astype(np.float32)


class ImageError(Exception):
    """A photograph, or the place where one should be, can't be used; the message names it and says why."""


class Grid(NamedTuple):
    """How many patches a photograph has in time, height and width (Qwen2-VL's `image_grid_thw`)."""

    t: int
    h: int
    w: int

    @property
    def patches(self) -> int:
        return self.t * self.h * self.w

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the patches tensor: `(patches, 1176)`."""
        return self.patches, ROW

    @property
    def nbytes(self) -> int:
        """Bytes of the patches tensor in float32."""
        return self.patches * ROW * 4

    @property
    def size(self) -> tuple[int, int]:
        """`(width, height)` in pixels of the photograph that fills the grid, in Pillow's order."""
        return self.w * PATCH, self.h * PATCH


def find(paths: Sequence[str | Path]) -> list[Path]:
    """List the photographs that files and folders stand for, in the order given, each folder sorted.

    A file counts whatever its suffix. A folder is searched with all below it for the suffixes in `SUFFIXES`;
    names that begin with a dot are passed over. Without any path the answer is `sample_photographs()`.

    Raises:
        ImageError: a path doesn't exist or can't be looked at, or a folder holds no photograph.
    """
    if not paths:
        return sample_photographs()
    return [photograph for path in paths for photograph in _resolve(Path(path))]


def _resolve(path: Path) -> list[Path]:
    try:
        if path.is_dir():
            return _in_folder(path)
        if path.exists():
            return [path]
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror}") from error
    raise ImageError(f"{path}: no such file or folder")


def _in_folder(folder: Path) -> list[Path]:
    os.listdir(folder)  # raises for one that may not be read, in which `rglob` finds nothing
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES
        # Desktops keep thumbnails and "._name.jpg" companions in hidden files; nobody means those.
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    )
    if not files:
        raise ImageError(f"{folder}: no images in this folder (looked for {', '.join(sorted(SUFFIXES))})")
    return files


def sample_photographs() -> list[Path]:
    """List the colour photographs that are files of the installed scikit-image wheel; nothing is downloaded.

    Raises:
        ImageError: scikit-image isn't installed, or came without them.
    """
    remedy = (
        "name image files or folders, or run: pip install scikit-image (tensorferry's extra `photographs`)"
    )
    # Looking the package up doesn't import it; its folder is all that is wanted.
    spec = find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise ImageError(
            f"no images given, and scikit-image with its sample photographs isn't installed; {remedy}"
        )
    folder = Path(spec.submodule_search_locations[0]) / "data"
    photographs = [folder / name for name in SAMPLES if (folder / name).is_file()]
    if not photographs:
        raise ImageError(f"no images given, and none of the sample photographs is in {folder}; {remedy}")
    return photographs


def open_image(path: str | Path) -> Image.Image:
    """Read a photograph whole, upright (EXIF orientation applied) and in RGB, 8 bits a channel.

    Raises:
        ImageError: the file is missing, empty, broken, truncated, no image, or above `MAX_SOURCE_PIXELS`.
    """
    path = Path(path)
    try:
        # Opening a pipe or a device could wait for ever.
        if not path.is_file():
            raise ImageError("no such file" if not path.exists() else "not a regular file")
        if path.stat().st_size == 0:
            raise ImageError("the file is empty")
        with Image.open(path) as image:
            return upright(image)
    except UnidentifiedImageError as error:
        raise ImageError(f"{path}: not a readable image: no image format known here") from error
    # Pillow's decoders answer a damaged file with nearly any exception, from SyntaxError to MemoryError.
    except Exception as error:
        raise ImageError(f"{path}: not a readable image: {str(error) or type(error).__name__}") from error


def upright(image: Image.Image) -> Image.Image:
    """A photograph that is open already: upright (EXIF orientation applied) and in RGB, 8 bits a channel.

    Raises:
        ImageError: it has no pixels, more than `MAX_SOURCE_PIXELS`, or 32-bit greys.
        Exception: whatever Pillow's decoders raise for damaged data, when it was not decoded before.
    """
    _check_size(*image.size)
    return _to_rgb(ImageOps.exif_transpose(image))


def _check_size(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise ImageError(f"it has no pixels ({width} x {height})")
    if width * height > MAX_SOURCE_PIXELS:
        raise ImageError(
            f"{width} x {height} pixels are more than the {MAX_SOURCE_PIXELS} allowed; scale it down first"
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        # Pillow clips 16-bit greys at 255, which would turn nearly every such photograph white.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ImageError("32-bit greys have no fixed range; save it with 8 or 16 bits a channel")
    return image if image.mode == "RGB" else image.convert("RGB")


def grid_for(
    width: int,
    height: int,
    *,
    min_pixels: int = MIN_PIXELS,
    max_pixels: int = MAX_PIXELS,
    megapixels: float | None = None,
) -> Grid:
    """Choose the grid of a photograph: sides in multiples of 28 pixels near its own aspect ratio.

    The photograph keeps its resolution while the rounded area lies within `min_pixels` and `max_pixels`, as
    Qwen2-VL does. `megapixels` replaces both limits: the photograph is scaled to about that many million
    pixels, 24 MB of patches each. No side gets shorter than 28 pixels, even if that takes more than
    `max_pixels`.

    Raises:
        ImageError: one side is more than 200 times the other.
        ValueError: a side or a limit makes no sense.
    """
    if width < 1 or height < 1:
        raise ValueError(f"a photograph has at least one pixel, not {width} x {height}")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ImageError(f"{width} x {height} pixels: one side is over {MAX_ASPECT_RATIO} times the other")
    if megapixels is None:
        w, h = _within(width, height, min_pixels, max_pixels)
    elif math.isfinite(megapixels) and megapixels > 0:
        scale = math.sqrt(megapixels * 1e6 / (width * height))
        w, h = (max(1, round(side * scale / BLOCK)) for side in (width, height))
    else:
        raise ValueError(f"megapixels must be a positive number, not {megapixels}")
    return Grid(1, h * MERGE, w * MERGE)


def _within(width: int, height: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Return width and height in blocks of 28 pixels."""
    if not 0 < min_pixels <= max_pixels:
        raise ValueError(f"min_pixels {min_pixels} must be positive and not above max_pixels {max_pixels}")
    w, h = (max(1, round(side / BLOCK)) for side in (width, height))
    area = w * h * BLOCK * BLOCK
    if area > max_pixels:
        shrink = math.sqrt(width * height / max_pixels)
        w, h = (max(1, math.floor(side / shrink / BLOCK)) for side in (width, height))
    elif area < min_pixels:
        grow = math.sqrt(min_pixels / (width * height))
        w, h = (math.ceil(side * grow / BLOCK) for side in (width, height))
    return w, h


def write_patches(image: Image.Image, grid: Grid, out: torch.Tensor) -> None:
    """Resize a photograph to `grid` (bicubic), normalise it and write its patches into `out`.

    `out` is float32 `[grid.patches, 1176]`, contiguous, on the CPU; it may lie in shared memory. It is
    written once and never read. Beside it only the resized photograph in 8 bits and one band of 28 pixel rows
    in float32 are held.

    Raises:
        ValueError: `out` isn't such a tensor, the grid not one frame of whole blocks, or the image not RGB.
    """
    _check_target(image, grid, out)
    resized = image if image.size == grid.size else image.resize(grid.size, Image.Resampling.BICUBIC)
    width, height = grid.size
    # row of blocks, block, patch row, patch column, channel, time, y, x
    target = out.numpy().reshape(
        grid.h // MERGE, grid.w // MERGE, MERGE, MERGE, CHANNELS, TEMPORAL, PATCH, PATCH
    )
    for top, blocks in zip(range(0, height, BLOCK), target, strict=True):
        band = _normalised(resized.crop((0, top, width, top + BLOCK)))
        # patch row, y, block, patch column, x, channel
        patches = band.reshape(MERGE, PATCH, grid.w // MERGE, MERGE, PATCH, CHANNELS)
        blocks[...] = patches.transpose(2, 0, 3, 5, 1, 4)[:, :, :, :, np.newaxis]


def _normalised(band: Image.Image) -> npt.NDArray[np.float32]:
    pixels: npt.NDArray[np.float32] = np.multiply(np.asarray(band), _SCALE, dtype=np.float32)
    pixels -= _SHIFT
    return pixels


def _check_target(image: Image.Image, grid: Grid, out: torch.Tensor) -> None:
    if image.mode != "RGB":
        raise ValueError(f"the image must be RGB, not {image.mode}; open_image() gives such a one")
    if grid.t != 1 or grid.h < 1 or grid.w < 1 or grid.h % MERGE or grid.w % MERGE:
        raise ValueError(f"{grid} is not one frame of whole 2x2 merge blocks; grid_for() gives such a one")
    suitable = out.dtype == torch.float32 and out.device.type == "cpu" and out.is_contiguous()
    if tuple(out.shape) != grid.shape or not suitable:
        raise ValueError(
            f"out must be a contiguous float32 tensor {list(grid.shape)} on the CPU, "
            f"not {out.dtype} {list(out.shape)} with strides {list(out.stride())} on {out.device}"
        )
