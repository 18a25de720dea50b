"""Names of hosts: known late, known as IPv6 or as both, and what of a name travels."""

from __future__ import annotations

from multiprocessing import Pipe
from pathlib import Path

import pytest

from tests.hosts import scenes
from tests.hosts.namespaces import Host, two_hosts
from tests.hosts.scenes import MIB
from tests.hosts.test_tcp import told
from transport.conformance import running

pytestmark = pytest.mark.netns

_LOOPBACK = "127.0.0.1 localhost\n::1 localhost\n"


def names(host: Host, folder: Path, lines: str) -> Path:
    """Give a host its own /etc/hosts; the file, to which more can be added."""
    path = folder / host.name
    path.write_text(lines)
    host.done(["mount", "--bind", path, "/etc/hosts"])
    return path


def test_a_name_that_is_known_late_is_found(tmp_path: Path) -> None:
    with two_hosts() as (head, far):
        file = names(far, tmp_path, _LOOPBACK)
        asks, asked = Pipe(duplex=False)
        here, there = Pipe(duplex=False)
        with (
            asks,
            asked,
            here,
            there,
            running(scenes.front, head.pid, there, f"tcp://{head.address}:29550", {}, 1, MIB),
            running(scenes.who_asks_for_names, far.pid, asked, "tcp://late-head:29550", "far", {}),
        ):
            assert "late-head" in told(asks)["unknown"]
            with file.open("a") as more:
                more.write(f"{head.address} late-head\n")
            assert told(here)["backend"].startswith(f"tcp: a bulk connection at {head.address}")
            assert told(here)["right"]


@pytest.mark.parametrize(
    ("listens", "dials", "way"),
    [
        ("localhost", "localhost", "127.0.0.1"),
        ("[::1]", "[::1]", "::1"),
        ("[fd77::1]", "head6", "fd77::1"),
        ("10.77.0.1", "head", "10.77.0.1"),  # which has both, IPv6 first
        ("[::]", "head", "::"),  # reached by IPv4 as well
    ],
)
def test_names_and_addresses_of_both_kinds(tmp_path: Path, listens: str, dials: str, way: str) -> None:
    with two_hosts() as (head, far):
        for number, host in enumerate((head, far), 1):
            host.done(["ip", "address", "add", f"fd77::{number}/64", "dev", host.interface, "nodad"])
            names(host, tmp_path, f"{_LOOPBACK}fd77::1 head6\nfd77::1 head\n10.77.0.1 head\n")
        here, there = Pipe(duplex=False)
        dialler = head if dials in ("localhost", "[::1]") else far
        options = {"backend": "tcp"}
        with (
            here,
            there,
            running(scenes.front, head.pid, there, f"tcp://{listens}:29550", options, 2, MIB),
            running(scenes.peer, dialler.pid, f"tcp://{dials}:29550", "far", options),
        ):
            assert told(here)["backend"] == f"tcp: a bulk connection at {way}"
            assert told(here)["right"]


def test_a_name_that_leaves_this_host_is_not_loopback(tmp_path: Path) -> None:
    with two_hosts() as (head, _):
        names(head, tmp_path, f"{_LOOPBACK}10.77.0.1 head\n")
        here, there = Pipe(duplex=False)
        with here, there, running(scenes.who_may_not_listen, head.pid, there, "tcp://head:0"):
            assert told(here)["error"].startswith("tcp://10.77.0.1:0 is not a loopback address")
