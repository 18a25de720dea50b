"""What the front end and the ranks say to each other, and the transport they say it over."""

from __future__ import annotations

import dataclasses
import os
import socket
from pathlib import Path

import msgspec
import torch

import transport
from engine.config import EngineConfig
from engine.options import options_of

FRONT = "front"


class Joined(msgspec.Struct, tag=True, frozen=True):
    """From each worker of a rank, first: where it is, and what it is about to load.

    boot: of the system it runs on; equal ones have one monotonic clock. serves: what all ranks must agree on.
    """

    host: str
    pid: int
    boot: str
    serves: str

    @classmethod
    def here(cls, config: EngineConfig) -> Joined:
        """What a process of this host says, and what its head compares it with."""
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        sizes = f"{config.data_parallel_size} × {config.tensor_parallel_size}"
        asked = f", asked {config.generate!r} for {config.max_tokens} tokens" if config.generate else ""
        # A folder need not lie at the same place everywhere.
        serves = f"{model_name(config)} with seed {config.seed} on {sizes} workers{asked}"
        return cls(socket.gethostname(), os.getpid(), boot, serves)


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
    """To each worker: finish what you have and leave. reason: why it is not wanted; "" when all is done."""

    reason: str = ""


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


def model_name(config: EngineConfig) -> str:
    """The model as other hosts may know it: of a folder its name, not its path."""
    return Path(os.path.expanduser(config.model)).absolute().name


def outward(text: str, config: EngineConfig, rendezvous: Path) -> str:
    """What a rank's head may read of a text: the model, and the file where workers meet, by name alone."""
    model, name = os.path.expanduser(config.model), model_name(config)
    paths = {str(Path(model).absolute()): name, os.path.realpath(model): name, config.model.rstrip("/"): name}
    paths[str(rendezvous)] = rendezvous.name
    for path in sorted(paths, key=len, reverse=True):  # an absolute one before the relative one in it
        if os.sep in path.strip("./"):
            text = text.replace(path, paths[path])
    return text


def transport_config(config: EngineConfig, *, replies: bool = False) -> transport.TransportConfig:
    """The transport's settings: its options that the engine has under the same name.

    replies: those of a rank, whose small answers need no ring of its own. Its steps are logged at the level
    that asks for it, and traced at no other, since that takes time.
    """
    theirs = {field.name for field in dataclasses.fields(transport.TransportConfig)}
    ours = {item.name: getattr(config, item.name) for item in options_of(type(config))}
    same = {name: value for name, value in ours.items() if name in theirs and value is not None}
    backend = config.tensor_transport
    return transport.TransportConfig(
        backend="auto" if replies and backend == "shm" else backend,
        ring_bytes=config.ring_bytes,
        inline_below=config.inline_below,
        trace=transport.log_trace if config.log_level == "debug" else None,
        **same,
    )
