"""One segment: create, attach and unlink the object, reserve its pages, map its parts.

Pages have one writer, and the MMU enforces it: the writer maps columns read-only, a reader maps
everything read-only but its own column. No mapping is inherited by fork, and data is not dumped.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import ClassVar

import posix_ipc

from shm import layout as at
from shm import memory
from shm.errors import AdmissionFailed, LayoutMismatch, NoSpace, RingClosed, SegmentExists, SegmentMissing
from shm.layout import Layout
from shm.liveness import LivenessLock, is_held, started
from shm.mapping import READ, READ_WRITE, map_shared
from shm.tenure import Tenure, Watch

WRITER = 0  # the lock byte of the writer; column c has byte 1 + c
_OPEN = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # another's lease is not waited for


class Segment:
    """What writer and readers share: the name, the layout, the header, a descriptor for asking."""

    _let_go: ClassVar[tuple[str, ...]] = ("header", "data", "tenure")

    def __init__(
        self,
        name: str,
        layout: Layout,
        fd: int,
        *,
        protection: int,
        data_protection: int,
        lock: LivenessLock | None,
        watch: Watch | None,
    ) -> None:
        control = map_shared(fd, layout.columns_offset, 0, protection)
        self.name = name
        self.layout = layout
        self.header = memoryview(control).cast("Q")  # header and slot lines, in words
        self.data = map_shared(fd, layout.capacity, layout.data_offset, data_protection, dump=False)
        self.tenure = Tenure(self.data, lock, watch, writable=data_protection == READ_WRITE)
        self.identity: int = self.header[at.H_IDENTITY]
        self._fd = fd
        self._closer = weakref.finalize(self, os.close, fd)  # from here on the descriptor is ours
        self._closer.atexit = False  # exit closes it anyway, and `close` of whoever owns this comes first

    @property
    def fd(self) -> int:
        """The descriptor for asking. `RingClosed` after `close`, when its number may be another file's."""
        if not self._closer.alive:
            raise RingClosed("the segment is closed in this process")
        return self._fd

    def writer_alive(self) -> bool:
        """Whether the writer's lock is held."""
        return is_held(self.fd, WRITER)

    def reader_alive(self, column: int) -> bool:
        """Whether a column's lock is held: by a reader, or by a mapping that its last view keeps."""
        return is_held(self.fd, 1 + column)

    def linked(self) -> bool:
        """Whether the name is still there (systemd's RemoveIPC, an operator or a sweep may take it)."""
        return os.fstat(self.fd).st_nlink > 0

    def reserved(self) -> int:
        """Bytes of pages that the whole object has taken."""
        return os.fstat(self.fd).st_blocks * 512

    def close(self) -> None:
        """Close the descriptor and let the mappings go, each with its last user. Twice does no harm."""
        if self._closer.alive:
            self._closer()
            for name in self._let_go:
                delattr(self, name)


class WriterSegment(Segment):
    """The writer's side: header, slots and data read-write, columns read-only."""

    _let_go = ("header", "data", "tenure", "columns")

    def __init__(
        self, name: str, layout: Layout, fd: int, lock: LivenessLock, watch: Watch | None = None
    ) -> None:
        columns = map_shared(fd, layout.columns * layout.column_bytes, layout.columns_offset, READ)
        super().__init__(
            name, layout, fd, protection=READ_WRITE, data_protection=READ_WRITE, lock=None, watch=watch
        )
        self.columns = memoryview(columns).cast("Q")
        self.lock = lock
        self.mark = 0
        self._growing = threading.Lock()

    def column_word(self, column: int) -> int:
        """The index of a column's first word in `columns`."""
        return column * self.layout.column_bytes // at.WORD

    def reserve_column(self, column: int) -> None:
        """Take the pages of a column, so that reading it never faults. `NoSpace` when there are none."""
        _reserve(self.fd, self.layout.column_offset(column), self.layout.column_bytes, "a reader's column")

    def grow(self, mark: int, spare: int = 0) -> bool:
        """Reserve pages up to `mark` bytes of data and publish it; whether that was still to be done.

        `NoSpace` leaves all as it was, also where less than `spare` bytes of /dev/shm would stay free. Safe
        for several threads.
        """
        with self._growing:
            start = self.mark
            if mark <= start:
                return False
            purpose = f"growing the ring from {memory.human(start)} to {memory.human(mark)}"
            _reserve(self.fd, self.layout.data_offset + start, mark - start, purpose, spare)
            self.mark = self.header[at.H_MARK] = mark
            self.tenure.grown(mark)
            return True

    def unlink(self) -> None:
        """Take the name away; mappings stay. Nothing happens when it is gone already."""
        if self.linked():
            remove(self.name)

    def close(self) -> None:
        """As of every segment; the lock goes last, when nobody can be misled any more."""
        super().close()
        self.lock.release()


