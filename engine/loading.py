"""Photographs from files or from memory, decoded and prepared ahead of their use by a few threads."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, islice
from pathlib import Path
from typing import Protocol, TypeAlias

import torch
from PIL import Image

from engine.images import (
    MAX_PIXELS,
    MIN_PIXELS,
    Grid,
    ImageError,
    grid_for,
    open_image,
    upright,
    write_patches,
)

Source: TypeAlias = str | Path | Image.Image


@dataclass(frozen=True, eq=False)
class Prepared:
    """An image that is ready to be written into a float32 tensor of `shape`, more than once if need be.

    grid: its patches in time, height and width, where it has such. more: from a processor of the model's
    own, small tensors that go with it, by the name under which the model takes them. in_place: `write` makes
    it there; else it copies what lies in memory already.
    """

    shape: tuple[int, ...]
    write: Callable[[torch.Tensor], None]
    grid: Grid | None = None
    more: Mapping[str, torch.Tensor] | None = None
    in_place: bool = True

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return 4 * self.numbers


class Processor(Protocol):
    """What stands before a model: it decides what becomes of a photograph. Several threads use it."""

    def prepare(self, image: Image.Image) -> Prepared:
        """Prepare an image that is upright and in RGB; whatever it raises fails that image."""


class Patches:
    """Patches as `engine.images` makes them, which the built-in encoder takes."""

    def __init__(
        self, *, megapixels: float | None, min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS
    ) -> None:
        self._choose = partial(grid_for, megapixels=megapixels, min_pixels=min_pixels, max_pixels=max_pixels)

    def prepare(self, image: Image.Image) -> Prepared:
        """Resize to a grid: what waits is then a few megabytes, however large the photograph is."""
        grid = self._choose(*image.size)
        resized = image.resize(grid.size, Image.Resampling.BICUBIC)
        return Prepared(grid.shape, partial(write_patches, resized, grid), grid)


@dataclass(frozen=True, eq=False)
class Photograph:
    """One image of the input: prepared, or the reason why it can't be used."""

    index: int
    name: str
    prepared: Prepared | None = None
    error: str = ""


class Loader:
    """A few threads that prepare photographs and write them; Pillow and numpy let go of the GIL in both."""

    def __init__(self, processor: Processor, *, ahead: int) -> None:
        self._processor = processor
        self._ahead = ahead
        # As many as help without taking every core from the ranks of this host.
        threads = max(1, min(4, len(os.sched_getaffinity(0)) // 2))
        self._decoding = ThreadPoolExecutor(threads, thread_name_prefix="tensorferry-decode")
        # Apart, so that what is about to be sent doesn't queue behind what is decoded ahead.
        self._writing = ThreadPoolExecutor(threads, thread_name_prefix="tensorferry-patches")

    def load(self, sources: Iterable[Source]) -> Iterator[Photograph]:
        """Decode in order, `ahead` photographs before they are asked for. One that fails says so in `error`.

        Sources are taken one by one, so that they may come from an endless generator.
        """
        numbered = enumerate(sources)
        coming: deque[Future[Photograph]] = deque()
        try:
            while True:
                for index, source in islice(numbered, self._ahead - len(coming)):
                    coming.append(self._decoding.submit(self._load_one, index, source))
                if not coming:
                    return
                yield coming.popleft().result()
        finally:
            for future in coming:
                future.cancel()

    def write(self, photographs: list[Photograph], out: torch.Tensor) -> list[torch.Tensor]:
        """Write all, one after the other, into `out` `[numbers of all]`; its parts, in their shapes."""
        images = [photograph.prepared for photograph in photographs if photograph.prepared is not None]
        ends = accumulate(image.numbers for image in images)
        parts = [
            out[end - image.numbers : end].view(image.shape) for end, image in zip(ends, images, strict=True)
        ]
        running = [self._writing.submit(image.write, part) for image, part in zip(images, parts, strict=True)]
        wait(running)  # all of them, even if one failed: nobody may still be writing into `out`
        for future in running:
            future.result()
        return parts

    def close(self) -> None:
        """Wait for what is being decoded, and end the threads."""
        self._decoding.shutdown(cancel_futures=True)
        self._writing.shutdown(cancel_futures=True)

    def _load_one(self, index: int, source: Source) -> Photograph:
        name = _name(index, source)
        try:
            image = upright(source) if isinstance(source, Image.Image) else open_image(source)
            return Photograph(index, name, self._processor.prepare(image))
        # An image of the caller's own may be a file that is only decoded now, and fail in any way.
        except Exception as error:  # noqa: BLE001
            return Photograph(index, name, error=_reason(name, error))


def _name(index: int, source: Source) -> str:
    if not isinstance(source, Image.Image):
        return str(source)
    return str(getattr(source, "filename", "")) or f"image {index}"


def _reason(name: str, error: Exception) -> str:
    if isinstance(error, ImageError):
        return str(error) if str(error).startswith(f"{name}: ") else f"{name}: {error}"
    return f"{name}: not a readable image: {str(error) or type(error).__name__}"
