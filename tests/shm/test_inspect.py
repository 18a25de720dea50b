"""Listing, describing and sweeping: the dead are swept, the living never, however they race."""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from shm import RingWriter, SegmentMissing, describe, names, segment, sweep
from shm.layout import Layout
from shm.liveness import LivenessLock
from tests.shm.rings import ROOT, attach, ring, send

SHM = Path("/dev/shm")
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
        assert mine == f"reader (pid {os.getpid()})"
        assert hostile.startswith("évil?[2J?xxx")
        assert len(hostile) < 60
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
