"""Listing, describing and sweeping: the dead are swept, the living never, however they race."""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from shm import (
    LayoutMismatch,
    Record,
    RingReader,
    RingWriter,
    SegmentMissing,
    ShmError,
    describe,
    look,
    memory,
    names,
    records,
    segment,
    sweep,
    try_lock,
)
from shm.layout import (
    CLOSING,
    H_LIMIT,
    H_LIVE,
    H_STARTED,
    H_USED,
    LINE,
    S_FILLED,
    S_NBYTES,
    S_OFFSET,
    WORD,
    Layout,
)
from shm.liveness import LivenessLock
from tests.crash.harness import until
from tests.shm.rings import ROOT, attach, ring, send

SHM = Path("/dev/shm")
WAIT = 60.0
DIE = """
import os, sys
from shm import RingWriter
writer = RingWriter(1 << 20, slots=8, columns=1)
writer.reserve([5000])
print(writer.name, flush=True)
sys.stdin.read()
"""


def dead_writer() -> str:
    """The name that a killed process left."""
    with subprocess.Popen(
        [sys.executable, "-c", DIE], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        name = process.stdout.readline().strip()
        assert describe(name).alive
        assert name not in sweep()
        process.kill()
    until(lambda: not describe(name).alive, "the kernel has freed its lock")
    return name


def test_a_segment_is_described() -> None:
    with ring(columns=3) as (writer, _):
        other = attach(writer, "évil\x1b[2J\n" + "x" * 40)
        record = send(writer, 5000)
        assert writer.name in names()
        info = describe(writer.name)
        assert info.alive
        assert info.pid == os.getpid()
        assert (info.capacity, info.mark, info.live, info.used) == (1 << 20, 1 << 20, 1, 5000)
        assert 1 << 20 <= info.nbytes < 2 << 20
        mine, hostile = info.readers
        assert str(mine) == f"reader (pid {os.getpid()})"
        assert hostile.name.startswith("évil?[2J?xxx")
        assert len(hostile.name) <= 32
        other.close()
        writer.drop([record])
        writer.look()
        assert (describe(writer.name).live, describe(writer.name).used) == (0, 0)
        assert len(describe(writer.name).readers) == 1
    with pytest.raises(SegmentMissing):
        describe(writer.name)


def test_the_dead_are_swept_and_the_living_are_not() -> None:
    with ring() as (writer, _):
        name = dead_writer()
        info = describe(name)
        assert (info.alive, info.used) == (False, 5000)
        assert name in sweep(dry_run=True)
        assert name in names()
        swept = sweep()
        assert name in swept
        assert writer.name not in swept
        assert name not in names()
        assert writer.name in names()
        assert sweep() == []


def test_what_readers_of_the_dead_hold_stays_with_them() -> None:
    with ring() as (writer, reader):
        view = reader.open(send(writer, 64).handle)
        before = bytes(view)
        writer._segment.lock.release()
        assert writer.name in sweep()
        assert bytes(view) == before


@pytest.mark.parametrize("size", [0, 100, 1 << 20])
def test_a_half_made_segment_is_swept_by_its_lock_alone(size: int) -> None:
    name = f"tensorferry.{os.getuid()}.{os.urandom(16).hex()}"
    fd = os.open(SHM / name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.ftruncate(fd, size)
    lock = LivenessLock(fd, 0)
    assert describe(name).alive
    assert name not in sweep()
    lock.release()
    assert not describe(name).alive
    assert sweep() == [name]
    os.close(fd)


def test_names_of_others_are_not_ours() -> None:
    planted = [SHM / f"tensorferry.{os.getuid() + 1}.{'0' * 32}", SHM / "tensorferry", SHM / "psm_12345678"]
    for path in planted:
        path.touch()
    try:
        assert not {path.name for path in planted} & set(names())
        sweep()
        assert all(path.exists() for path in planted)
    finally:
        for path in planted:
            path.unlink()


def test_a_creator_whose_name_is_swept_before_its_lock_starts_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """The creator is between O_EXCL and its lock when the sweep comes."""
    swept: list[str] = []

    def slow(fd: int, byte: int) -> LivenessLock:
        if not swept:
            swept.extend(sweep())
        return LivenessLock(fd, byte)

    monkeypatch.setattr(segment, "LivenessLock", slow)
    writer = RingWriter(1 << 20, slots=8, columns=1)
    assert len(swept) == 1
    assert swept[0] != writer.name
    assert (SHM / writer.name).exists()
    writer.close()


def test_a_creator_that_finds_the_sweepers_lock_starts_over() -> None:
    """SETLK on the writer's byte is what a sweep does, too; both sides then give way without harm."""
    name = f"tensorferry.{os.getuid()}.{os.urandom(16).hex()}"
    fd = os.open(SHM / name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    sweeper = os.open(SHM / name, os.O_RDWR)
    fcntl.fcntl(sweeper, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 1, 0))
    assert segment._prepare(name, fd, Layout(1 << 20, 8, 1)) is None  # and closed the descriptor
    os.close(sweeper)
    assert sweep() == [name]


def test_concurrent_sweeps_and_creations_do_not_hurt_each_other() -> None:
    code = """
import sys, time
from shm import sweep
print("ready", flush=True)
end = time.monotonic() + 60
while time.monotonic() < end and not sys.stdin.closed:
    sweep()
"""
    sweepers = [
        subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for _ in range(2)
    ]
    lost: list[str] = []

    def create() -> None:
        for _ in range(150):
            writer = RingWriter(1 << 16, slots=8, columns=1)
            if not (SHM / writer.name).exists():
                lost.append(writer.name)
            reader = attach(writer)
            if not reader.writer_alive():
                lost.append(writer.name)
            reader.close()
            writer.close()

    try:
        for process in sweepers:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
        threads = [threading.Thread(target=create) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        for process in sweepers:
            process.kill()
            process.communicate()
    assert lost == []


def sent_to(writer: RingWriter, nbytes: int, *readers: RingReader) -> Record:
    """A record in flight to these readers, on which this process counts no longer."""
    (record,) = writer.reserve([nbytes], columns=[reader.column for reader in readers])
    writer.commit([record])
    return record


def states(name: str, record: Record) -> dict[str, str]:
    """What each reader does with a record, by name."""
    (info,) = (info for info in records(name) if info.slot == record.slot)
    return {reader.name: reader.state for reader in info.readers}


def test_a_record_says_what_each_reader_does_with_it() -> None:
    with ring(columns=3) as (writer, first):
        second = attach(writer, "second")
        record = sent_to(writer, 5000, first, second)
        assert states(writer.name, record) == {"reader": "not opened", "second": "not opened"}
        view = first.open(record.handle)
        assert states(writer.name, record) == {"reader": "open", "second": "not opened"}
        (info,) = records(writer.name)
        assert (info.slot, info.generation, info.offset) == record.handle[1:4]
        assert (info.nbytes, info.filled) == (5000, 5000)
        opened, waiting = info.readers
        assert (opened.pid, waiting.pid, waiting.seconds) == (os.getpid(), os.getpid(), 0.0)
        assert 0 <= opened.seconds <= info.age
        one, other = describe(writer.name).readers
        assert (one.opened, one.nbytes, one.pending) == (1, 5000, 0)
        assert (one.pending_nbytes, one.pending_oldest) == (0, None)
        assert (other.opened, other.nbytes, other.pending, other.oldest) == (0, 0, 1, None)
        assert other.pending_nbytes == 5000
        assert other.pending_oldest == pytest.approx(info.age, abs=WAIT)
        assert describe(writer.name).oldest == pytest.approx(opened.seconds, abs=WAIT)
        del view
        assert states(writer.name, record)["reader"] == "released"
        second.close()
        assert states(writer.name, record) == {"reader": "released", "second": "gone"}


def test_a_new_tenant_of_a_column_has_nothing_to_do_with_older_records() -> None:
    with ring(columns=1) as (writer, reader):
        record = sent_to(writer, 100, reader)
        reader.close()
        writer.reap()
        successor = attach(writer, "successor")
        assert states(writer.name, record) == {}
        assert states(writer.name, sent_to(writer, 100, successor)) == {"successor": "not opened"}
        successor.close()


def test_a_record_that_is_about_to_go_is_still_shown() -> None:
    with ring() as (writer, reader):
        record = send(writer, 64)
        view = reader.open(record.handle)
        writer._header[record.line] = record.generation | CLOSING
        assert states(writer.name, record) == {"reader": "open"}
        writer._header[record.line] = record.generation
        del view


def test_the_largest_free_block_is_the_largest_gap() -> None:
    with ring(1 << 20) as (writer, _):
        assert describe(writer.name).largest_free == 1 << 20
        one, two, three = (send(writer, nbytes) for nbytes in (64 << 10, 100 << 10, 64 << 10))
        left = (1 << 20) - (228 << 10)
        assert describe(writer.name).largest_free == left == writer.statistics().largest_free
        four = send(writer, left)
        assert describe(writer.name).largest_free == 0
        writer.drop([two])
        writer.look()
        assert describe(writer.name).largest_free == 100 << 10 == writer.statistics().largest_free
        assert [info.slot for info in records(writer.name)] == [r.slot for r in (one, three, four)]
        send(writer, 99)  # a line is 64 bytes, so that 128 are taken
        assert describe(writer.name).largest_free == (100 << 10) - 128 == writer.statistics().largest_free


def test_what_is_taken_and_never_published_is_counted_apart() -> None:
    """A loan that is not sent, a tensor that goes to another host or came from one: no line of the table."""
    with ring(1 << 20) as (writer, _):
        send(writer, 100)
        loan, filling = writer.reserve([300 << 10, 5000])
        view = writer.lend(loan, keep=False)
        info = describe(writer.name)
        assert (info.live, info.used) == (3, 100 + (300 << 10) + 5000)
        assert (info.unpublished, info.unpublished_nbytes) == (2, (300 << 10) + 5000)
        assert info.largest_free == (1 << 20) - info.used  # at most: where they lie cannot be seen
        writer.commit([filling], keep=True)
        del view
        info = describe(writer.name)
        assert (info.unpublished, info.unpublished_nbytes) == (1, 300 << 10)  # let go, until the writer looks
        writer.look()
        info = describe(writer.name)
        assert (info.live, info.unpublished, info.unpublished_nbytes) == (2, 0, 0)
        assert info.largest_free == writer.statistics().largest_free


@pytest.mark.parametrize("live", [0, 1, (1 << 64) - 1])
@pytest.mark.parametrize("used", [0, 50, (1 << 64) - 1])
def test_counts_that_were_planted_make_nothing_negative(live: int, used: int) -> None:
    with ring(1 << 20) as (writer, _):
        send(writer, 100)
        writer._header[H_LIVE], writer._header[H_USED] = live, used
        info = describe(writer.name)
        assert info.unpublished == max(0, live - 1)
        assert info.unpublished_nbytes == (max(0, used - 100) if info.unpublished else 0)
        assert 0 <= info.largest_free <= 1 << 20


@pytest.mark.parametrize("limit", [0, 1, 512 << 10, 1 << 20, (1 << 20) + 1, (1 << 64) - 1])
def test_the_size_is_what_the_ring_stays_at_within_what_it_has(limit: int) -> None:
    with ring(1 << 20) as (writer, _):
        send(writer, 1000)
        writer._header[H_LIMIT] = limit
        info = describe(writer.name)
        assert info.capacity == (limit if 0 < limit < 1 << 20 else 1 << 20)
        assert info.largest_free == max(0, info.capacity - 1024)
        writer.reserve([1000])
        assert describe(writer.name).largest_free == max(0, info.capacity - 2000)


def test_a_line_that_lies_outside_the_data_makes_no_block_larger() -> None:
    with ring(1 << 20) as (writer, _):
        record = send(writer, 64 << 10)
        for offset in (1 << 20, 1 << 63):
            writer._header[record.line + S_OFFSET] = offset
            assert describe(writer.name).largest_free == 1 << 20
        writer._header[record.line + S_OFFSET] = record.offset


def test_the_owner_is_named_while_it_lives() -> None:
    with ring() as (writer, _):
        info = describe(writer.name)
        assert info.program == Path("/proc/self/comm").read_text().strip()
        assert 0 <= info.age < 3600
        writer._header[H_STARTED] += 1  # as if the number were another process's by now
        assert describe(writer.name).program == ""


def test_looking_changes_nothing_and_takes_no_page() -> None:
    with ring(8 << 20, slots=4096, columns=8) as (writer, reader):
        record = sent_to(writer, 5000, reader)
        before = (SHM / writer.name).read_bytes()
        blocks = (SHM / writer.name).stat().st_blocks
        for _ in range(3):
            describe(writer.name)
            records(writer.name)
        assert (SHM / writer.name).read_bytes() == before
        assert (SHM / writer.name).stat().st_blocks == blocks
        assert bytes(reader.open(record.handle)) == bytes(5000)
        writer.drop([record], reader.column)


def test_a_line_that_changes_while_it_is_read_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second reading of the line is half of one record and half of its successor in the slot."""
    with ring(slots=8) as (writer, _):
        record = send(writer, 64)
        line = record.line * WORD
        reads: list[bytes] = []

        def pread(fd: int, count: int, offset: int) -> bytes:
            read = os.pread(fd, count, offset)
            if (count, offset) == (LINE, line):
                reads.append(read)
                if len(reads) == 2:
                    writer._header[record.line + S_NBYTES] = writer._header[record.line + S_FILLED] = 128
                    return read[: 3 * WORD] + (128).to_bytes(WORD, sys.byteorder) + read[4 * WORD :]
            return read

        monkeypatch.setattr(look, "os", SimpleNamespace(pread=pread))
        (info,) = records(writer.name)
        assert len(reads) == 4
        assert (info.nbytes, info.filled) == (128, 128)


def test_records_of_what_is_gone_or_no_segment() -> None:
    with ring() as (writer, _):
        name = writer.name
    with pytest.raises(SegmentMissing):
        records(name)
    with pytest.raises(LayoutMismatch):
        records("passwd")


def test_locks_work_here_and_trying_leaves_nothing() -> None:
    before = set(os.listdir(SHM))
    try_lock()
    assert set(os.listdir(SHM)) == before


def test_a_folder_that_is_no_tmpfs_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if memory.is_tmpfs(folder := os.open(tmp_path, os.O_RDONLY)):
        os.close(folder)
        pytest.skip("the temporary folder is a tmpfs")
    os.close(folder)
    monkeypatch.setattr(memory, "DIRECTORY", tmp_path)
    with pytest.raises(ShmError, match="no tmpfs|no file can be made"):
        try_lock()
