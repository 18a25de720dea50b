"""Making, mapping and refusing segments: modes, hostile names and files, short memory."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shm import (
    LayoutMismatch,
    NoSpace,
    Offer,
    RingReader,
    RingWriter,
    SegmentMissing,
    inspect,
    memory,
    require_space,
)
from shm import layout as at
from shm.inspect import describe, names, sweep
from shm.liveness import LivenessLock
from shm.segment import open_checked
from tests.shm.rings import attach, populated, ring, run_python, send

SHM = Path("/dev/shm")


def test_a_segment_is_private_and_randomly_named() -> None:
    with ring() as (writer, _):
        status = (SHM / writer.name).stat()
        assert stat.S_IMODE(status.st_mode) == 0o600
        assert status.st_uid == os.getuid()
        assert at.NAME_PATTERN.fullmatch(writer.name)
        other = RingWriter(1 << 20, slots=8, columns=1)
        assert (other.name, other.identity) != (writer.name, writer.identity)
        other.close()


def test_a_closed_segment_has_no_name() -> None:
    with ring() as (writer, _):
        path = SHM / writer.name
        assert path.exists()
    assert not path.exists()


@pytest.mark.parametrize(
    "name",
    [
        "",
        "tensorferry",
        "../../etc/passwd",
        "/tensorferry.{uid}.00000000000000000000000000000000",
        "tensorferry.{uid}.00000000000000000000000000000000\n",
        "tensorferry.{uid}.0000000000000000000000000000000",
        "tensorferry.{uid}.0000000000000000000000000000000G",
        "tensorferry.{uid}.0000000000000000000000000000000\0",
        "tensorferry.{other}.00000000000000000000000000000000",
        "tensorferry.-1.00000000000000000000000000000000",
        "tensorferry.\u0660.00000000000000000000000000000000",
    ],
)
def test_a_hostile_name_is_refused_without_being_repeated(name: str) -> None:
    name = name.format(uid=os.getuid(), other=os.getuid() + 1)
    with pytest.raises(LayoutMismatch) as refusal:
        RingReader(Offer(name, 0, 1), "victim")
    assert not name or name not in str(refusal.value)


def test_a_name_that_is_not_there_is_missing() -> None:
    with pytest.raises(SegmentMissing):
        RingReader(Offer(f"tensorferry.{os.getuid()}.{'0' * 32}", 0, 1), "early")


@contextmanager
def planted(make: Callable[[Path], object], begins: str = "") -> Iterator[str]:
    """Something in /dev/shm under a proper name, of which the hexadecimal end begins so."""
    name = f"tensorferry.{os.getuid()}.{begins}{os.urandom(16).hex()[len(begins) :]}"
    path = SHM / name
    make(path)
    try:
        yield name
    finally:
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)


def header(**words: int) -> bytes:
    """A header page, right but for these words."""
    right = {
        "H_MAGIC": at.MAGIC,
        "H_VERSION": at.VERSION,
        "H_PAGE": at.PAGE,
        "H_CAPACITY": 1 << 20,
        "H_SLOTS": 64,
        "H_COLUMNS": 4,
        "H_IDENTITY": 1,
    }
    page = bytearray(at.PAGE)
    for name, value in (right | words).items():
        struct.pack_into("=Q", page, getattr(at, name) * at.WORD, value)
    return bytes(page)


def sized(content: bytes, size: int = at.Layout(1 << 20, 64, 4).total) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        path.write_bytes(content)
        os.truncate(path, size)

    return make


def of_another(path: Path) -> None:
    """An empty file that everybody may open, and that is not this user's."""
    if os.geteuid():
        pytest.skip("needs root for a file of another user")
    path.touch()
    path.chmod(0o666)
    os.chown(path, os.getuid() + 1, -1)


