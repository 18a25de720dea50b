"""Ends of a benchmark of which the near one sends other bytes than it says."""

from __future__ import annotations

from pathlib import Path

import torch

from bench import payload
from bench.links import Link
from bench.part import Report


def near(folder: Path, link: Link) -> Report:
    """Sends one tensor with the checksum of another, and waits for the answer that does not come."""
    tensor = torch.arange(1 << 13)
    crc = payload.checksum(tensor.numpy())
    tensor[5000] += 1
    link.send({"n": 1, "tensors": [tensor], "crc": crc})
    link.receive()
    return Report(expected=1)


def far(folder: Path, link: Link) -> Report:
    """Checks it."""
    body = link.receive()
    payload.check(body["tensors"][0].numpy(), 1, body["crc"])
    return Report(verified=1)
