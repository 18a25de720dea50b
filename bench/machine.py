"""What a figure depends on: the machine, its load, the versions, the date and the command."""

from __future__ import annotations

import datetime as dt
import os
import platform
import shlex
import sys
from importlib import metadata
from pathlib import Path

DISTRIBUTIONS = ("tensorferry", "torch", "numpy", "pyzmq", "msgspec")
PEERS = ("vllm", "iceoryx2", "ray", "eclipse-zenoh")
"""Told only where they are installed."""

_MISSING = "not installed"


def _first(path: str, field: str) -> str:
    for line in Path(path).read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == field:
            return value.strip()
    return "unknown"


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return _MISSING


def _gib(number_of_bytes: int) -> str:
    return f"{number_of_bytes / 2**30:.1f} GiB"


def describe() -> dict[str, str]:
    """Name and value of everything that has to stand beside a figure."""
    shm = os.statvfs("/dev/shm")
    memory_kib = int(_first("/proc/meminfo", "MemTotal").split()[0])
    machine = {
        "cpu": _first("/proc/cpuinfo", "model name"),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": _gib(memory_kib * 1024),
        "/dev/shm": _gib(shm.f_blocks * shm.f_frsize),
        "kernel": platform.release(),
        "load": " ".join(f"{load:.1f}" for load in os.getloadavg()),
        "python": platform.python_version(),
    }
    versions = {distribution: _version(distribution) for distribution in DISTRIBUTIONS}
    peers = {peer: version for peer in PEERS if (version := _version(peer)) != _MISSING}
    date = dt.datetime.now(dt.UTC).strftime("%Y-%m-%d %H:%M UTC")
    command = shlex.join(["python", "-m", "bench", *sys.argv[1:]])
    return {**machine, **versions, **peers, "date": date, "command": command}
