"""CPU seconds and page faults of process trees, from /proc."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from bench.sampler import tree

_TICK = 1 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Usage:
    """CPU seconds, user and system, of all threads, and page faults, minor and major, so far."""

    cpu: float
    faults: int

    def __sub__(self, other: Usage) -> Usage:
        return Usage(self.cpu - other.cpu, self.faults - other.faults)


def of(pids: Iterable[int]) -> Usage:
    """The sum over these processes and their living descendants, each once."""
    cpu, faults = 0.0, 0
    for pid in set(tree(pids)):
        # A process may end between being listed and being read.
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            cpu += (int(fields[11]) + int(fields[12])) * _TICK
            faults += int(fields[7]) + int(fields[9])
    return Usage(cpu, faults)
