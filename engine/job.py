"""A part of a prompt that travels in one message, and how a prompt is cut into such parts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

import torch

from engine.config import EngineConfig
from engine.loading import Photograph
from engine.protocol import Request
from engine.results import Result

# Requests at a rank: one in work, and the next there already when it is done.
OUTSTANDING: Final = 2


@dataclass(eq=False)
class Job:
    """Photographs that travel in one message, how their patches are made, and who is told their results.

    The patches are let go of once sent: kept until the answer, they would hold the ring's memory while this
    process waits for just that memory. Should the rank die, they are made again.
    """

    id: int
    photographs: list[Photograph]
    tell: Callable[[Result], None]
    produce: Callable[[list[Photograph]], list[torch.Tensor]]
    tensors: list[torch.Tensor] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    rank: str = ""
    sent: float = 0.0
    settled: bool = False

    @property
    def nbytes(self) -> int:
        return nbytes_of(self.photographs)

    def prepare(self) -> None:
        """Make the patches, where they aren't there; errors as `Endpoint.loan`."""
        self.tensors = self.tensors or self.produce(self.photographs)

    def request(self) -> Request:
        """The message, with the time of now."""
        images = [photograph.prepared for photograph in self.photographs if photograph.prepared is not None]
        grids: list[tuple[int, int, int]] = [image.grid for image in images if image.grid is not None]
        more = [dict(image.more) for image in images if image.more is not None]
        return Request(self.id, self.tensors, grids, time.monotonic_ns(), more)

    def settle(
        self,
        embeddings: Mapping[int, torch.Tensor],
        errors: Mapping[int, str],
        texts: Mapping[int, str] | None = None,
    ) -> None:
        """Tell each photograph's result, the first time; later ones change nothing."""
        if self.settled:
            return
        self.settled = True
        self.tensors = []
        seconds = time.monotonic() - self.sent if self.sent else 0.0
        for place, photograph in enumerate(self.photographs):
            image, embedding = photograph.prepared, embeddings.get(place)
            error = "" if embedding is not None else errors.get(place, "the answer lacks this image")
            self.tell(
                Result(
                    index=photograph.index,
                    name=photograph.name,
                    grid=image.grid if image else None,
                    shape=image.shape if image else None,
                    nbytes=image.nbytes if image else 0,
                    embedding=None if embedding is None else embedding.to("cpu", copy=True),
                    seconds=seconds,
                    rank=self.rank,
                    text=(texts or {}).get(place, ""),
                    error=f"{photograph.name}: {error}" if error else "",
                )
            )

    def fail(self, reason: str) -> None:
        """Every photograph of it fails for this reason."""
        self.settle({}, dict.fromkeys(range(len(self.photographs)), reason))


def message_bytes(config: EngineConfig, capacity: int) -> int:
    """How many bytes of patches go in one message through a ring of that capacity (bytes).

    So many that a peer's share holds all it may have outstanding, and the ring that of every rank and one
    message more, which is being made: then nobody waits for space, and nothing takes a detour.
    """
    of_share = capacity * config.peer_share / OUTSTANDING
    of_ring = capacity / (config.data_parallel_size * OUTSTANDING + 1)
    return max(1, int(min(of_share, of_ring)))


def split(photographs: Iterable[Photograph], limit: int) -> Iterator[list[Photograph]]:
    """Cut a prompt into messages of at most `limit` bytes of patches; a larger photograph goes alone."""
    message: list[Photograph] = []
    room = limit
    for photograph in photographs:
        nbytes = nbytes_of([photograph])
        if message and nbytes > room:
            yield message
            message, room = [], limit
        message.append(photograph)
        room -= nbytes
    if message:
        yield message


def nbytes_of(photographs: Iterable[Photograph]) -> int:
    """Bytes of the patches of all of them."""
    return sum(photograph.prepared.nbytes for photograph in photographs if photograph.prepared)
