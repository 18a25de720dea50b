"""Which process a peer is, and whether it still runs: told by /proc, where both see the same processes.

The end of a connection tells of a death, but a child forked from C keeps the connection of its parent. Who
maps a ring has a lock that such a child has not; of everybody else on this host this tells.
"""

from __future__ import annotations

import hashlib
import os
from typing import NamedTuple

_DEAD = (b"Z", b"X", b"x")


def own_mark() -> bytes:
    """What tells those who see the same processes which one this is, and others nothing; b"" where unknown.

    A digest of the boot, the pid namespace, the pid and when the process started.
    """
    pid = os.getpid()
    seen = _look(pid)
    return b"" if seen is None else _mark(pid, seen)


def recognise(pid: int, mark: bytes) -> Process | None:
    """The process that calls itself so, if it is seen here; None where it cannot be told.

    A peer can only prove to be a process that there is: another's mark ties its link to that one's life.
    """
    seen = _look(pid) if mark else None
    return Process(pid, seen.started) if seen is not None and mark == _mark(pid, seen) else None


class Process(NamedTuple):
    """A process of this host, by its pid and when it started, in clock ticks since boot."""

    pid: int
    started: int

    def runs(self) -> bool:
        """Whether it still does; one that was killed and is not waited for does not."""
        seen = _look(self.pid)
        if seen is not None:
            return seen.started == self.started and not seen.dead
        try:
            os.kill(self.pid, 0)  # asks only, and knows what a /proc that hides others does not show
        except ProcessLookupError:
            return False
        except OSError:  # not ours to ask, or a sandbox where nobody may
            pass
        return True


class _Seen(NamedTuple):
    started: int
    dead: bool


def _look(pid: int) -> _Seen | None:
    try:
        fields = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
        state, threads, started = fields[0], int(fields[17]), int(fields[19])
    except (OSError, ValueError, IndexError):
        return None
    # The first thread of a process may end before the others.
    return _Seen(started, state in _DEAD and threads <= 1)


def _mark(pid: int, seen: _Seen) -> bytes:
    """b"" where the kernel tells nothing to go by, or /proc is of another pid namespace than this process."""
    try:
        boot, namespace = _read("/proc/sys/kernel/random/boot_id"), os.readlink("/proc/self/ns/pid")
        if not seen.started or os.readlink("/proc/self") != str(os.getpid()):
            return b""
    except OSError:
        return b""
    text = f"{boot.decode().strip()} {namespace} {pid} {seen.started}"
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _read(path: str) -> bytes:
    """All of a small file in one read, a third of the time that a file object takes."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(descriptor, 4096)
    finally:
        os.close(descriptor)
