"""Data-parallel ranks on another host: they serve, die, come back, and outlive their head; real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.hosts.head import MODEL, Head, check, head_on
from tests.hosts.namespaces import Host, two_hosts

pytestmark = pytest.mark.netns

TWO = ["-dp", "2", "--insecure"]


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    with two_hosts() as both:
        yield both


@contextmanager
def headless(far: Host, head: Host, *flags: str) -> Iterator[subprocess.Popen[str]]:
    """Rank 1 on the far host, as an operator starts it."""
    command = [sys.executable, "-m", "engine", "run", "--headless", "-dpr", "1", "--model", MODEL]
    with far.run([*command, *TWO, "--data-parallel-address", head.address, *flags]) as process:
        yield process


def remote(head: Head) -> dict[str, Any]:
    """What the head says of rank 1."""
    peers = head.ask("peers")
    return {**peers[1], **peers[1]["workers"][0]}


def wait_until_back(head: Head, old: int) -> dict[str, Any]:
    """Until another process serves as rank 1; the timeout of the suite is the limit."""
    while (rank := remote(head))["error"] or rank["pid"] == old:
        time.sleep(0.05)
    return rank


def test_ranks_of_another_host_die_and_come_back(hosts: tuple[Host, Host]) -> None:
    near, far = hosts
    with headless(far, near) as there, head_on(near, *TWO, "-dpl", "1") as head:
        assert head.answer() == "ready"
        assert check(head.encode(16)) == {"rank0", "rank1"}
        first = remote(head)
        local = head.ask("peers")[0]["workers"][0]
        assert (local["host"], first["host"]) == ("head", "far")
        assert local["backend"].startswith("shm: ")
        assert not first["backend"].startswith("shm")

        os.kill(first["pid"], signal.SIGSTOP)  # so that it has what it was sent when it dies
        head.tell("encode 24")
        results = [head.answer()]  # the head receives once both have all they may have
        os.kill(first["pid"], signal.SIGKILL)
        results += [head.answer() for _ in range(23)]
        assert "rank0" in check(results)
        second = wait_until_back(head, first["pid"])  # its own host has started it again
        assert "rank1" in check(head.encode(16))

        there.kill()  # and everything that it started ends with it
        while not remote(head)["error"]:
            time.sleep(0.05)
        assert check(head.encode(6)) == {"rank0"}
        with headless(far, near) as again:
            wait_until_back(head, second["pid"])
            assert "rank1" in check(head.encode(16))
            assert head.ask("statistics")["late"] == 0
            said = head.end()
            _, last = again.communicate()
    assert f"rank1 (pid {first['pid']} on far) is gone: the connection ended; 2 requests go to the" in said
    assert said.count(" is back\n") == 2
    assert again.returncode == 0
    assert "tensorferry: rank 1: the head ended its run\n" in last
    while os.path.exists(f"/proc/{second['pid']}"):  # the timeout of the suite is the limit
        time.sleep(0.05)


def test_a_headless_host_outlives_its_head_and_serves_the_next(hosts: tuple[Host, Host]) -> None:
    near, far = hosts
    with headless(far, near) as there:
        with head_on(near, *TWO, "-dpl", "1") as first:
            assert first.answer() == "ready"
            assert check(first.encode(8)) == {"rank0", "rank1"}
            first.process.kill()
        with head_on(near, *TWO, "-dpl", "1") as second:
            assert second.answer() == "ready"
            assert check(second.encode(8)) == {"rank0", "rank1"}
            second.end()
        _, said = there.communicate()
    assert there.returncode == 0
    assert f"rank1 lost the head at tcp://{near.address}:29550; it waits up to 300 s for the next" in said
