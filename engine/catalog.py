"""What `--model` names: the built-in encoder, somebody's own class, or a folder; and what prepares images."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from engine.config import EngineConfig
from engine.loading import Patches, Processor
from engine.model import Model, ModelError, load_model


def choose_model(config: EngineConfig) -> Model:
    """The model of a configuration, not loaded.

    Raises:
        ModelError: there is no such model, or it can't do what was asked for.
    """
    folder = _folder(config)
    if folder is None:
        return load_model(config.model)
    from engine.huggingface import FolderModel

    return FolderModel(folder, generate=config.generate, max_tokens=config.max_tokens)


def choose_processor(config: EngineConfig) -> Processor:
    """What makes tensors of photographs for that model.

    Raises:
        ModelError: as `choose_model`.
    """
    folder = _folder(config)
    if folder is None:
        return Patches(megapixels=config.megapixels)
    from engine.huggingface import FolderProcessor

    return FolderProcessor(folder, megapixels=config.megapixels)


def _folder(config: EngineConfig) -> Path | None:
    """The folder that the model is in, or None where `--model` names no folder."""
    model, path = config.model, Path(config.model).expanduser()
    if model == "builtin" or (os.sep not in model and not path.is_dir()):
        if config.generate is not None:
            raise ModelError(f"--generate needs a model from a folder; {model!r} only makes embeddings")
        return None
    if not path.is_dir():
        raise ModelError(f"model {model!r}: there is no such folder")
    if not (path / "config.json").is_file():
        raise ModelError(f"model {model!r}: this folder has no config.json, so it holds no model")
    if find_spec("transformers") is None:
        raise ModelError(
            f"model {model!r}: a folder is read by transformers, which is not installed: pip install"
            " transformers (tensorferry's extra `huggingface`)"
        )
    return path.absolute()
