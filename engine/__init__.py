"""The engine: images in, embeddings out, over worker processes.

from engine import Engine, EngineConfig

with Engine(EngineConfig(data_parallel_size=2)) as engine:
    for result in engine.encode(["a.jpg", "b.jpg"]):
        print(result.name, result.embedding)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from engine.config import EngineConfig
from engine.errors import EngineError, NoRankLeft, OutputError, StartError
from engine.options import ConfigError

if TYPE_CHECKING:
    from engine.client import Engine
    from engine.headless import Headless
    from engine.results import RankStatus, Result, Statistics

__all__ = [
    "ConfigError",
    "Engine",
    "EngineConfig",
    "EngineError",
    "Headless",
    "NoRankLeft",
    "OutputError",
    "RankStatus",
    "Result",
    "StartError",
    "Statistics",
]


def __getattr__(name: str) -> Any:
    """Import what needs torch, which takes seconds, only for those who use it: `--help` doesn't."""
    if name == "Engine":
        from engine.client import Engine

        return Engine
    if name == "Headless":
        from engine.headless import Headless

        return Headless
    if name in ("RankStatus", "Result", "Statistics"):
        from engine import results

        return getattr(results, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
