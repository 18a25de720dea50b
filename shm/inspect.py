"""Look at segments from outside: list them, describe their records and readers, sweep what the dead left."""

from __future__ import annotations

import mmap
import os
from contextlib import suppress
from dataclasses import dataclass

import posix_ipc

from shm import layout as at
from shm import memory
from shm.errors import LayoutMismatch, SegmentMissing
from shm.liveness import LivenessLock, is_held
from shm.segment import WRITER, open_checked


@dataclass(frozen=True)
class SegmentInfo:
    """One name in /dev/shm. `capacity`, `mark`, `used` in bytes; zero where the header is unusable."""

    name: str
    alive: bool
    pid: int
    nbytes: int
    capacity: int = 0
    mark: int = 0
    live: int = 0
    used: int = 0
    readers: tuple[str, ...] = ()


def names() -> list[str]:
    """The names of this user's segments here, sorted."""
    found = (at.NAME_PATTERN.fullmatch(entry) for entry in os.listdir(memory.DIRECTORY))
    return sorted(match[0] for match in found if match and int(match[1]) == os.getuid())


def describe(name: str) -> SegmentInfo:
    """What a segment's header and columns say. `SegmentMissing` when it is gone."""
    try:
        fd, layout = open_checked(name)
    except LayoutMismatch:
        return _unusable(name)
    try:
        with (
            mmap.mmap(fd, layout.data_offset, prot=mmap.PROT_READ) as control,
            memoryview(control) as whole,
            whole.cast("Q") as words,
        ):
            return SegmentInfo(
                name=name,
                alive=is_held(fd, WRITER),
                pid=words[at.H_PID],
                nbytes=os.fstat(fd).st_blocks * 512,
                capacity=layout.capacity,
                mark=words[at.H_MARK],
                live=words[at.H_LIVE],
                used=words[at.H_USED],
                readers=tuple(_readers(fd, layout, words)),
            )
    finally:
        os.close(fd)


def sweep(*, dry_run: bool = False) -> list[str]:
    """Unlink the segments whose writer is dead, told by its lock and by nothing else; their names.

    Whoever still has one mapped keeps it; a segment that is just being made is made again under
    another name by its creator, who looks.
    """
    return [name for name in names() if _sweep(name, dry_run=dry_run)]


def _sweep(name: str, *, dry_run: bool) -> bool:
    try:
        fd = posix_ipc.SharedMemory("/" + name).fd
    except (posix_ipc.Error, OSError):  # gone, or not ours to open
        return False
    try:
        if not memory.is_tmpfs(fd) or is_held(fd, WRITER):
            return False
        if dry_run:
            return True
        lock = LivenessLock(fd, WRITER)  # held while unlinking, so that a creator notices
        with suppress(posix_ipc.ExistentialError):
            posix_ipc.unlink_shared_memory("/" + name)
        lock.release()
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(fd)


def _unusable(name: str) -> SegmentInfo:
    try:
        fd = posix_ipc.SharedMemory("/" + name).fd
    except (posix_ipc.Error, OSError) as error:
        raise SegmentMissing(f"{name} is gone") from error
    try:
        return SegmentInfo(name, is_held(fd, WRITER), 0, os.fstat(fd).st_blocks * 512)
    finally:
        os.close(fd)


def _readers(fd: int, layout: at.Layout, words: memoryview) -> list[str]:
    readers = []
    for column in range(layout.columns):
        if is_held(fd, 1 + column):
            start = layout.column_offset(column) // at.WORD
            name = words[start + at.C_NAME : start + at.C_NAME + at.NAME_BYTES // at.WORD].tobytes()
            decoded = name.rstrip(b"\0").decode(errors="replace")
            # Anybody who can attach chose it, and it is shown on a terminal.
            text = "".join(c if c.isprintable() else "?" for c in decoded)
            readers.append(f"{text} (pid {words[start + at.C_PID]})")
    return readers
