"""The name of a living ring is taken away: who has it mapped goes on, who comes later gets another."""

from __future__ import annotations

import logging
import os
from contextlib import ExitStack

import numpy as np
import pytest

import shm
import transport
from tests.crash.harness import segments_of, until
from tests.leaks import Snapshot
from transport.conformance import WAIT, Pumped, joined, noise, same

CONFIG = transport.TransportConfig(
    backend="shm", ring_bytes=1 << 20, max_tensors=64, max_readers=4, timeout=WAIT, admission_timeout=WAIT
)


def own_rings() -> set[str]:
    """The segments that this process made and that have a name."""
    return set(segments_of({os.getpid()}))


def lose_the_name(front: transport.Endpoint) -> str:
    """As systemd's RemoveIPC does it, or an operator's `rm`."""
    (name,) = own_rings()
    (shm.DIRECTORY / name).unlink()
    return name


def test_who_comes_after_the_name_is_gone_gets_another_ring(
    address: str, caplog: pytest.LogCaptureFixture
) -> None:
    with transport.listen(address, config=CONFIG) as front, ExitStack() as old_ones:
        old = Pumped(old_ones.enter_context(joined(front, "old", CONFIG)))
        front.send({"x": noise(100_000, 1)}, to="old")
        held = old.next()
        with front.loan((50_000,), np.uint8) as loan:
            loan[:] = noise(50_000, 2).numpy()
        lost = lose_the_name(front)
        with joined(front, "new", CONFIG) as endpoint:
            new = Pumped(endpoint)
            with caplog.at_level(logging.WARNING):
                front.send({"x": noise(100_000, 3)}, to=["old", "new"])
            assert [record.getMessage() for record in caplog.records if "taken out of" in record.getMessage()]
            assert same(old.next().body["x"], noise(100_000, 3))
            assert same(new.next().body["x"], noise(100_000, 3))
            assert all("proved that it maps" in info.backend for info in front.peers)
            front.send({"x": loan}, to=["old", "new"])  # a loan of the old ring
            assert np.array_equal(old.next().body["x"], loan)
            assert np.array_equal(new.next().body["x"], loan)
            (name,) = own_rings()
            assert name != lost
            assert len(front.statistics()["backend"]["older rings"]) == 1
            assert same(held.body["x"], noise(100_000, 1))
            assert all(info.held is not None for info in front.peers)
            old.stop()
            old_ones.close()
            front.send({"x": noise(10, 4)}, to="new")
            assert same(new.next().body["x"], noise(10, 4))
            until(lambda: "older rings" not in front.statistics()["backend"], "it is known that old has left")
            assert same(held.body["x"], noise(100_000, 1))  # the view outlives its ring
            assert np.array_equal(loan, noise(50_000, 2).numpy())
            del held, loan
            until(
                lambda: not any(lost in mapping for mapping in Snapshot.take().mappings),
                "the threads that touch its pages ahead have let go of it",
            )
            new.stop()


def test_a_ring_that_nobody_maps_is_replaced_at_once(address: str) -> None:
    with transport.listen(address, config=CONFIG) as front:
        with front.loan((1000,), np.uint8):
            lost = lose_the_name(front)
        with joined(front, "new", CONFIG) as endpoint:
            new = Pumped(endpoint)
            front.send({"x": noise(100_000)}, to="new")
            assert same(new.next().body["x"], noise(100_000))
            assert own_rings() != {lost}
            assert "older rings" not in front.statistics()["backend"]
            new.stop()


def live(front: transport.Endpoint) -> list[int]:
    """How many records each of two rings holds."""
    figures = front.statistics()["backend"]
    return [figures["ring"].live, *(ring.live for ring in figures["older rings"])]


def test_what_does_not_fit_one_of_two_rings_is_in_neither(address: str) -> None:
    with transport.listen(address, config=CONFIG) as front, joined(front, "old", CONFIG) as endpoint:
        old = Pumped(endpoint)
        front.send({"x": noise(1000)}, to="old")
        old.next()
        lose_the_name(front)
        with joined(front, "new", CONFIG) as other:
            new = Pumped(other)
            front.send({"x": noise(1000)}, to="new")
            new.next()
            held = []
            for _ in range(4):
                front.send({"x": noise(100_000)}, to="old")
                held.append(old.next())
            with pytest.raises(transport.Full) as full:
                front.send({"x": noise(200_000)}, to=["new", "old"], timeout=0.1)
            assert list(full.value.failed) == ["old"]
            assert full.value.delivered == ("new",)
            assert same(new.next().body["x"], noise(200_000))
            held.clear()
            until(lambda: not any(live(front)), "all space comes back")
            old.stop()
            new.stop()
