"""torch.multiprocessing queues: each tensor moves to a shared-memory file that the reader maps."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import torch.multiprocessing

from bench.floor import TIMEOUT
from bench.links import Body
from bench.part import Report
from bench.peers import spawned

STRATEGIES = {"torch fd": "file_descriptor", "torch fs": "file_system"}


class QueueLink:
    """Two queues, one for each direction."""

    def __init__(self, strategy: str, out: Queue[Body], into: Queue[Body]) -> None:
        torch.multiprocessing.set_sharing_strategy(strategy)  # type: ignore[no-untyped-call]
        self._out, self._into = out, into

    def send(self, body: Body) -> None:
        """Queue it; a thread of the queue moves the tensors and pickles it, after the caller cleared it."""
        self._out.put({key: list(v) if key == "tensors" else v for key, v in body.items()}, timeout=TIMEOUT)

    def receive(self) -> Body:
        """The next body."""
        return self._into.get(timeout=TIMEOUT)

    def check_way(self) -> None:
        """There is one way only."""

    def close(self) -> None:
        """Wait until what was queued is written."""
        self._out.close()
        self._out.join_thread()


def run(folder: Path, way: str, ends: str, sizes: Mapping[str, int], rest: Mapping[str, Any]) -> Report:
    """Both ends."""
    spawner = spawned.context()
    there: Queue[Body] = spawner.Queue()
    back: Queue[Body] = spawner.Queue()
    link = functools.partial(QueueLink, STRATEGIES[way])
    return spawned.run(
        spawner,
        folder,
        ends,
        rest,
        open_near=functools.partial(link, there, back),
        open_far=functools.partial(link, back, there),
    )
