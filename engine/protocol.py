"""What the front end and the ranks say to each other, and the transport they say it over."""

from __future__ import annotations

import msgspec
import torch

import transport
from engine.config import EngineConfig

FRONT = "front"


def worker_names(rank: str, size: int) -> list[str]:
    """The workers of a rank: the first, which answers, has the rank's own name."""
    return [rank, *(f"{rank}.tp{number}" for number in range(1, size))]


class Ready(msgspec.Struct, tag=True, frozen=True):
    """From each worker of a rank, once: its model is loaded. With `error` it can't serve, and leaves."""

    device: str = ""
    error: str = ""


class Request(msgspec.Struct, tag=True, frozen=True):
    """To a rank, that is to all its workers at once: photographs of one prompt.

    pixel_values: float32 `[patches, 1176]` for each; grids: their patches in time, height and width.
    sent_ns: the monotonic clock, one for all processes of a host, just before the send. more: for each what
    a processor of the model's own made beside pixel_values, which then have a shape of its own; empty else.
    """

    id: int
    pixel_values: list[torch.Tensor]
    grids: list[tuple[int, int, int]]
    sent_ns: int
    more: list[dict[str, torch.Tensor]] = []


class Stop(msgspec.Struct, tag=True, frozen=True):
    """To each worker: finish what you have and leave."""


class Reply(msgspec.Struct, tag=True, frozen=True):
    """From a rank's first worker: the embedding or the error of each photograph of a request, by its place.

    hop_ns: from the send call of the front end until the tensors were open here. texts: where some were
    asked for.
    """

    id: int
    embeddings: dict[int, torch.Tensor]
    errors: dict[int, str]
    hop_ns: int
    texts: dict[int, str] = {}


def transport_config(config: EngineConfig, *, replies: bool = False) -> transport.TransportConfig:
    """The transport's settings. `replies`: those of a rank, whose small answers need no ring of its own."""
    backend = config.tensor_transport
    stages = replies and config.device != "cpu" and torch.cuda.is_available()
    return transport.TransportConfig(
        backend="auto" if replies and backend == "shm" else backend,
        ring_bytes=config.ring_bytes,
        inline_below=config.inline_below,
        peer_share=config.peer_share,
        copy_threads=config.copy_threads,
        cut_through=stages,
    )
