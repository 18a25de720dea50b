"""Ranks that Ray places: a real cluster of two nodes, each on a host of its own; and no Ray at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

import transport
from tests.engine.processes import python
from tests.hosts.head import Head, check, head_on
from tests.hosts.namespaces import Host, two_hosts

_STORE = str(80 << 20)  # the least that Ray takes for its own objects; no tensor goes there
_PORT = 6399
# Nothing leaves the machine or is left on it, and what else fills its memory is no reason to kill a rank.
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_memory_monitor_refresh_ms": "0",
}


@contextmanager
def node(host: Host, *flags: str) -> Iterator[None]:
    """A node of a Ray cluster with one processor, ready when this begins."""
    # Ray's files are a host's own, as they are where there are two machines.
    host.done(["sh", "-c", "mkdir -p /tmp/ray && mount -t tmpfs tmpfs /tmp/ray"])
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
    size = ["--num-cpus", "1", "--object-store-memory", _STORE, "--node-ip-address", host.address]
    with host.run([*start, *size, *flags], environ=_QUIET, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        said = []
        while "Ray runtime started" not in (line := process.stdout.readline()):
            said.append(line)
            assert line, "".join(said)
        try:
            yield
        finally:
            process.terminate()
            process.communicate()


@pytest.fixture
def cluster() -> Iterator[tuple[Host, Host]]:
    pytest.importorskip("ray", reason="needs Ray: pip install ray")
    existed = Path("/tmp/ray").exists()
    with two_hosts() as (near, far):
        first = ["--head", "--port", str(_PORT), "--include-dashboard", "false"]
        with node(near, *first), node(far, "--address", f"{near.address}:{_PORT}"):
            yield near, far
    if not existed:
        with suppress(OSError):
            Path("/tmp/ray").rmdir()


def workers(head: Head) -> dict[str, int]:
    """By host, the worker that serves there."""
    peers = head.ask("peers")
    return {rank["workers"][0]["host"]: rank["workers"][0]["pid"] for rank in peers if not rank["error"]}


@pytest.mark.netns
@pytest.mark.stress
def test_ray_places_the_ranks_and_starts_them_again(
    cluster: tuple[Host, Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    near, _ = cluster
    for name, value in (_QUIET | {"RAY_ADDRESS": f"{near.address}:{_PORT}"}).items():
        monkeypatch.setenv(name, value)
    flags = ["-dp", "2", "--data-parallel-backend", "ray", "--insecure", "--startup-timeout", "400"]
    with head_on(near, *flags) as head:
        assert head.answer() == "ready"
        assert check(head.encode(16)) == {"rank0", "rank1"}
        first = workers(head)
        assert set(first) == {"head", "far"}
        os.kill(parent(first["far"]), signal.SIGKILL)  # the actor; its worker ends with it
        assert check(head.encode(16)) <= {"rank0", "rank1"}
        while workers(head).keys() != {"head", "far"} or workers(head)["far"] == first["far"]:
            time.sleep(0.1)
        assert check(head.encode(16)) == {"rank0", "rank1"}
        last = workers(head)
        assert last["head"] == first["head"]
        head.end()
    assert head.process.returncode == 0
    while any(Path(f"/proc/{pid}").exists() for pid in last.values()):  # the suite's timeout is the limit
        time.sleep(0.05)


@pytest.mark.netns
@pytest.mark.stress
def test_an_actor_that_fails_ends_the_start_with_what_ray_says(
    cluster: tuple[Host, Host], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    near, _ = cluster
    for name, value in (_QUIET | {"RAY_ADDRESS": f"{near.address}:{_PORT}"}).items():
        monkeypatch.setenv(name, value)
    secret = transport.make_keys(tmp_path, "head", public=tmp_path)
    flags = ["-dp", "2", "--data-parallel-backend", "ray", "--startup-timeout", "400"]
    keys = ["--curve-key", str(secret), "--curve-clients", str(tmp_path)]  # and no --curve-server
    with near.run([sys.executable, "-m", "engine", "run", *flags, *keys]) as head:
        _, said = head.communicate()
    assert head.returncode == 1
    assert "tensorferry: Ray's actor for rank" in said
    assert "curve_server (not set): give the file" in said


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def test_without_ray_the_flag_says_what_to_install() -> None:
    script = (
        "import sys; sys.modules['ray'] = None; from engine.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    with python("-c", script, "run", "--data-parallel-backend", "ray") as process:
        shown, said = process.communicate()
    assert (process.returncode, shown) == (1, "")
    assert said == (
        "tensorferry: data_parallel_backend is ray, which is not installed: pip install ray"
        " (tensorferry's extra `ray`)\n"
    )