class ReaderSegment(Segment):
    """A reader's side: everything read-only but its own column, which carries its lock.

    Column and tenure, with the lock, are for whoever holds views, too: they go with the last reference.
    """

    _let_go = ("header", "data", "tenure", "column", "lock")

    def __init__(
        self, name: str, layout: Layout, fd: int, column: int, lock: LivenessLock, watch: Watch | None = None
    ) -> None:
        offset = layout.column_offset(column)
        _reserve(fd, offset, layout.column_bytes, "a reader's column")
        own = map_shared(fd, layout.column_bytes, offset, READ_WRITE)
        super().__init__(name, layout, fd, protection=READ, data_protection=READ, lock=lock, watch=watch)
        self.index = column
        self.lock = lock
        self.column = memoryview(own).cast("Q")


def create(layout: Layout, watch: Watch | None = None) -> WriterSegment:
    """Make a segment under a random name, 0600, locked by this process, control pages reserved.

    `NoSpace` when /dev/shm or memory is short of the control pages.
    """
    while True:
        name = f"tensorferry.{os.getuid()}.{secrets.token_hex(16)}"
        try:
            fd = posix_ipc.SharedMemory("/" + name, posix_ipc.O_CREX, mode=0o600).fd
        except posix_ipc.ExistentialError as error:
            raise SegmentExists(f"{name} exists already") from error
        segment = _prepare(name, fd, layout, watch)
        if segment is not None:
            return segment


def _prepare(name: str, fd: int, layout: Layout, watch: Watch | None = None) -> WriterSegment | None:
    """Lock, reserve and fill in a new object; None when a sweep took it before it was locked."""
    try:
        if not memory.is_tmpfs(fd):
            raise NoSpace(f"{memory.DIRECTORY} is no tmpfs: locks mean nothing there; mount a tmpfs")
        lock = LivenessLock(fd, WRITER)
        if not os.fstat(fd).st_nlink:
            os.close(fd)
            return None
        with _no_space(f"a file of {memory.human(layout.total)}"):
            os.ftruncate(fd, layout.total)
        _reserve(fd, 0, layout.columns_offset, "the control pages of a ring")
        with _no_space(f"mapping {memory.human(layout.total)}"):
            segment = WriterSegment(name, layout, fd, lock, watch)
    except BlockingIOError:
        os.close(fd)
        return None
    except BaseException:
        os.close(fd)
        remove(name)
        raise
    _write_header(segment)
    return segment


def _write_header(segment: WriterSegment) -> None:
    header, layout, pid = segment.header, segment.layout, os.getpid()
    header[at.H_VERSION] = at.VERSION
    header[at.H_PAGE] = at.PAGE
    header[at.H_CAPACITY] = layout.capacity
    header[at.H_SLOTS] = layout.slots
    header[at.H_COLUMNS] = layout.columns
    header[at.H_IDENTITY] = segment.identity = secrets.randbits(63) | 1
    header[at.H_PID] = pid
    header[at.H_STARTED] = started(pid)
    header[at.H_CREATED_NS] = time.time_ns()
    header[at.H_MAGIC] = at.MAGIC  # last: a segment without it is not ready, or never will be


def remove(name: str) -> None:
    """Take a segment's name away. Nothing happens when it is gone already."""
    with suppress(FileNotFoundError):
        os.unlink(memory.DIRECTORY / name)


def is_own_name(name: str) -> bool:
    """Whether a segment of this user could be called so."""
    match = at.NAME_PATTERN.fullmatch(name)
    return match is not None and int(match[1]) == os.getuid()


def is_own_file(status: os.stat_result) -> bool:
    """Whether that is a regular file of this user, as every segment is."""
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.getuid()


