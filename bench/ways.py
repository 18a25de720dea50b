"""Every way a body can take between two processes: tensorferry's, the baselines, and peers' own code.

A benchmark that compares them is two functions, ``near(folder, link, **arguments)`` and ``far``; `parts` and
`arguments` make a row of them. Where a peer's channel can only be inherited, the near end starts the far end
itself, the way that peer does it.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from bench.part import Json, Report


@dataclass(frozen=True, kw_only=True)
class Way:
    """Where a way is written and what it needs.

    `module` has ``open_near(folder, way, **sizes)`` and ``open_far``, or, when `started_by_near`,
    ``run(folder, way, ends, sizes, arguments)`` that runs both ends. `needs`: what must be importable.
    """

    module: str
    needs: str = ""
    started_by_near: bool = False


WAYS: Mapping[str, Way] = {
    "floor": Way(module="bench.peers.baselines"),
    "shm": Way(module="bench.peers.endpoints"),
    "loan": Way(module="bench.peers.endpoints"),
    "frames": Way(module="bench.peers.endpoints"),
    "inline": Way(module="bench.peers.endpoints"),
    "pickle": Way(module="bench.peers.baselines"),
    "zmq ipc": Way(module="bench.peers.baselines"),
    "zmq tcp": Way(module="bench.peers.baselines"),
    "segment": Way(module="bench.peers.segments"),
    "torch fd": Way(module="bench.peers.queues", started_by_near=True),
    "torch fs": Way(module="bench.peers.queues", started_by_near=True),
    "vllm rpc": Way(module="bench.peers.vllm", needs="vllm", started_by_near=True),
    "vllm torch_shm": Way(module="bench.peers.vllm", needs="vllm", started_by_near=True),
    "vllm shm store": Way(module="bench.peers.vllm", needs="vllm", started_by_near=True),
    "iceoryx2": Way(module="bench.peers.iceoryx2", needs="iceoryx2"),
    "iceoryx2 spin": Way(module="bench.peers.iceoryx2", needs="iceoryx2"),
    "ray": Way(module="bench.peers.ray", needs="ray", started_by_near=True),
    "zenoh": Way(module="bench.peers.zenoh", needs="zenoh"),
}

OURS = ("shm", "loan", "frames", "inline")
"""The ways that are tensorferry's."""


def lacking(way: str) -> str | None:
    """Why a way can't be measured here, or None."""
    needs = WAYS[way].needs
    if not needs or importlib.util.find_spec(needs) is not None:
        return None
    return f"{needs} is not installed: `make bench-peers`, then run with .venv-peers/bin/python"


def parts(way: str) -> Mapping[str, str]:
    """The parts of a row that takes this way."""
    if WAYS[way].started_by_near:
        return {"both": "bench.ways:both"}
    return {"near": "bench.ways:near", "far": "bench.ways:far"}


def arguments(way: str, ends: str, *, nbytes: int, count: int, **rest: Json) -> dict[str, Json]:
    """The arguments of a row: `ends` is a module with near and far, the sizes the largest to be sent."""
    return {"column": way, "ends": ends, "sizes": {"nbytes": nbytes, "count": count}, **rest}


def near(folder: Path, *, column: str, ends: str, sizes: Mapping[str, int], **rest: Any) -> Report:
    """The near end over a link of its own."""
    with contextlib.closing(_module(column).open_near(folder, column, **sizes)) as link:
        return near_of(ends, folder, link, rest)


def far(folder: Path, *, column: str, ends: str, sizes: Mapping[str, int], **rest: Any) -> Report:
    """The far end over a link of its own."""
    with contextlib.closing(_module(column).open_far(folder, column, **sizes)) as link:
        return far_of(ends, folder, link, rest)


def both(folder: Path, *, column: str, ends: str, sizes: Mapping[str, int], **rest: Any) -> Report:
    """Both ends, the far one started from here in the peer's own manner."""
    report: Report = _module(column).run(folder, column, ends, sizes, rest)
    return report


def near_of(ends: str, folder: Path, link: object, rest: Mapping[str, Any]) -> Report:
    """Run the near end of a benchmark over an open link."""
    report: Report = importlib.import_module(ends).near(folder, link, **rest)
    return report


def far_of(ends: str, folder: Path, link: object, rest: Mapping[str, Any]) -> Report:
    """Run the far end of a benchmark over an open link."""
    report: Report = importlib.import_module(ends).far(folder, link, **rest)
    return report


def _module(way: str) -> ModuleType:
    return importlib.import_module(WAYS[way].module)
