"""Locks tell who lives: under SIGSTOP, after SIGKILL, across fork."""

from __future__ import annotations

import faulthandler
import fcntl
import gc
import multiprocessing
import os
import select
import signal
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
import pytest

from shm import Handle, Offer, RingClosed, RingReader, RingWriter, sweep
from shm.liveness import LivenessLock, is_held
from tests.forks import raw_fork, reap
from tests.shm.rings import attach, hear, pattern, populated, ring, send, tell

SPAWN = multiprocessing.get_context("spawn")


def until(condition: Callable[[], bool]) -> None:
    """Wait for what the kernel does in its own time; a minute at most."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in a minute"
        time.sleep(0.002)


def hold(pipe: Connection) -> None:
    """A reader that opens one record and then does nothing."""
    reader = RingReader(Offer(*hear(pipe)), "holder")  # type: ignore[misc] # from our own test
    tell(pipe, "ready")
    handle: Any = hear(pipe)
    view = reader.open(Handle(*handle))
    tell(pipe, "opened")
    hear(pipe)
    assert np.array_equal(view, pattern(1, 4096))
    tell(pipe, "right")
    hear(pipe)


@contextmanager
def holder() -> Iterator[tuple[RingWriter, BaseProcess, Connection, int]]:
    """A writer, and a process that holds its only record, which nobody counts on any more."""
    writer = RingWriter(1 << 20, slots=8, columns=2)
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=hold, args=(theirs,))
    process.start()
    theirs.close()
    try:
        offer = writer.offer()
        tell(ours, offer)
        hear(ours)
        writer.admit(offer, "holder")
        record = send(writer, 4096)
        tell(ours, record.handle)
        hear(ours)
        writer.drop([record])
        yield writer, process, ours, offer.column
    finally:
        process.kill()
        process.join()
        process.close()
        ours.close()
        writer.close()


def test_a_stopped_reader_keeps_what_it_holds() -> None:
    with holder() as (writer, process, pipe, column):
        assert process.pid
        os.kill(process.pid, signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        assert writer.reader_alive(column)
        assert writer.reap() == []
        assert writer.look() == 0
        send(writer, 4096, 2)
        os.kill(process.pid, signal.SIGCONT)
        tell(pipe, "check")
        assert hear(pipe) == "right"


def test_a_killed_reader_gives_everything_back() -> None:
    with holder() as (writer, process, _, column):
        process.kill()
        until(lambda: not writer.reader_alive(column))
        assert writer.reap() == ["holder"]
        assert writer.look() == 1


def write(pipe: Connection) -> None:
    """A writer whose one record is in flight."""
    writer = RingWriter(1 << 20, slots=8, columns=2)
    offer = writer.offer()
    tell(pipe, offer)
    hear(pipe)
    writer.admit(offer, "reader")
    tell(pipe, send(writer, 4096).handle)
    hear(pipe)


def test_a_killed_writer_is_seen_and_what_it_sent_stays() -> None:
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=write, args=(theirs,))
    process.start()
    theirs.close()
    offer = Offer(*hear(ours))  # type: ignore[misc] # from our own test
    reader = RingReader(offer, "reader")
    tell(ours, "ready")
    handle = Handle(*hear(ours))  # type: ignore[misc] # from our own test
    assert reader.writer_alive()
    assert sweep() == []
    process.kill()
    until(lambda: not reader.writer_alive())
    assert sweep() == [offer.name]
    assert np.array_equal(reader.open(handle), pattern(1, 4096))
    reader.close()
    process.join()
    process.close()
    ours.close()


# -------------------------------------------------------------------- the lock itself


@contextmanager
def file() -> Iterator[int]:
    fd = os.memfd_create("locked")
    os.ftruncate(fd, 4096)
    try:
        yield fd
    finally:
        os.close(fd)


def test_a_lock_is_carried_by_its_mapping_and_nothing_else() -> None:
    with file() as fd:
        before = len(os.listdir("/proc/self/fd"))
        lock = LivenessLock(fd, 3)
        assert len(os.listdir("/proc/self/fd")) == before
        assert is_held(fd, 3)
        assert not is_held(fd, 2)
        with pytest.raises(BlockingIOError):
            LivenessLock(fd, 3)
        other = LivenessLock(fd, 4)
        lock.release()
        lock.release()
        assert not is_held(fd, 3)
        assert is_held(fd, 4)
        del other
        gc.collect()
        assert not is_held(fd, 4)


def test_a_description_does_not_see_its_own_lock() -> None:
    """The trap: why everybody asks through a descriptor that was opened for asking."""
    with file() as fd:
        question = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 1, 1, 0)
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, question)
        assert not is_held(fd, 1)
        asking = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
        assert is_held(asking, 1)
        os.close(asking)
    with ring() as (writer, reader):
        assert writer._segment.writer_alive()
        assert reader._segment.reader_alive(reader.column)


@contextmanager
def child(fork: Callable[[], int], work: Callable[[], object]) -> Iterator[int]:
    """A forked child that does its work, says so, and lives until the end of the block; its pid."""
    said, say = os.pipe()
    go, leave = os.pipe()
    populated()  # `raw_fork` bears no thread that asks for the interpreter meanwhile
    pid = fork()
    if pid == 0:
        code = 1
        try:
            os.close(said)
            os.close(leave)
            work()
            os.write(say, b"!")
            os.read(go, 1)
            code = 0
        finally:
            os._exit(code)
    try:
        os.close(say)
        os.close(go)
        assert select.select([said], [], [], 30)[0], "the child does not get on"
        assert os.read(said, 1) == b"!", "the child failed"
        yield pid
    finally:
        os.close(leave)
        os.close(said)
        with suppress(ProcessLookupError):
            status = reap(pid)
        assert status == 0


@pytest.mark.parametrize("fork", [os.fork, raw_fork])
def test_a_child_does_not_keep_the_locks_of_its_parent(fork: Callable[[], int]) -> None:
    with file() as fd:
        lock = LivenessLock(fd, 0)
        with child(fork, lambda: None):
            assert is_held(fd, 0)
            lock.release()
            assert not is_held(fd, 0)


@pytest.mark.parametrize("fork", [os.fork, raw_fork])
def test_a_child_that_drops_everything_releases_nothing(fork: Callable[[], int]) -> None:
    with ring() as (writer, reader):
        record = send(writer, 4096)
        views = [reader.open(record.handle)]
        (lent,) = writer.reserve([64])
        loans = [writer.lend(lent)]
        writer.commit([lent])
        writer.drop([record])

        def drop() -> None:
            views.clear()
            loans.clear()
            gc.collect()

        with child(fork, drop):
            assert writer.look() == 0
            send(writer, 4096, 2)
            assert np.array_equal(views[0], pattern(1, 4096))
            assert is_held(writer._segment.fd, 0)
            assert writer.reader_alive(reader.column)
        loans.clear()
        assert writer.look() == 1
        views.clear()
        assert writer.look() == 1


def test_a_child_cannot_use_what_its_parent_made() -> None:
    with ring() as (writer, reader):
        record = send(writer, 64)

        def use() -> None:
            for call in (
                lambda: writer.reserve([1]),
                writer.offer,
                lambda: writer.commit([record], keep=True),
                lambda: reader.open(record.handle),
            ):
                with pytest.raises(RingClosed, match="made in process"):
                    call()
            writer.close()
            reader.close()

        with child(os.fork, use):
            assert os.path.exists(f"/dev/shm/{writer.name}")
        assert np.array_equal(reader.open(record.handle), pattern(1, 64))


def test_a_child_can_let_go_of_the_mappings_of_its_parent() -> None:
    """Their addresses must not be unmapped there, where something of the child's own may lie."""
    writer = RingWriter(1 << 20, slots=8, columns=2)
    reader = attach(writer)
    sides: list[object] = [writer, reader]
    del writer, reader

    def let_go() -> None:
        own = [np.ones(1 << 19, np.uint8) for _ in range(64)]  # mapped by malloc, wherever there is room
        sides.clear()
        gc.collect()
        assert all(block.all() for block in own)

    with child(os.fork, let_go):
        pass
    for side in reversed(sides):
        assert isinstance(side, RingWriter | RingReader)
        side.close()


def test_a_view_faults_in_a_child() -> None:
    """Better than to read bytes that change, or the child's own."""
    with ring() as (writer, reader):
        view = reader.open(send(writer, 4096).handle)
        pid = os.fork()
        if pid == 0:
            faulthandler.disable()
            int(view[0])
            os._exit(0)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGSEGV


def test_an_exiting_child_leaves_the_parents_ring_alone() -> None:
    with ring() as (writer, reader):
        record = send(writer, 64)
        view = reader.open(record.handle)
        writer.drop([record])
        process = multiprocessing.get_context("fork").Process(target=int)
        process.start()
        process.join()
        assert process.exitcode == 0
        process.close()
        assert writer.look() == 0
        assert np.array_equal(view, pattern(1, 64))
