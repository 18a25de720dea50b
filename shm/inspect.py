"""Look at segments from outside: list them, describe their records and readers, sweep what the dead left."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import posix_ipc

from shm import layout as at
from shm import memory
from shm.errors import LayoutMismatch, SegmentMissing, ShmError
from shm.liveness import LivenessLock, is_held
from shm.look import Look, RecordInfo, SegmentInfo
from shm.segment import WRITER, open_checked


def names() -> list[str]:
    """The names of this user's segments here, sorted."""
    found = (at.NAME_PATTERN.fullmatch(entry) for entry in os.listdir(memory.DIRECTORY))
    return sorted(match[0] for match in found if match and int(match[1]) == os.getuid())


def describe(name: str) -> SegmentInfo:
    """What a segment's header, slot table and columns say. `SegmentMissing` when it is gone."""
    try:
        with _looking(name) as look:
            return look.segment(name)
    except LayoutMismatch:
        return _unusable(name)


def records(name: str) -> list[RecordInfo]:
    """The records of a segment, by address. `SegmentMissing` when it is gone, `LayoutMismatch`."""
    with _looking(name) as look:
        return look.records()


def sweep(*, dry_run: bool = False) -> list[str]:
    """Unlink the segments whose writer is dead, told by its lock and by nothing else; their names.

    Whoever still has one mapped keeps it; a segment that is just being made is made again under
    another name by its creator, who looks.
    """
    return [name for name in names() if _sweep(name, dry_run=dry_run)]


def try_lock() -> None:
    """Take a liveness lock on a file without a name in /dev/shm and ask for it, as rings do.

    `ShmError` says what is in the way of rings here.
    """
    try:
        fd = os.open(memory.DIRECTORY, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ShmError(f"no file can be made in {memory.DIRECTORY}: {error.strerror}") from error
    try:
        if not memory.is_tmpfs(fd):
            raise ShmError(f"{memory.DIRECTORY} is no tmpfs: locks mean nothing there; mount a tmpfs")
        lock = LivenessLock(fd, WRITER)
        try:
            if not is_held(fd, WRITER):
                raise ShmError("a lock that was taken is not seen: locks do not work here")
        finally:
            lock.release()
    finally:
        os.close(fd)


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
        raise SegmentMissing(f"{name} is gone, or not this user's to open") from error
    try:
        return SegmentInfo(name, is_held(fd, WRITER), 0, os.fstat(fd).st_blocks * 512)
    finally:
        os.close(fd)


@contextmanager
def _looking(name: str) -> Iterator[Look]:
    fd, layout = open_checked(name)
    try:
        yield Look(fd, layout)
    finally:
        os.close(fd)