def bound(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


# What anybody who can make a name in /dev/shm can leave there under a segment's.
NOT_OURS: dict[str, Callable[[Path], object]] = {
    "a link": lambda path: path.symlink_to("/etc/passwd"),
    "a link to a folder": lambda path: path.symlink_to("/etc"),
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "a folder": Path.mkdir,
    "a pipe": os.mkfifo,
    "a socket": bound,
    "of another": of_another,
}

HOSTILE: dict[str, Callable[[Path], object]] = NOT_OURS | {
    "empty": sized(b"", 0),
    "short": sized(b"", at.PAGE - 1),
    "zeros": sized(b"", 1 << 20),
    "magic": sized(header(H_MAGIC=at.MAGIC ^ 1)),
    "version": sized(header(H_VERSION=at.VERSION + 1)),
    "page": sized(header(H_PAGE=at.PAGE * 2)),
    "no capacity": sized(header(H_CAPACITY=0)),
    "odd capacity": sized(header(H_CAPACITY=1)),
    "huge capacity": sized(header(H_CAPACITY=1 << 63)),
    "no slots": sized(header(H_SLOTS=0)),
    "huge slots": sized(header(H_SLOTS=1 << 62)),
    "huge columns": sized(header(H_COLUMNS=(1 << 64) - 1)),
    "truncated": sized(header(), at.Layout(1 << 20, 64, 4).total - 1),
    "longer": sized(header(), at.Layout(1 << 20, 64, 4).total + 1),
    "only a header": sized(header(), at.PAGE),
}


def test_a_lease_is_not_waited_for() -> None:
    """Opening a file that its owner leases waits for them, for 45 s at most, unless it asks not to wait."""
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)  # which the kernel sends to the holder of the lease
    try:
        with planted(sized(header())) as name, open(SHM / name, "rb") as file:
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_RDLCK)
            with pytest.raises(LayoutMismatch, match="cannot be opened"):
                open_checked(name)
    finally:
        signal.signal(signal.SIGIO, before)


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_planted_file_is_refused(kind: str) -> None:
    with planted(HOSTILE[kind]) as name, pytest.raises(LayoutMismatch) as caught:
        RingReader(Offer(name, 0, 1), "victim")
    assert name.split(".")[2] not in str(caught.value)  # what is said goes to a peer


@pytest.mark.parametrize("kind", NOT_OURS)
def test_what_is_no_file_of_ours_is_passed_by(kind: str) -> None:
    """It is not listed, described or removed, and a dead ring whose name is sorted behind it goes."""
    with planted(NOT_OURS[kind], "0") as name, planted(Path.touch, "f") as dead:
        assert name not in names()
        with pytest.raises(SegmentMissing):
            describe(name)
        would_go = sweep(dry_run=True)
        assert dead in would_go
        assert name not in would_go
        assert dead in sweep()
        assert not (SHM / dead).exists()
        assert os.path.lexists(SHM / name)


def test_what_replaces_a_dead_ring_while_it_is_swept_is_passed_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """As another sweep took the name, and somebody put a folder there, between opening and removing it."""

    def replaced(fd: int, byte: int) -> LivenessLock:
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        if path == SHM / name:
            path.unlink()
            path.mkdir()
        return LivenessLock(fd, byte)

    monkeypatch.setattr(inspect, "LivenessLock", replaced)
    with planted(Path.touch, "0") as name, planted(Path.touch, "f") as dead:
        swept = sweep()
        assert dead in swept
        assert name not in swept
        assert (SHM / name).is_dir()


def test_the_planted_files_are_refused_for_the_one_thing_that_is_wrong() -> None:
    with planted(sized(header())) as name:
        fd, layout = open_checked(name)
        os.close(fd)
        assert layout == at.Layout(1 << 20, 64, 4)


def test_a_file_on_another_filesystem_is_refused(tmp_path: Path) -> None:
    """Locks and pages are one kernel's own on a tmpfs only."""
    code = """
import os, sys
from shm import Offer, RingReader, LayoutMismatch, RingWriter, NoSpace
name = f"tensorferry.{os.getuid()}.{'0' * 32}"
assert os.system(f"mount --bind {sys.argv[1]} /dev/shm") == 0
open("/dev/shm/" + name, "wb").write(b"x" * 4096)
for call in (lambda: RingReader(Offer(name, 0, 1), "victim"), lambda: RingWriter(1 << 20)):
    try:
        call()
    except (LayoutMismatch, NoSpace) as error:
        assert "tmpfs" in str(error), error
        print("refused")
print(sorted(os.listdir("/dev/shm")) == [name])
"""
    folder = os.open(tmp_path, os.O_RDONLY)
    on_tmpfs = memory.is_tmpfs(folder)
    os.close(folder)
    if on_tmpfs:
        pytest.skip("the folder for temporary files lies on a tmpfs itself")
    done = run_python(code, str(tmp_path), shm_size="1m")
    assert done.stdout.split("\n")[:3] == ["refused", "refused", "True"], done.stderr


