"""Writes results to files: JSON for people and scripts, safetensors or npz for the embeddings as tensors."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from engine.errors import OutputError
from engine.results import RankStatus, Result, Statistics

SUFFIXES = (".safetensors", ".npz")


def check_target(path: Path, *, suffixes: Sequence[str] = ()) -> None:
    """Raise `OutputError` now for what would fail after all the work."""
    if suffixes and path.suffix not in suffixes:
        raise OutputError(f"{path}: its name must end in {' or '.join(suffixes)}, which chooses the format")
    if path.is_dir():
        raise OutputError(f"{path} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise OutputError(f"{path}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise OutputError(f"{path}: the folder {path.parent} is not writable")


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
    text = json.dumps(document, indent=2, allow_nan=True) + "\n"
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
        "norm": result.norm,
        "text": result.text,
        "embedding": None if result.embedding is None else result.embedding.tolist(),
    }


def write_tensors(path: Path, results: Sequence[Result]) -> None:
    """Write the embeddings of the images that have one, in order, as safetensors or npz by the suffix.

    `embeddings` float32 `[n, dim]`, `index` int64 `[n]` (the place in the input), `grid_thw` int64 `[n, 3]`;
    the names of the images are the text array `names` in npz, a JSON list in the metadata in safetensors,
    and so are the `texts` of a model that wrote some.
    """
    good = [result for result in results if result.embedding is not None]
    embeddings = [result.embedding for result in good if result.embedding is not None]
    grids = [result.grid for result in good if result.grid is not None]
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


def _replace(path: Path, write: Any) -> None:
    """Write beside the file and take its place at once: nobody ever sees half of it."""
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp is stricter than what a new file usually is
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"{path} can't be written: {error.strerror or error}") from error
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()
