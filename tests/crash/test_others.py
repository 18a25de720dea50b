"""The living are left alone from other pid namespaces and by other users; the dead go by their user."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest

import shm
from shm.liveness import is_held
from tests.crash.harness import WAIT, pattern, until
from tests.shm.rings import ROOT, ring, send

needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root and unshare (util-linux)"
)
_NOBODY = 65534
_NAMESPACE = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
_AS_NOBODY = f"os.setgroups([]); os.setgid({_NOBODY}); os.setuid({_NOBODY})"

# Makes a ring, after a sweep as every start does it, says its name, and lives until it is told.
START = """
import os, sys
from shm import RingWriter, sweep
{before}
sweep()
writer = RingWriter(1 << 20, slots=64, columns=2)
writer.reserve([5000])
print(writer.name, flush=True)
sys.stdin.read()
writer.close()
"""

# One look from elsewhere at the segment that is named, and a sweep.
LOOK = """
import os, sys
from shm import Offer, RingReader, ShmError, describe, sweep
{before}
name = sys.argv[1]
for call in (lambda: describe(name).alive, lambda: RingReader(Offer(name, 0, 1), "reader")):
    try:
        print(call())
    except ShmError as error:
        print(type(error).__name__)
print(*sweep())
"""

# Everything of ours that looks through /dev/shm, as a user beside whose rings others planted things.
BESIDE = """
import os, tempfile
import shm, transport
from engine import segments
{before}
for backend in ("inline", "frames", "shm", "auto"):
    config = transport.TransportConfig(backend=backend, ring_bytes=1 << 20)
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        with transport.listen(f"ipc://{{folder}}/front.sock", config=config) as front:
            assert front.peers == []
assert segments.all_segments() == []
assert shm.sweep(dry_run=True) == shm.sweep() == []
print("as if nothing were there")
"""


@contextmanager
def elsewhere(before: str = "", prefix: Sequence[str] = ()) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A process with a ring; its segment's name. It ends by itself when it is told nothing else."""
    command = [*prefix, sys.executable, "-c", START.format(before=before)]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip(), process


def look(name: str, before: str = "", prefix: Sequence[str] = ()) -> list[str]:
    """What there is to see from elsewhere: whether it lives, why attaching failed, what a sweep removed."""
    command = [*prefix, sys.executable, "-c", LOOK.format(before=before), name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=WAIT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def dead(before: str = "", prefix: Sequence[str] = ()) -> str:
    """The name of a segment whose writer was killed."""
    with elsewhere(before, prefix) as (name, process):
        _kill(process)
    until(lambda: not _held(name), "the lock of the dead is free")
    return name


@contextmanager
def planted(uid: int) -> Iterator[list[str]]:
    """A folder, a pipe and a file that everybody may open, of another user, called as segments of `uid`."""
    names = [f"tensorferry.{uid}.{digit}{os.urandom(16).hex()[1:]}" for digit in "012"]
    folder, pipe, file = (shm.DIRECTORY / name for name in names)
    folder.mkdir()
    os.mkfifo(pipe)
    file.touch()
    for path in (pipe, file):
        path.chmod(0o666)
    try:
        yield names
    finally:
        folder.rmdir()
        pipe.unlink()
        file.unlink()


def _kill(process: subprocess.Popen[str]) -> None:
    """Not before it has ended may its input end: a child in another namespace would leave in peace."""
    process.kill()
    process.wait(WAIT)


def there(name: str) -> bool:
    return (shm.DIRECTORY / name).exists()


def _held(name: str) -> bool:
    """Whether somebody's lock is on it, whoever's it is; as root."""
    fd = os.open(shm.DIRECTORY / name, os.O_RDWR)
    try:
        return is_held(fd, 0)
    finally:
        os.close(fd)


@needs_root
def test_another_pid_namespace_sees_who_lives() -> None:
    """Pids mean something else there, locks the same: sweeps and starts on either side spare the living."""
    with ring() as (writer, reader):
        view = reader.open(send(writer, 5000).handle)
        left = dead()
        assert look(writer.name, prefix=_NAMESPACE) == ["True", "AdmissionFailed", left]
        with elsewhere(prefix=_NAMESPACE) as (name, process):
            assert shm.describe(name).alive
            assert shm.describe(name).pid < 10  # as it is called over there
            assert there(writer.name)
            assert shm.sweep() == []
            assert there(name)
            _kill(process)
        until(lambda: not _held(name), "the lock of the dead is free")
        assert shm.sweep() == [name]
        left = dead(prefix=_NAMESPACE)
        with elsewhere() as (name, process):  # a start here
            assert not there(left)
            process.communicate(timeout=WAIT)
        assert not there(name)
        assert np.array_equal(view, pattern(1, 5000))
        assert writer.reader_alive(0)


@needs_root
def test_another_user_touches_nothing_of_ours() -> None:
    """Neither the living nor the dead of a user are another's to remove, to describe or to attach to."""
    with ring() as (writer, reader):
        view = reader.open(send(writer, 5000).handle)
        ours = dead()
        assert look(writer.name, _AS_NOBODY) == ["SegmentMissing", "LayoutMismatch", ""]
        with elsewhere(_AS_NOBODY) as (name, process):
            assert name.startswith(f"tensorferry.{_NOBODY}.")
            assert there(writer.name)
            assert there(ours)
            assert name not in shm.names()
            assert shm.sweep() == [ours]
            assert there(name)
            _kill(process)
        theirs = name
        until(lambda: not _held(theirs), "the lock of the dead is free")
        assert shm.sweep() == []
        assert look(theirs)[1] == "LayoutMismatch"
        assert look(writer.name, _AS_NOBODY)[2] == theirs
        assert not there(theirs)
        assert there(writer.name)
        assert np.array_equal(view, pattern(1, 5000))


@needs_root
def test_another_user_stops_nothing_of_ours() -> None:
    """Whatever is planted under our names, endpoints begin, nothing of it is shown, and the dead go."""
    left = dead(_AS_NOBODY)
    with planted(_NOBODY) as names:
        code = BESIDE.format(before=_AS_NOBODY)
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=WAIT, check=False
        )
        assert (done.stdout, done.stderr) == ("as if nothing were there\n", "")
        assert not there(left)
        assert all(map(there, names))
