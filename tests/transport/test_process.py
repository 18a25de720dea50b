"""Which process a peer is, and whether it still runs: killed, stopped, in another pid namespace."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.crash.harness import until
from transport.process import Process, own_mark, recognise

TELLS = """
import ctypes, os, sys, threading
from transport.process import own_mark
print(os.getpid(), own_mark().hex(), flush=True)
"""
LASTS = TELLS + "sys.stdin.read()"
# The process goes on in its second thread; /proc shows the first one as a zombie.
FIRST_THREAD_ENDS = (
    TELLS + "threading.Thread(target=sys.stdin.read).start(); ctypes.CDLL(None).pthread_exit(0)"
)


@contextmanager
def another(code: str = LASTS, *before: str) -> Iterator[tuple[subprocess.Popen[str], int, bytes]]:
    """A Python process that tells its pid and mark and lasts; what it told."""
    command = [*before, sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            pid, mark = process.stdout.readline().split(" ")
            yield process, int(pid), bytes.fromhex(mark.strip())
        finally:
            process.kill()


def test_a_process_runs_until_it_is_killed_waited_for_or_not() -> None:
    with another() as (process, pid, mark):
        seen = recognise(pid, mark)
        assert seen is not None
        assert seen.runs()
        process.send_signal(signal.SIGSTOP)
        assert seen.runs()
        process.kill()
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # it is dead, and still in /proc
        assert not seen.runs()
        process.wait()
        assert not seen.runs()


def test_a_process_whose_first_thread_ended_runs() -> None:
    with another(FIRST_THREAD_ENDS) as (process, pid, mark):
        seen = recognise(pid, mark)
        assert seen is not None
        until(lambda: "zombie" in Path(f"/proc/{pid}/status").read_text(), "the first thread has ended")
        assert seen.runs()
        assert process.poll() is None


def test_the_next_process_with_its_pid_is_another() -> None:
    own = recognise(os.getpid(), own_mark())
    assert own is not None
    assert own.runs()
    assert not Process(own.pid, own.started - 1).runs()


def test_who_claims_to_be_another_is_not_recognised() -> None:
    with another() as (_, pid, mark):
        assert recognise(os.getpid(), mark) is None
        assert recognise(pid, own_mark()) is None
        assert recognise(pid, b"") is None
        assert recognise(1 << 62, mark) is None


@pytest.mark.skipif(os.getuid() != 0, reason="only root can make a pid namespace")
@pytest.mark.parametrize("proc", ["--mount-proc", "--fork"])  # with a /proc of its own, and with ours
def test_a_process_of_another_pid_namespace_is_not_recognised(proc: str) -> None:
    """Its pid is somebody else's here; a container that kept the host's /proc knows not even itself."""
    with another(LASTS, "unshare", "--pid", "--fork", "--kill-child", proc) as (_, pid, mark):
        assert pid == 1
        assert bool(mark) == (proc == "--mount-proc")
        assert recognise(pid, mark) is None
