"""Photographs from files or from memory, decoded and resized ahead of their use by a few threads."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, islice
from pathlib import Path
from typing import TypeAlias

import torch
from PIL import Image

from engine.images import Grid, ImageError, grid_for, open_image, upright, write_patches

Source: TypeAlias = str | Path | Image.Image


@dataclass(frozen=True, eq=False)
class Photograph:
    """One image of the input: resized to fit `grid`, or the reason why it can't be used."""

    index: int
    name: str
    image: Image.Image | None = None
    grid: Grid | None = None
    error: str = ""


class Loader:
    """A few threads that decode photographs and write patches; Pillow and numpy let go of the GIL in both."""

    def __init__(self, *, megapixels: float | None, ahead: int) -> None:
        self._megapixels = megapixels
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
        """Write the patches of all, one after the other, into `out` `[patches of all, 1176]`; its parts."""
        images = [(p.image, p.grid) for p in photographs if p.image is not None and p.grid is not None]
        ends = list(accumulate(grid.patches for _, grid in images))
        parts = [out[end - grid.patches : end] for end, (_, grid) in zip(ends, images, strict=True)]
        running = [
            self._writing.submit(partial(write_patches, image, grid, part))
            for (image, grid), part in zip(images, parts, strict=True)
        ]
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
            grid = grid_for(*image.size, megapixels=self._megapixels)
        # An image of the caller's own may be a file that is only decoded now, and fail in any way.
        except Exception as error:  # noqa: BLE001
            return Photograph(index, name, error=_reason(name, error))
        # Resized here, what waits is a few megabytes each, however large the photographs are.
        return Photograph(index, name, image.resize(grid.size, Image.Resampling.BICUBIC), grid)


def _name(index: int, source: Source) -> str:
    if not isinstance(source, Image.Image):
        return str(source)
    return str(getattr(source, "filename", "")) or f"image {index}"


def _reason(name: str, error: Exception) -> str:
    if isinstance(error, ImageError):
        return str(error) if str(error).startswith(f"{name}: ") else f"{name}: {error}"
    return f"{name}: not a readable image: {str(error) or type(error).__name__}"
