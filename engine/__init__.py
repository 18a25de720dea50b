"""The engine: images in, embeddings out, over worker processes.

from engine import Engine, EngineConfig

with Engine(EngineConfig(data_parallel_size=2)) as engine:
    for result in engine.encode(["a.jpg", "b.jpg"]):
        print(result.name, result.embedding)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.client import Engine
    from engine.config import EngineConfig
    from engine.errors import EngineError, NoRankLeft, OutputError, StartError
    from engine.headless import Headless
    from engine.options import ConfigError
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
    """Import what is asked for: torch takes seconds, which `--help` doesn't need, and vLLM's processes, which
    have the plugin from this package, shall not carry the command line as well.
    """
    if name == "Engine":
        from engine.client import Engine

        return Engine
    if name == "EngineConfig":
        from engine.config import EngineConfig

        return EngineConfig
    if name == "Headless":
        from engine.headless import Headless

        return Headless
    if name == "ConfigError":
        from engine.options import ConfigError

        return ConfigError
    if name in ("EngineError", "NoRankLeft", "OutputError", "StartError"):
        from engine import errors

        return getattr(errors, name)
    if name in ("RankStatus", "Result", "Statistics"):
        from engine import results

        return getattr(results, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
