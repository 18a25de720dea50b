"""What the engine tells: one `Result` for each image, the state of each rank, and the figures of a run."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from engine.images import Grid


@dataclass(frozen=True, eq=False)
class Result:
    """What became of one image.

    index: its place in the input, from 0. embedding: float32 `[dim]`, in memory of its own; None when
    `error` says why there is none. shape: of the tensor that was sent, `(patches, 1176)` of the built-in
    encoder; nbytes: its size. seconds: from sending the request that it was part of until the answer. rank:
    who answered, or was asked last. text: what a model wrote that was asked to.
    """

    index: int
    name: str
    grid: Grid | None = None
    shape: tuple[int, ...] | None = None
    nbytes: int = 0
    embedding: torch.Tensor | None = None
    seconds: float = 0.0
    rank: str = ""
    error: str = ""
    text: str = ""

    @property
    def norm(self) -> float | None:
        """Euclidean length of the embedding."""
        return None if self.embedding is None else float(torch.linalg.vector_norm(self.embedding.float()))


class InOrder:
    """Results as they come, handed out in the order of the input."""

    def __init__(self) -> None:
        self.expected = 0  # how many were asked for
        self.following = 0  # the place of the next to be handed out
        self._waiting: dict[int, Result] = {}

    def put(self, result: Result) -> None:
        self._waiting[result.index] = result

    def lacks(self, index: int) -> bool:
        """Whether the result of that place did not come."""
        return index >= self.following and index not in self._waiting

    def take(self) -> Iterator[Result]:
        """Those whose turn it is."""
        while self.following in self._waiting:
            result = self._waiting.pop(self.following)
            self.following += 1
            yield result


@dataclass(frozen=True)
class WorkerStatus:
    """One process of a rank. backend: how tensors reach it, and why so; "" when it is gone."""

    name: str
    pid: int
    host: str
    address: str
    device: str
    backend: str


@dataclass(frozen=True)
class RankStatus:
    """One rank, its first worker being the one that answers. error: why it is gone, "" while it lives."""

    name: str
    workers: tuple[WorkerStatus, ...]
    requests: int
    outstanding: int
    error: str = ""

    @property
    def pid(self) -> int:
        return self.workers[0].pid

    @property
    def host(self) -> str:
        return self.workers[0].host

    @property
    def address(self) -> str:
        return self.workers[0].address

    @property
    def device(self) -> str:
        return self.workers[0].device

    @property
    def backend(self) -> str:
        return self.workers[0].backend


@dataclass(frozen=True)
class Statistics:
    """Figures of an engine since it started.

    requests: answered ones. late: answers that came when the request had gone to another rank or was given
    up, and were dropped. images: with an embedding. image_bytes: of the patches that were made.
    bytes_by_backend: of tensors sent, by the way they took. copies: how often the front end wrote each byte
    of them, 1.0 where patches are made in the ring; None before the first. detours: by reason, how many
    messages and bytes did not go the way they should have. seconds: spent in `encode`. hop_p50, hop_p99:
    seconds from the send call of the front end until the tensors are open in the rank, over the last 10,000
    requests; None before the first. ring_bytes: 0 where there is no ring. ring_peak: the highest byte ever
    used in it.
    """

    requests: int
    late: int
    images: int
    failed: int
    image_bytes: int
    bytes_by_backend: dict[str, int]
    copies: float | None
    detours: dict[str, dict[str, int]]
    seconds: float
    hop_p50: float | None
    hop_p99: float | None
    ring_bytes: int
    ring_peak: int

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds else 0.0


def percentile(values: Collection[float], percent: float) -> float | None:
    """The smallest value that at least `percent` of them don't exceed (nearest rank); None without any."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[max(0, -int(-percent * len(ordered) // 100) - 1)]


def ring_of(backend: Mapping[str, Any]) -> Any:
    """The ring's statistics among those of a backend, or None where there is no ring."""
    return backend.get("ring") or backend.get("shm", {}).get("ring")


def bytes_by_backend(backend: Mapping[str, Any], *, name: str, sent: int) -> dict[str, int]:
    """Bytes of tensors sent by each way; `sent`, all by `name`, for a backend that doesn't count itself."""
    counted = backend.get("nbytes", sent)
    return dict(counted) if isinstance(counted, Mapping) else {name: counted}


def copies_per_tensor(ways: Mapping[str, int], *, made: int, in_ring: int) -> float | None:
    """How often each byte sent was written: once when made, once more unless it went from there in the ring.

    ways: bytes sent by backend. made: bytes of patches that were made; in_ring: how many of them there.
    """
    sent = sum(ways.values())
    in_place = min(in_ring, max(0, ways.get("shm", 0) - (made - in_ring)))
    return 1 + max(0, made - in_place) / made if sent and made else None


def lent_elsewhere(backend: Mapping[str, Any]) -> int:
    """Bytes of loans that lay in plain memory, since the ring was full or could not be made."""
    detours: Mapping[str, Mapping[str, int]] = backend.get("detours", {})
    return sum(counts["nbytes"] for reason, counts in detours.items() if reason.startswith("loan: "))
