"""Processes that tests start, killed at the end, also where a test fails in between; and ports for them."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).parents[2]


@contextmanager
def python(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A Python process with pipes for its output, in the root of the repository."""
    with subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        try:
            yield process
        finally:
            process.kill()  # nothing, where it has ended and was waited for


def ran(command: Sequence[str], environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """A Python process that has ended, whatever its exit code."""
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environ,
        check=False,
        timeout=100,
    )


def until_ended(pid: int) -> None:
    """Wait for the end of a process that is not waited for by this; the limit is the timeout of the suite."""
    with suppress(FileNotFoundError, ProcessLookupError):
        while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
            time.sleep(0.01)


@contextmanager
def held_ports(count: int = 1) -> Iterator[int]:
    """The first of so many ports of loopback in a row, at which who is told its number may listen.

    A port that was free a moment ago may be given to another process meanwhile. So these are held by sockets
    that do not listen: the kernel gives none of them to who leaves the choice to it, and binds who names one
    all the same, where he allows others (SO_REUSEADDR), as zmq and torch do.
    """
    while True:
        with ExitStack() as held:
            try:
                first = 0
                for place in range(count):
                    holder = held.enter_context(socket.socket())
                    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    holder.bind(("127.0.0.1", first + place if place else 0))
                    first = first or holder.getsockname()[1]
            except (OSError, OverflowError):  # one of those that follow is another's, or no port at all
                continue
            yield first
            return
