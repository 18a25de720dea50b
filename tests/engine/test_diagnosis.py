"""ps, top, sweep and doctor over real rings: what they say is so, and the living never notice."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import shm
from engine import signals
from engine.cli import main
from tests.shm.rings import attach, ring, run_python

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "engine"]
SHM = Path("/dev/shm")
WAIT = 60.0
OWNER = """
import sys
import shm
from tests.shm.rings import attach
writer = shm.RingWriter(1 << 20, slots=8, columns=1)
reader = attach(writer, "rank0")
records = writer.reserve([5000, 6000], columns=[reader.column])
writer.commit(records)
view = reader.open(records[0].handle)
print(writer.name, flush=True)
sys.stdin.read()
"""

STAYS = """
import subprocess, sys
import shm
writer = shm.RingWriter(1 << 30, slots=1024, columns=1)
records = []
try:
    while True:
        records += writer.reserve([4 << 20])
except (shm.NoSpace, shm.RingFull):
    writer.abort(records[1:])
writer.commit(records[:1], keep=True)
for arguments in (["ps", "--json"], ["ps"], ["top"]):
    command = [sys.executable, "-m", "engine", *arguments]
    shown = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    print(shown, end=chr(0) if arguments != ["top"] else "")
writer.close()
"""


def tensorferry(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | environ,
        check=False,
        timeout=100,
    )


def parsed(*arguments: str, code: int = 0) -> Any:
    done = tensorferry(*arguments, "--json")
    assert (done.returncode, done.stderr) == (code, "")
    return json.loads(done.stdout)


@contextlib.contextmanager
def owner() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process with a ring, a reader and two records, one of them open; killed at the end if it lives."""
    with subprocess.Popen(
        [sys.executable, "-c", OWNER], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        name = process.stdout.readline().strip()
        try:
            yield process, name
        finally:
            process.kill()
            process.wait()
            (SHM / name).unlink(missing_ok=True)


class TestPs:
    def test_says_whose_it_is_how_full_and_who_reads(self) -> None:
        with owner() as (process, name):
            (info,) = (info for info in parsed("ps") if info["name"] == name)
            assert (info["alive"], info["pid"]) == (True, process.pid)
            assert info["program"].startswith("python")
            assert (info["capacity"], info["live"], info["used"], info["made"]) == (1 << 20, 2, 11000, 2)
            assert 0 < info["largest_free"] <= (1 << 20) - 11000
            (reader,) = info["readers"]
            assert (reader["name"], reader["pid"]) == ("rank0", process.pid)
            assert (reader["opened"], reader["nbytes"], reader["pending"]) == (1, 5000, 1)
            assert reader["oldest"] == info["oldest"] > 0
            shown = " ".join(tensorferry("ps").stdout.split())
            assert f"{name} {process.pid} python" in shown
            assert f"{name} rank0 {process.pid} 1 4.883 KiB " in shown

    def test_says_who_is_dead_and_what_removes_it(self) -> None:
        with owner() as (process, name):
            process.kill()
            process.wait()
            (info,) = (info for info in parsed("ps") if info["name"] == name)
            assert (info["alive"], info["pid"], info["program"], info["readers"]) == (
                False,
                process.pid,
                "",
                [],
            )
            shown = tensorferry("ps").stdout
            assert f"{process.pid} dead" in shown
            assert "tensorferry sweep" in shown

    def test_shows_the_records_of_one_and_what_each_reader_does(self) -> None:
        with owner() as (process, name):
            for beginning in (name, name[:-20], name.split(".")[2][:8]):
                found = parsed("ps", beginning)
                assert found["segment"]["name"] == name
                first, second = sorted(found["records"], key=lambda record: record["nbytes"])
                assert (first["nbytes"], second["nbytes"]) == (5000, 6000)
                assert second["offset"] + 6000 <= first["offset"]  # the largest is placed first
                assert [reader["state"] for reader in first["readers"]] == ["open"]
                assert [reader["state"] for reader in second["readers"]] == ["not opened"]
                assert 0 < first["readers"][0]["seconds"] <= first["age"]
            shown = " ".join(tensorferry("ps", name).stdout.split())
            assert f"rank0 (pid {process.pid}): open for" in shown
            assert f"rank0 (pid {process.pid}): not opened" in shown

    def test_shows_what_the_owner_alone_has(self) -> None:
        with ring() as (writer, _):
            views = [writer.lend(record, keep=False) for record in writer.reserve([5000, 300 << 10])]
            (info,) = (info for info in parsed("ps") if info["name"] == writer.name)
            assert (info["live"], info["unpublished"], info["unpublished_nbytes"]) == (2, 2, 312200)
            for command in ("ps", "top"):
                shown = " ".join(tensorferry(command).stdout.split())
                assert "304.9 KiB 1 MiB ≤ 719.1 KiB" in shown
                assert f"{writer.name} (owner) {os.getpid()} 2 304.9 KiB – – – –" in shown
                assert "(owner) is no reader: loans not sent yet, tensors just being written" in shown
            assert parsed("ps", writer.name)["segment"]["unpublished"] == 2
            shown = tensorferry("ps", writer.name).stdout
            assert "no records" not in shown
            assert shown.endswith("not listed: 2 records (304.9 KiB) that the owner alone has\n")
            del views
            writer.look()
            writer.commit(writer.reserve([64 << 10]), keep=True)
            for arguments in (["ps"], ["ps", writer.name], ["top"]):
                shown = tensorferry(*arguments).stdout
                assert "64 KiB 1 MiB 960 KiB" in " ".join(shown.split())
                assert not [word for word in ("≤", "(owner)", "not listed") if word in shown]

    def test_shows_the_size_that_a_ring_stays_at(self) -> None:
        done = run_python(STAYS, shm_size="64m")
        assert done.returncode == 0, done.stderr
        info, ps, top = done.stdout.split("\0")
        assert "the ring stays at 60 MiB" in done.stderr
        assert [json.loads(info)[0][key] for key in ("capacity", "largest_free")] == [60 << 20, 56 << 20]
        for shown in (ps, top):
            assert "4 MiB 60 MiB 56 MiB" in " ".join(shown.split())

    def test_a_name_that_fits_none_or_several_is_one_line(self) -> None:
        with owner() as (_, name), ring() as (writer, _):
            done = tensorferry("ps", "nothing")
            assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
            assert "no segment begins with 'nothing'" in done.stderr
            done = tensorferry("ps", "tensorferry.")
            assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
            assert name in done.stderr
            assert writer.name in done.stderr

    def test_a_half_made_segment_is_listed_and_refused_in_one_line(self) -> None:
        name = f"tensorferry.{os.getuid()}.{os.urandom(16).hex()}"
        (SHM / name).touch(0o600)
        try:
            assert [info["alive"] for info in parsed("ps") if info["name"] == name] == [False]
            done = tensorferry("ps", name)
            assert (done.returncode, done.stderr.count("\n")) == (1, 1)
            assert "too short for a header" in done.stderr
        finally:
            (SHM / name).unlink()

    def test_no_segment_is_said(self) -> None:
        if shm.names():
            pytest.skip("others have segments here")
        assert tensorferry("ps").stdout == "no segments\n"
        assert parsed("ps") == []


class TestSweep:
    def test_removes_the_dead_and_leaves_the_living(self) -> None:
        with owner() as (process, name), ring() as (writer, reader):
            (record,) = writer.reserve([5000])
            writer.buffer(record)[:] = 7
            writer.commit([record], keep=True)
            view = reader.open(record.handle)
            assert name not in parsed("sweep")["segments"]
            process.kill()
            process.wait()
            planned = parsed("sweep", "--dry-run")
            assert planned["dry_run"] is True
            assert name in planned["segments"]
            assert writer.name not in planned["segments"]
            assert (SHM / name).exists()
            assert name in parsed("sweep")["segments"]
            assert not (SHM / name).exists()
            assert (SHM / writer.name).exists()
            assert bytes(view) == bytes([7] * 5000)
            assert name not in parsed("sweep")["segments"]

    def test_a_stopped_owner_is_a_living_one(self) -> None:
        with owner() as (process, name):
            process.send_signal(signal.SIGSTOP)
            assert name not in parsed("sweep")["segments"]
            assert [info["alive"] for info in parsed("ps") if info["name"] == name] == [True]
            assert len(parsed("ps", name)["records"]) == 2


def test_looking_changes_nothing() -> None:
    with ring() as (writer, reader):
        other = attach(writer, "other")
        records = writer.reserve([5000, 6000], columns=[reader.column, other.column])
        writer.commit(records)
        view = reader.open(records[0].handle)
        path = SHM / writer.name
        before, blocks = path.read_bytes(), path.stat().st_blocks
        for arguments in (
            ["ps"],
            ["ps", writer.name],
            ["top"],
            ["sweep"],
            ["sweep", "--dry-run"],
            ["doctor"],
        ):
            tensorferry(*arguments)
        assert path.read_bytes() == before
        assert path.stat().st_blocks == blocks
        del view
        other.close()
        writer.drop(records, reader.column)


class TestTop:
    def test_looks_once_where_there_is_no_terminal(self) -> None:
        with owner() as (process, name):
            done = tensorferry("top")
            assert done.returncode == 0
            assert "not a terminal" in done.stderr
            assert f"{name} rank0 {process.pid} 1 " in " ".join(done.stdout.split())
            assert name in {info["name"] for info in parsed("top")}

    @pytest.mark.parametrize("key", [b"q", b"\x03"], ids=["q", "ctrl-c"])
    def test_shows_what_changes_until_it_is_quit(self, key: bytes) -> None:
        with ring() as (writer, _):
            letters = writer.name.split(".")[2][:8].encode()
            with terminal("top") as (process, descriptor):
                read_until(descriptor, letters)
                assert not termios.tcgetattr(descriptor)[3] & termios.ECHO  # what is typed isn't shown
                (record,) = writer.reserve([77 << 10])
                writer.commit([record], keep=True)
                read_until(descriptor, b"77 KiB")
                os.write(descriptor, key)
                read_until(descriptor, b"\x1b[?1049l")  # the screen is as it was
                assert process.wait(WAIT) == 0
                assert termios.tcgetattr(descriptor)[3] & termios.ECHO


@contextlib.contextmanager
def terminal(*arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The command on a terminal of 100 columns of its own, which is its controlling one."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    script = (
        "import fcntl, runpy, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
        "runpy.run_module('engine', run_name='__main__')"
    )
    environ = {
        name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")
    }
    with subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=ROOT,
        env=environ | {"TERM": "xterm"},
        start_new_session=True,
    ) as process:
        try:
            yield process, ours
        finally:
            process.kill()
            process.wait()
            os.close(ours)
            os.close(theirs)


