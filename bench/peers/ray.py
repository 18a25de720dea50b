"""Ray: each tensor is put into the object store and read in place by an actor in a worker process."""

from __future__ import annotations

import os
import queue
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray

from bench import ways
from bench.floor import TIMEOUT
from bench.harness import ROOT
from bench.links import Body
from bench.part import Report
from bench.peers.bodies import join, split, vector

STORE_BYTES = 4 << 30


class NearLink:
    """Puts the tensors, calls the actor with the references, and asks it for its answers."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def send(self, body: Body) -> None:
        """ray.put copies each tensor into the store; the call carries a list of references."""
        head, tensors = split(body)
        self._actor.push.remote(head, [ray.put(tensor.numpy()) for tensor in tensors])

    def receive(self) -> Body:
        """The actor's next answer."""
        return join(ray.get(self._actor.pull.remote(), timeout=TIMEOUT), [])

    def check_way(self) -> None:
        """There is one way only."""

    def close(self) -> None:
        """The actor goes with the cluster."""


class FarLink:
    """The actor's side of it."""

    def __init__(self) -> None:
        self.requests: queue.SimpleQueue[tuple[bytes, list[Any]]] = queue.SimpleQueue()
        self.answers: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def receive(self) -> Body:
        """Views into the store."""
        head, references = self.requests.get(timeout=TIMEOUT)
        arrays = ray.get(references, timeout=TIMEOUT) if references else []
        return join(head, [vector(array) for array in arrays])

    def send(self, body: Body) -> None:
        """Kept until it is asked for."""
        self.answers.put(split(body)[0])

    def check_way(self) -> None:
        """There is one way only."""


class Far:
    """The actor: `run` is the far end of the benchmark, `push` and `pull` are its link."""

    def __init__(self) -> None:
        self._link = FarLink()

    def run(self, ends: str, folder: Path, rest: Mapping[str, Any]) -> Report:
        """Until the benchmark is done."""
        return ways.far_of(ends, folder, self._link, rest)

    def push(self, head: bytes, references: list[Any]) -> None:
        """Take a message."""
        self._link.requests.put((head, references))

    def pull(self) -> bytes:
        """Give an answer."""
        return self._link.answers.get(timeout=TIMEOUT)


def _near_of(ends: str, folder: Path, actor: Any, done: Any, rest: Mapping[str, Any]) -> Report:
    """Run the near end; where it fails because the far end did, what is raised is what that raised."""
    try:
        return ways.near_of(ends, folder, NearLink(actor), rest)
    except Exception:
        ended, _ = ray.wait([done], timeout=0)
        ray.get(ended)
        raise


def run(folder: Path, way: str, ends: str, sizes: Mapping[str, int], rest: Mapping[str, Any]) -> Report:
    """Both ends, on a cluster of this machine that lives as long as they do."""
    # Nothing is reported to anybody, and workers find `bench`.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    ray.init(
        num_cpus=2,
        object_store_memory=STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        _temp_dir=str(folder / "ray"),
    )
    try:
        # One thread each for the benchmark, its messages and its answers.
        actor = ray.remote(Far).options(max_concurrency=3).remote()
        done = actor.run.remote(ends, folder, dict(rest))
        mine = _near_of(ends, folder, actor, done, rest)
        theirs: Report = ray.get(done, timeout=TIMEOUT)
    finally:
        ray.shutdown()
    return Report(
        values={**mine.values, **theirs.values},
        expected=mine.expected + theirs.expected,
        verified=mine.verified + theirs.verified,
    )
