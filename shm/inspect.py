"""Look at segments from outside: list them, describe their records and readers, sweep what the dead left."""

from __future__ import annotations

import os

from shm import memory
from shm.errors import LayoutMismatch, SegmentMissing, ShmError
from shm.liveness import LivenessLock, is_held
from shm.look import Look, RecordInfo, SegmentInfo
from shm.segment import WRITER, is_own_file, is_own_name, open_checked, open_own, read_layout, remove


def names() -> list[str]:
    """The names of this user's segments here, sorted. `OSError` where /dev/shm cannot be read."""
    with os.scandir(memory.DIRECTORY) as entries:
        return sorted(entry.name for entry in entries if is_own_name(entry.name) and _is_own(entry))


def describe(name: str) -> SegmentInfo:
    """What a segment's header, slot table and columns say. `SegmentMissing` when it is gone or not ours."""
    try:
        fd = open_own(name)
    except LayoutMismatch as error:
        raise SegmentMissing(str(error)) from error
    try:
        return Look(fd, read_layout(fd)).segment(name)
    except LayoutMismatch:
        return SegmentInfo(name, is_held(fd, WRITER), 0, os.fstat(fd).st_blocks * 512)
    finally:
        os.close(fd)


def records(name: str) -> list[RecordInfo]:
    """The records of a segment, by address. `SegmentMissing` when it is gone, `LayoutMismatch`."""
    fd, layout = open_checked(name)
    try:
        return Look(fd, layout).records()
    finally:
        os.close(fd)


def sweep(*, dry_run: bool = False) -> list[str]:
    """Unlink the segments whose writer is dead, told by its lock and by nothing else; their names.

    Whoever still has one mapped keeps it; a segment that is just being made is made again under
    another name by its creator, who looks. What cannot be opened, locked or removed stays, and the
    others go all the same. `OSError` where /dev/shm cannot be read, `ShmError` as `LivenessLock`.
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
        fd = open_own(name)
    except (SegmentMissing, LayoutMismatch, OSError):  # gone, not ours, or descriptors are short
        return False
    try:
        if is_held(fd, WRITER):
            return False
        if not dry_run:
            _remove_locked(fd, name)
        return True
    except OSError:  # its creator locked it just now, or somebody put something else in its place
        return False
    finally:
        os.close(fd)


def _remove_locked(fd: int, name: str) -> None:
    lock = LivenessLock(fd, WRITER)  # held while unlinking, so that a creator notices
    try:
        remove(name)
    finally:
        lock.release()


def _is_own(entry: os.DirEntry[str]) -> bool:
    try:
        return is_own_file(entry.stat(follow_symlinks=False))
    except OSError:  # gone since the listing
        return False
