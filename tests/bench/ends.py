"""Ends of a benchmark of which the far one dies."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from bench.links import Link
from bench.part import Report


def near(folder: Path, link: Link) -> Report:
    """Waits for an answer that does not come."""
    link.receive()
    return Report(expected=1)


def far(folder: Path, link: Link) -> Report:
    """Dies by SIGKILL."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still alive")