def open_own(name: str) -> int:
    """Open what has a segment's name: a regular file of this user on a tmpfs, whatever stands in it.

    The name is hostile input, and so is what has it: anybody may make a folder, a pipe or a file of
    their own in /dev/shm. Nothing is waited for, no link is followed.
    `SegmentMissing` or `LayoutMismatch`; `OSError` for want of descriptors.
    """
    if not is_own_name(name):
        raise LayoutMismatch("that is not the name of a segment of this user")
    try:
        fd = os.open(memory.DIRECTORY / name, _OPEN)
    except FileNotFoundError as error:
        raise SegmentMissing("no such segment in this /dev/shm (another host or container?)") from error
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise
        raise LayoutMismatch(f"the segment cannot be opened: {error.strerror}") from error
    try:
        if not is_own_file(os.fstat(fd)) or not memory.is_tmpfs(fd):
            raise LayoutMismatch("the segment is not a regular file of this user on a tmpfs")
    except BaseException:
        os.close(fd)
        raise
    return fd


def open_checked(name: str) -> tuple[int, Layout]:
    """Open a segment that somebody named: a descriptor and the layout its header and size agree on.

    Errors as `open_own`.
    """
    fd = open_own(name)
    try:
        return fd, read_layout(fd)
    except BaseException:
        os.close(fd)
        raise


def read_layout(fd: int) -> Layout:
    """The layout that the header of an open file has, and its size fits. `LayoutMismatch`."""
    status = os.fstat(fd)
    if status.st_size < at.PAGE:
        raise LayoutMismatch(f"the segment is {status.st_size} bytes, too short for a header")
    words = memoryview(os.pread(fd, at.PAGE, 0)).cast("Q")
    if words[at.H_MAGIC] != at.MAGIC or words[at.H_VERSION] != at.VERSION or words[at.H_PAGE] != at.PAGE:
        raise LayoutMismatch(
            f"the segment has version {words[at.H_VERSION]} and pages of {words[at.H_PAGE]} bytes;"
            f" this is version {at.VERSION} with pages of {at.PAGE}"
        )
    try:
        layout = Layout(words[at.H_CAPACITY], words[at.H_SLOTS], words[at.H_COLUMNS])
    except ValueError as error:
        raise LayoutMismatch(f"the segment's header is wrong: {error}") from error
    if status.st_size != layout.total:
        raise LayoutMismatch(f"the segment is {status.st_size} bytes where its header says {layout.total}")
    return layout


def attach(name: str, column: int, challenge: int, watch: Watch | None = None) -> ReaderSegment:
    """Map a segment and take a column's lock, if the header has that challenge for it.

    `SegmentMissing`, `LayoutMismatch`, `NoSpace`, or `AdmissionFailed` when the column is taken or
    the offer is no longer good.
    """
    fd, layout = open_checked(name)
    lock = None
    try:
        if not 0 <= column < layout.columns:
            raise LayoutMismatch(f"column {column} of {layout.columns}")
        lock = _column_lock(fd, column)
        # Under the lock: from now on the writer offers this column to nobody else.
        (seen,) = memoryview(os.pread(fd, at.WORD, (at.H_CHALLENGE + column) * at.WORD)).cast("Q")
        if not challenge or seen != challenge:
            raise AdmissionFailed(f"column {column} is not offered with this challenge (any more)")
        with _no_space(f"mapping {memory.human(layout.total)}"):
            return ReaderSegment(name, layout, fd, column, lock, watch)
    except BaseException:
        if lock is not None:
            lock.release()  # at once: a traceback may keep it alive
        os.close(fd)
        raise


def _column_lock(fd: int, column: int) -> LivenessLock:
    try:
        return LivenessLock(fd, 1 + column)
    except BlockingIOError as error:
        raise AdmissionFailed(f"column {column} is held by another reader") from error


def _reserve(fd: int, offset: int, nbytes: int, purpose: str, spare: int = 0) -> None:
    """Take pages now, so that touching them later is never SIGBUS. `NoSpace` with sizes and remedy."""
    memory.check(nbytes, purpose, spare)
    with _no_space(purpose):
        os.posix_fallocate(fd, offset, nbytes)


@contextmanager
def _no_space(purpose: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT, errno.EFBIG):
            raise
        raise NoSpace(f"{purpose} cannot be had: {memory.space()}. {memory.REMEDY}") from error
