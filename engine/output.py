"""Writes results to files: JSON for people and scripts, safetensors or npz for the embeddings as tensors."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from engine.errors import OutputError
from engine.results import RankStatus, Result, Statistics

SUFFIXES = (".safetensors", ".npz")


def check_target(path: Path, *, suffixes: Sequence[str] = ()) -> None:
    """Raise `OutputError` now for what would fail after all the work."""
    try:
        _check_target(path, suffixes)
    except OSError as error:  # a folder on the way may not be entered
        raise OutputError(f"{path}: {error.strerror}") from error


def _check_target(path: Path, suffixes: Sequence[str]) -> None:
    if suffixes and path.suffix not in suffixes:
        raise OutputError(f"{path}: its name must end in {' or '.join(suffixes)}, which chooses the format")
    if path.is_dir():
        raise OutputError(f"{path} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise OutputError(f"{path}: there is no folder {path.parent}")
    if _is_special(path):
        if not os.access(path, os.W_OK):
            raise OutputError(f"{path} is not writable")
    elif not os.access(path.resolve().parent, os.W_OK):
        raise OutputError(f"{path}: the folder {path.resolve().parent} is not writable")


def write_json(
    path: Path,
    results: Sequence[Result],
    *,
    config: Mapping[str, Any],
    statistics: Statistics,
    ranks: Sequence[RankStatus],
    error: str = "",
) -> None:
    """Write results, figures, ranks and configuration; embeddings as lists of numbers."""
    document = {
        "error": error,
        "results": [_as_json(result) for result in results],
        "statistics": asdict(statistics) | {"images_per_second": statistics.images_per_second},
        "ranks": [asdict(rank) for rank in ranks],
        "config": dict(config),
    }
    text = json.dumps(document, indent=2, allow_nan=False) + "\n"
    _replace(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _as_json(result: Result) -> dict[str, Any]:
    return {
        "index": result.index,
        "file": result.name,
        "grid_thw": result.grid and list(result.grid),
        "shape": result.shape and list(result.shape),
        "bytes": result.nbytes,
        "seconds": result.seconds,
        "rank": result.rank,
        "error": result.error,
        "norm": None if result.norm is None else _finite(result.norm),
        "text": result.text,
        "embedding": None if result.embedding is None else _numbers(result.embedding),
    }


def _numbers(embedding: torch.Tensor) -> list[float | None]:
    numbers: list[float | None] = embedding.tolist()
    return numbers if embedding.isfinite().all() else list(map(_finite, embedding.tolist()))


def _finite(number: float) -> float | None:
    """The number; None for those that JSON has no word for."""
    return number if math.isfinite(number) else None


def write_tensors(path: Path, results: Sequence[Result]) -> None:
    """Write the embeddings of the images that have one, in order, as safetensors or npz by the suffix.

    `embeddings` float32 `[n, dim]`, `index` int64 `[n]` (the place in the input), `grid_thw` int64 `[n, 3]`;
    the names of the images are the text array `names` in npz, a JSON list in the metadata in safetensors,
    and so are the `texts` of a model that wrote some.
    """
    good = [result for result in results if result.embedding is not None]
    embeddings = [result.embedding for result in good if result.embedding is not None]
    grids = [result.grid for result in good if result.grid is not None]
    for result, embedding in zip(good, embeddings, strict=True):
        if embedding.shape != embeddings[0].shape:
            raise OutputError(
                f"{path} can't be written: the embedding of {result.name} has {embedding.numel()} numbers,"
                f" that of {good[0].name} {embeddings[0].numel()}; --json takes both"
            )
    tensors = {
        "embeddings": torch.stack(embeddings).float() if embeddings else torch.empty(0, 0),
        "index": torch.tensor([result.index for result in good], dtype=torch.int64),
        "grid_thw": torch.tensor(grids, dtype=torch.int64).view(-1, 3),
    }
    words = {"names": [result.name for result in good]}
    if any(result.text for result in good):
        words["texts"] = [result.text for result in good]
    if path.suffix == ".npz":
        arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
        arrays |= {name: np.array(texts, dtype=str) for name, texts in words.items()}
        _replace(path, lambda temporary: np.savez(temporary, **arrays))
    else:
        metadata = {name: json.dumps(texts) for name, texts in words.items()}
        _replace(path, lambda temporary: save_file(tensors, temporary, metadata))


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside the file and take its place at once: nobody ever sees half of it.

    What a symbolic link points to is replaced, not the link; into a device or a pipe it is written.
    """
    try:
        if _is_special(path):
            write(path)
        else:
            _write_beside(path.resolve(), write)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{path} can't be written: {getattr(error, 'strerror', None) or error}") from error


def _write_beside(path: Path, write: Callable[[Path], object]) -> None:
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp is stricter than what a new file usually is
        temporary.replace(path)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def _is_special(path: Path) -> bool:
    """Whether something is there that is no file and must not be replaced by one: /dev/null, a pipe."""
    return path.exists() and not path.is_file()