# -------------------------------------------------------------------- memory


def test_a_ring_takes_memory_as_it_grows() -> None:
    writer = RingWriter(1 << 30, slots=64, columns=1, growth=1 << 20)
    empty = os.stat(SHM / writer.name)
    assert empty.st_size > 1 << 30
    assert empty.st_blocks * 512 < 1 << 20
    (record,) = writer.reserve([600_000])  # more than half of the first step
    writer._placement.close()  # the step ahead
    assert writer.statistics().mark == 2 << 20
    assert os.stat(SHM / writer.name).st_blocks * 512 >= 2 << 20
    writer.abort([record])
    for _ in range(50):
        writer.abort(writer.reserve([600_000]))
    assert writer.statistics().mark == 2 << 20  # the same place again and again
    writer.close()


def test_a_reader_follows_the_growth() -> None:
    writer = RingWriter(64 << 20, slots=64, columns=1, growth=1 << 20)
    reader = attach(writer)
    held = []
    for number in range(20):
        (record,) = writer.reserve([2 << 20])
        writer.buffer(record)[-1] = number
        writer.commit([record])
        held.append(reader.open(record.handle))
    assert [int(view[-1]) for view in held] == list(range(20))
    held.clear()
    reader.close()
    writer.close()


def test_a_mark_beyond_what_is_there_takes_no_pages() -> None:
    """A reader touches ahead what the writer reserved, and takes nothing itself, whatever the mark says."""
    writer = RingWriter(64 << 20, slots=64, columns=1, growth=1 << 20)
    reader = attach(writer)
    record = send(writer, 600_000)
    writer._placement.close()  # the step ahead
    blocks = os.stat(SHM / writer.name).st_blocks
    writer._header[at.H_MARK] = 64 << 20
    view = reader.open(record.handle)
    populated()
    assert os.stat(SHM / writer.name).st_blocks == blocks
    del view
    reader.close()
    writer.close()


SHORT = """
import os, sys
from shm import *
writer = RingWriter(1 << 30, slots=1024, columns=4)
try:
    writer.reserve([100 << 20])
except NoSpace as error:
    print("first:", error)
print("mark", writer.statistics().mark, "capacity", writer.capacity >> 20)
offer = writer.offer(); reader = RingReader(offer, "r"); writer.admit(offer, "r")
held = []
try:
    while True:
        record, = writer.reserve([4 << 20])
        writer.buffer(record)[:] = len(held)
        writer.commit([record]); held.append(reader.open(record.handle))
except (NoSpace, RingFull) as error:
    print("then:", type(error).__name__, len(held), error)
print("capacity", writer.capacity >> 20, writer.statistics().largest_free)
info = describe(writer.name)
print("seen", info.capacity >> 20, info.largest_free)
try:
    writer.reserve([100 << 20], timeout=60)
except NoSpace as error:
    print("never:", error)
assert all(int(view[0]) == int(view[-1]) == n for n, view in enumerate(held))
del held[3:]
record, = writer.reserve([40 << 20], timeout=5)
writer.buffer(record)[:] = 9
print("goes on")
writer.close()
try:
    require_space(1 << 30)
except NoSpace as error:
    print("require:", error)
require_space(64 << 20)
"""


