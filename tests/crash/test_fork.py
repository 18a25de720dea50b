"""Children: nothing of the parent's is released or kept."""

from __future__ import annotations

import gc
import multiprocessing
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import transport
from tests.crash.harness import (
    WAIT,
    Stage,
    config,
    digest,
    folder,
    pattern,
    running,
    segments_of,
    until,
)
from tests.forks import raw_fork, reap
from transport import Closed

ROOT = Path(__file__).parents[2]
_MISUSED: list[Callable[[], None]] = []  # what a child is to do; inherited by it


def misuse(endpoint: transport.Endpoint, held: list[transport.Message]) -> None:
    """What a child may try with its parent's things: every call is `Closed`, dropping does nothing."""
    calls: list[Callable[[], object]] = [
        lambda: endpoint.send({"bytes": np.zeros(100_000, np.uint8)}, to="front"),
        lambda: endpoint.try_send({"a": 1}, to="front"),
        lambda: endpoint.forward(held[0], to="front"),
        lambda: endpoint.loan((4,), np.uint8).__enter__(),
        lambda: endpoint.receive(timeout=0),
        endpoint.try_receive,
        lambda: endpoint.wait_for_peers(1, timeout=0),
        lambda: endpoint.connect("ipc:///nowhere", timeout=0),
        lambda: endpoint.listen("ipc:///nowhere"),
        lambda: endpoint.peers,
        endpoint.statistics,
        endpoint.fileno,
    ]
    for call in calls:
        with pytest.raises(Closed, match="made in process"):
            call()
    endpoint.close()
    held.clear()
    gc.collect()


# ------------------------------------------------------------------------------------ ways to have children


def by_fork(fork: Callable[[], int]) -> None:
    child = fork()
    if not child:
        code = 1
        try:
            _MISUSED[0]()
            code = 0
        finally:
            os._exit(code)
    assert reap(child) == 0


def by_exit() -> None:
    """The child leaves by sys.exit, through every `with` and `finally` of its parent."""
    child = os.fork()
    if not child:
        _MISUSED[0]()
        sys.exit(0)
    assert reap(child) == 0


def by_multiprocessing() -> None:
    process = multiprocessing.get_context("fork").Process(target=_MISUSED[0])
    process.start()
    process.join()
    assert process.exitcode == 0
    process.close()


class Misusing(torch.utils.data.Dataset[int]):
    """A data set whose workers inherit what the process has open."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        if index == 0:
            _MISUSED[0]()
        return index


def by_data_loader() -> None:
    loader = torch.utils.data.DataLoader(Misusing(), num_workers=2, multiprocessing_context="fork")
    assert [int(batch) for batch in loader] == [0, 1]


def by_program() -> None:
    """A program that inherits descriptors has none of ours."""
    command = ["sh", "-c", "ls -l /proc/$$/fd"]
    listing = subprocess.run(command, close_fds=False, capture_output=True, text=True, check=True).stdout
    for ours in ("/dev/shm", "eventfd", "eventpoll"):
        assert ours not in listing


WAYS: dict[str, Callable[[], None]] = {
    "os.fork": lambda: by_fork(os.fork),
    "fork from C": lambda: by_fork(raw_fork),
    "multiprocessing": by_multiprocessing,
    "DataLoader": by_data_loader,
    "close_fds=False": by_program,
    "sys.exit": by_exit,
}


def have_children(address: str, way: str) -> None:
    """A process with leases open and a ring of its own that has a child, and goes on after it."""
    with transport.connect(address, name="parent", config=config(), timeout=WAIT) as endpoint:
        held = [endpoint.receive(timeout=WAIT) for _ in range(2)]
        endpoint.send({"bytes": pattern(3, 100_000)}, to="front")
        _MISUSED.append(lambda: misuse(endpoint, held))
        WAYS[way]()
        right = [
            digest(message.body["bytes"]) == digest(pattern(n, 90_000)) for n, message in enumerate(held)
        ]
        endpoint.send({"right": right, "bytes": pattern(4, 100_000)}, to="front")
        endpoint.receive(timeout=WAIT)
        _MISUSED.clear()


@pytest.mark.parametrize("way", WAYS)
def test_a_child_releases_and_keeps_nothing_of_its_parent(way: str) -> None:
    with folder() as path, transport.listen(Stage(path).address("front"), config=config()) as front:
        with running(have_children, front.addresses[0], way) as parent:
            front.wait_for_peers({"parent"}, timeout=WAIT)
            for number in range(2):
                front.send({"bytes": pattern(number, 90_000)}, to="parent")
            before = front.receive(timeout=WAIT)
            after = front.receive(timeout=WAIT)
            assert after.body["right"] == [True, True]
            assert digest(before.body["bytes"]) == digest(pattern(3, 100_000))
            assert digest(after.body["bytes"]) == digest(pattern(4, 100_000))
            assert front.statistics()["backend"]["ring"].live == 2  # the parent has them open
            assert [peer.name for peer in front.peers] == ["parent"]
            assert len(segments_of({parent.pid or 0})) == 1
            front.send({"go": "on"}, to="parent")
            parent.join(WAIT)
            assert parent.exitcode == 0
        until(lambda: not front.statistics()["backend"]["ring"].live, "its space comes back")


def test_an_interpreter_that_forked_ends(address: str) -> None:
    """Both parent and child go through all of Python's end, with an endpoint nobody closed, and a view."""
    code = textwrap.dedent("""
        import os, sys, transport
        import numpy as np
        config = transport.TransportConfig(backend="shm", ring_bytes=1 << 20)
        endpoint = transport.connect(sys.argv[1], name="peer", config=config)
        message = endpoint.receive()
        endpoint.send({"bytes": np.ones(100_000, np.uint8)}, to="front")
        child = os.fork()
        if child:
            code = os.waitpid(child, 0)[1]
            assert message.body["bytes"].all() and endpoint.peers
            sys.exit(code)
    """)
    with transport.listen(address, config=config()) as front:
        command = [sys.executable, "-c", code, address]
        with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
            front.wait_for_peers({"peer"}, timeout=WAIT)
            front.send({"bytes": np.ones(100_000, np.uint8)}, to="peer")
            message = front.receive(timeout=WAIT)
            _, said = process.communicate(timeout=WAIT)
            assert (process.returncode, said) == (0, "")
            assert segments_of({process.pid}) == []
            assert message.body["bytes"].all()
