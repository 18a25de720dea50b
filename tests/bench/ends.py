"""Ends of a benchmark of which the far one dies, and a near end that sends by another way than it should."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch

import transport
from bench.floor import TIMEOUT
from bench.links import Link
from bench.part import Report
from bench.peers.baselines import leave


def near(folder: Path, link: Link) -> Report:
    """Waits for an answer that does not come."""
    link.receive()
    return Report(expected=1)


def far(folder: Path, link: Link) -> Report:
    """Dies by SIGKILL."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still alive")


def by_frames(folder: Path, **arguments: object) -> Report:
    """The front end of `bench.scale`, but one message goes as frames."""
    config = transport.TransportConfig(backend="frames")
    with transport.listen(f"ipc://{folder}/near", config=config) as front:
        leave(folder, "listening", "")
        front.wait_for_peers(1, timeout=TIMEOUT)
        front.send({"n": 0, "tensors": [torch.zeros(1 << 14, dtype=torch.int64)]}, timeout=TIMEOUT)
        front.receive(timeout=TIMEOUT)
        front.send({"stop": True}, timeout=TIMEOUT)
    return Report(expected=1)
