"""A vLLM whose inside is not what is known: a general plugin, loaded before tensorferry's, renames a part.

RENAMED says which: `module:attribute` or `module:Class.method`. vLLM itself finds the method by its old name.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

_ENGINES = ("vllm.engine.arg_utils", "vllm.v1.engine.core")  # a process with neither only looks at models
_USERS = ("vllm.v1.engine.core", "vllm.v1.engine.core_client")  # they import by name what is renamed


def register() -> None:
    """Called in every process of vLLM."""
    if not any(name in sys.modules for name in _ENGINES):
        return
    for user in _USERS:
        importlib.import_module(user)
    module, _, path = os.environ["RENAMED"].partition(":")
    owner: Any = importlib.import_module(module)
    *classes, name = path.split(".")
    for inner in classes:
        owner = getattr(owner, inner)
    if name not in vars(owner):  # was renamed before
        return
    setattr(owner, f"{name}_2", getattr(owner, name))
    delattr(owner, name)
    if classes:
        owner.__getattr__ = lambda self, asked: _found(self, asked, name)


def _found(self: Any, asked: str, name: str) -> Any:
    if asked != name:
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {asked!r}")
    return getattr(self, f"{name}_2")
