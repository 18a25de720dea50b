"""Tensors between two hosts: which way they take; a pulled cable, a narrow one, a host that is gone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import pytest

from tests.hosts import scenes
from tests.hosts.namespaces import Host, two_hosts
from tests.hosts.scenes import MIB
from transport.conformance import WAIT, running

pytestmark = pytest.mark.netns


@contextmanager
def scene(head: Host, far: Host, *, count: int, nbytes: int, **options: object) -> Iterator[Connection]:
    """The front on one host, which tells what it sees, and a peer on the other."""
    address = f"tcp://{head.address}:29550"
    here, there = Pipe(duplex=False)
    with (
        here,
        there,
        running(scenes.front, head.pid, there, address, options, count, nbytes),
        running(scenes.peer, far.pid, address, "far", options),
    ):
        yield here


def told(front: Connection) -> dict[str, Any]:
    assert front.poll(2 * WAIT), "the front says nothing"
    said: dict[str, Any] = front.recv()
    return said


@pytest.mark.parametrize("one_network", [False, True])
def test_tcp_where_memory_is_not_shared_whatever_the_hosts_are_called(one_network: bool) -> None:
    """Two machines of one name; and containers of one host, which share its network alone."""
    with (
        two_hosts(one_network=one_network, names=("same", "same")) as (head, far),
        scene(head, far, count=4, nbytes=4 * MIB) as front,
    ):
        way = f"tcp: a bulk connection at {head.address}; not shm: "
        assert told(front)["backend"].startswith(way)
        outcome = told(front)
        assert outcome["right"]
        assert outcome["nbytes"].keys() == {"tcp"}


@pytest.mark.parametrize("seconds", [1, pytest.param(10, marks=pytest.mark.stress)])
def test_a_pulled_cable_only_delays(seconds: int) -> None:
    with two_hosts() as (head, far), scene(head, far, count=8, nbytes=4 * MIB) as front:
        told(front)
        far.done(["sh", "-c", f"ip link set {far.interface} down; sleep {seconds}"])
        far.cable("up")
        outcome = told(front)
        assert outcome["right"]
        assert outcome["nbytes"].keys() == {"tcp"}


def narrow(host: Host, rate: str) -> None:
    """Let no more than that leave a host."""
    limit = f"root tbf rate {rate} burst 64kb latency 200ms"
    host.done(["tc", "qdisc", "add", "dev", host.interface, *limit.split()])


def test_a_narrow_cable_lets_small_messages_pass_large_ones() -> None:
    with two_hosts() as (head, far):
        narrow(head, "50mbit")
        with scene(head, far, count=3, nbytes=3 * MIB) as front:
            told(front)
            outcome = told(front)
            assert outcome["right"]
            assert outcome["before"] < 3


@pytest.mark.parametrize("backend", ["tcp", "auto"])
def test_the_payload_for_two_peers_of_a_host_crosses_the_cable_once(backend: str) -> None:
    """As the cable counts it; the first may be there before they know each other, and crosses twice then."""
    count, nbytes = 10, 4 * MIB
    with two_hosts() as (head, far):
        address = f"tcp://{head.address}:29550"
        options = {"backend": backend}
        here, there = Pipe(duplex=False)
        with (
            here,
            there,
            running(scenes.front_of_two, head.pid, there, address, options, count, nbytes),
            running(scenes.peer, far.pid, address, "first", options),
            running(scenes.peer, far.pid, address, "second", options),
        ):
            outcome = told(here)
        assert outcome["right"]
        crossed = outcome["bulk"]["crossed once"]
        assert crossed in (count - 1, count)
        assert 2 * count - crossed < received(far) / nbytes < 2 * count - crossed + 1


def received(host: Host) -> int:
    """The bytes that came over a host's cable."""
    (link,) = json.loads(host.done(["ip", "-json", "-stats", "link", "show", host.interface]))
    nbytes: int = link["stats64"]["rx"]["bytes"]
    return nbytes


def test_a_host_that_is_gone_ends_the_link_in_time() -> None:
    with two_hosts() as (head, far):
        narrow(head, "200mbit")  # so that it is in the middle of them for seconds
        with scene(head, far, count=40, nbytes=4 * MIB, tcp_timeout=1.0) as front:
            told(front)
            far.cable("down")
            gone = told(front)["gone"]
        assert "far" in gone
        assert "bulk connection" in gone


def test_a_host_that_is_gone_while_nothing_but_small_is_under_way() -> None:
    """One small message, and one word on the bulk connection: the kernel sends no keepalive then."""
    with two_hosts() as (head, far):
        address, options = f"tcp://{head.address}:29550", {"tcp_timeout": 0.5}
        here, there = Pipe()
        with (
            here,
            there,
            running(scenes.idle_front, head.pid, there, address, options),
            running(scenes.peer, far.pid, address, "far", options),
        ):
            assert told(here)["right"]
            far.cable("down")
            here.send("go on")
            left = told(here)["left"]
    assert left == {"far": "is not reached: the bulk connection is lost for 0.5 s"}