def test_a_short_dev_shm_is_a_clear_error_and_the_rest_is_used() -> None:
    done = run_python(SHORT, shm_size="64m")
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert lines[0].startswith("first: growing the ring from 0 B to 100 MiB needs 100 MiB, but /dev/shm has")
    assert "of 64 MiB free" in lines[0]
    assert "--shm-size" in lines[0]
    assert lines[1] == "mark 0 capacity 1024"  # nothing was taken: a smaller record may still fit
    assert lines[2].startswith("then: RingFull 15 ")
    assert lines[3] == "capacity 60 0"
    assert lines[4] == "seen 60 0"
    assert lines[5].startswith("never: growing the ring from 60 MiB to")
    assert lines[6] == "goes on"
    assert lines[7].startswith("require: a ring of 1 GiB does not fit: /dev/shm has")
    assert "the ring stays at 60 MiB" in done.stderr


def test_a_dev_shm_too_short_for_the_control_pages_holds_nothing_afterwards() -> None:
    code = """
import os
from shm import NoSpace, RingWriter
try:
    RingWriter(1 << 20, slots=16384)
except NoSpace as error:
    print(error, os.listdir("/dev/shm"))
"""
    done = run_python(code, shm_size="512k")
    assert done.stdout.startswith("the control pages of a ring needs 1.004 MiB"), done.stderr
    assert done.stdout.endswith("[]\n")


def test_a_column_without_pages_is_refused_and_not_a_bus_error() -> None:
    code = """
import os
from shm import NoSpace, RingWriter
writer = RingWriter(1 << 20, slots=16384, columns=2)
os.posix_fallocate(os.open("/dev/shm/rest", os.O_RDWR | os.O_CREAT), 0, 900 << 10)
try:
    writer.offer()
except NoSpace as error:
    print("refused:", error)
writer.close()
"""
    done = run_python(code, shm_size="2m")
    assert done.stdout.startswith("refused: a reader's column needs 260 KiB"), done.stderr


def test_require_space_asks_for_the_size_of_dev_shm() -> None:
    total = memory.space().total
    require_space(min(total, 1 << 20))
    with pytest.raises(NoSpace, match="does not fit"):
        require_space(total + 1)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (1 << 30, "1 GiB"), (3 << 41, "6 TiB")],
)
def test_sizes_for_people(nbytes: int, text: str) -> None:
    assert memory.human(nbytes) == text


def test_the_tightest_cgroup_above_decides(tmp_path: Path) -> None:
    inner = tmp_path / "pod" / "container"
    inner.mkdir(parents=True)
    (inner / "memory.max").write_text("max\n")
    (inner / "memory.current").write_text("5000\n")
    assert memory._walk(tmp_path, "/pod/container", "memory.max", "memory.current") == []
    (tmp_path / "pod" / "memory.max").write_text("10000\n")
    (tmp_path / "pod" / "memory.current").write_text("7000\n")
    (tmp_path / "pod" / "memory.stat").write_text("anon 1\ninactive_file 500\n")
    assert memory._walk(tmp_path, "/pod/container", "memory.max", "memory.current") == [3500]
    (inner / "memory.max").write_text("5100\n")
    assert sorted(memory._walk(tmp_path, "/pod/container", "memory.max", "memory.current")) == [100, 3500]
    (inner / "memory.max").write_text("4000\n")  # over its limit already
    assert 0 in memory._walk(tmp_path, "/pod/container", "memory.max", "memory.current")
    assert memory._walk(tmp_path, "/", "memory.max", "memory.current") == []


def test_space_is_told_as_it_is() -> None:
    now = memory.space()
    assert 0 < now.available <= now.free <= now.total
    assert memory.human(now.total) in str(now)
    with pytest.raises(NoSpace, match="a test needs 1 TiB|a test needs .* TiB"):
        memory.check(1 << 60, "a test")


@pytest.mark.parametrize(
    ("capacity", "slots", "columns"),
    [
        (0, 8, 1),
        (at.MAX_CAPACITY + at.PAGE, 8, 1),
        (4096, 0, 1),
        (4096, at.MAX_SLOTS + 8, 1),
        (4096, 8, 0),
        (4096, 8, 65),
    ],
)
def test_a_layout_has_bounds(capacity: int, slots: int, columns: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        RingWriter(capacity, slots=slots, columns=columns)


def test_what_describe_says_of_a_planted_file() -> None:
    with planted(sized(b"", 100)) as name:
        info = describe(name)
        assert (info.alive, info.capacity) == (False, 0)