def read_until(descriptor: int, wanted: bytes) -> bytes:
    """What comes until `wanted` is in it; fails after `WAIT`."""
    seen, deadline = b"", time.monotonic() + WAIT
    while wanted not in seen:
        assert select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0], seen
        seen += os.read(descriptor, 65536)
    return seen


class TestUnreadable:
    """A /dev/shm that is not there, as in a bare chroot, or that this user may not list."""

    @pytest.fixture(params=[errno.ENOENT, errno.EACCES])
    def why(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
        scandir = os.scandir

        def refuse(path: Any = ".") -> Any:
            if str(path) == "/dev/shm":
                raise OSError(request.param, os.strerror(request.param), str(path))
            return scandir(path)

        monkeypatch.setattr(signals, "install", lambda: None)  # they are pytest's here
        monkeypatch.setattr(os, "scandir", refuse)
        return os.strerror(request.param)

    @pytest.mark.parametrize("command", ["ps", "ps f7d", "top", "top --json", "sweep", "sweep --dry-run"])
    def test_is_a_line_of_who_looks(self, command: str, why: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(command.split()) == 1
        line = f"tensorferry: /dev/shm can't be read: {why}; `tensorferry doctor` says what to change\n"
        assert capsys.readouterr() == ("", line)

    def test_is_no_end_of_the_doctor(self, why: str, capsys: pytest.CaptureFixture[str]) -> None:
        code = main(["doctor", "--json"])
        findings = json.loads(capsys.readouterr().out)["findings"]
        assert "versions" in {finding["what"] for finding in findings}  # the last look
        (segments,) = [finding for finding in findings if finding["what"] == "segments"] or [None]
        if why == os.strerror(errno.ENOENT):
            assert segments is None  # the look at /dev/shm itself says so
        else:
            assert code == 1
            assert segments == {
                "what": "segments",
                "status": "problem",
                "found": f"/dev/shm can't be read: {why}",
                "advice": "As root: chmod 1777 /dev/shm",
            }


class TestDoctor:
    def test_says_what_there_is(self) -> None:
        with owner() as (process, name):
            process.kill()
            process.wait()
            found = parsed("doctor", "--shm-ring-gb", "0.01")
            assert (SHM / name).exists()
        findings = {finding["what"]: finding for finding in found["findings"]}
        assert found["problems"] == 0
        assert findings["/dev/shm"]["status"] == findings["locks"]["status"] == "ok"
        assert findings["segments"]["status"] == "note"
        assert "of dead processes hold" in findings["segments"]["found"]
        assert "tensorferry sweep" in findings["segments"]["advice"]
        assert {"memory", "open files", "locked memory", "huge pages", "RemoveIPC", "CUDA"} <= findings.keys()
        assert f"python {sys.version.split()[0]}" in findings["versions"]["found"]
        for library in ("torch", "numpy", "pyzmq", "libzmq", "msgspec", "posix_ipc", "kernel"):
            assert f"{library} " in findings["versions"]["found"]
        for finding in findings.values():
            assert finding["status"] in ("ok", "note", "problem")
            assert bool(finding["advice"]) == (finding["status"] != "ok")

    def test_a_ring_that_can_never_fit_is_a_problem_with_a_remedy(self) -> None:
        done = tensorferry("doctor", "--json", TENSORFERRY_SHM_RING_GB="1e6")
        found = json.loads(done.stdout)
        problems = {f["what"]: f for f in found["findings"] if f["status"] == "problem"}
        assert (done.returncode, done.stderr) == (1, "")
        assert problems.keys() >= {"/dev/shm", "memory"}
        assert found["problems"] == len(problems)
        assert "can never fit" in problems["/dev/shm"]["found"]
        assert "--shm-size" in problems["/dev/shm"]["advice"]

    def test_few_open_files_are_a_problem_and_what_needs_no_ring_has_room(self) -> None:
        script = 'ulimit -n 100; exec "$@"'
        flags = ["--shm-ring-gb", "1e6", "--tensor-transport", "frames"]
        done = subprocess.run(
            ["sh", "-c", script, "sh", *COMMAND, "doctor", *flags],
            capture_output=True,
            text=True,
            cwd=ROOT,
            check=False,
            timeout=100,
        )
        shown = " ".join(done.stdout.split())
        assert (done.returncode, done.stderr) == (1, "")
        assert "problem open files 100 → Every peer takes some descriptors: ulimit -n 1024" in shown
        assert "ok /dev/shm" in shown
        assert "--tensor-transport frames makes no ring" in shown
        assert shown.endswith(" problems: 1")

    def test_a_mistake_is_one_line(self) -> None:
        done = tensorferry("doctor", "--shm-ring-gb", "much")
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
