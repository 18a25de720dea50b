"""Rings are registered step by step behind their mark, and unregistered before they are unmapped."""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from shm import RingReader, RingWriter, Watched
from shm.writer import GROWTH_BYTES
from transport.cudart import DeviceError
from transport.registration import STEP, Registrar

WAIT = 30.0
MIB = 1 << 20


class Memory:
    """Registers nothing, but refuses what CUDA would refuse, and writes down what was called."""

    def __init__(self, *, refuse_from: int = 1 << 62) -> None:
        self.calls: list[tuple[str, int, int, bool]] = []
        self.ranges: dict[int, int] = {}
        self.go_on = threading.Event()
        self.go_on.set()
        self._refuse_from = refuse_from

    def register(self, address: int, nbytes: int, *, read_only: bool) -> None:
        assert self.go_on.wait(WAIT)
        overlap = [
            start
            for start, size in self.ranges.items()
            if start < address + nbytes and address < start + size
        ]
        if overlap or len(self.ranges) >= self._refuse_from:
            raise DeviceError("cudaHostRegister failed with error 712: already mapped")
        assert not address % 4096
        assert not nbytes % 4096
        self.calls.append(("register", address, nbytes, read_only))
        self.ranges[address] = nbytes  # last: tests wait for it

    def unregister(self, address: int) -> None:
        self.calls.append(("unregister", address, self.ranges[address], False))
        del self.ranges[address]


@pytest.fixture
def registrar() -> Registrar:
    return Registrar()


@pytest.fixture
def memory(registrar: Registrar) -> Memory:
    memory = Memory()
    registrar.start(lambda: memory)
    return memory


def until(true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.002)


def mapped(address: int) -> bool:
    with open("/proc/self/maps") as lines:
        return any(line.startswith(f"{address:x}-") for line in lines)


class Pair:
    """A ring and its reader, each watched; addresses of their data."""

    def __init__(self, registrar: Registrar, nbytes: int, growth: int = STEP) -> None:
        self.seen: list[int] = []
        self._registrar = registrar
        self.writer = RingWriter(nbytes, slots=64, columns=2, growth=growth, watch=self._watch)
        offer = self.writer.offer()
        self.reader = RingReader(offer, "reader", watch=self._watch)
        self.writer.admit(offer, "reader")
        self.writers_address, self.readers_address = self.seen

    def _watch(self, address: int, nbytes: int, writable: bool) -> Watched:
        self.seen.append(address)
        return self._registrar.watch(address, nbytes, writable)

    def send(self, nbytes: int) -> object:
        """A record that is open at the reader: its view."""
        (record,) = self.writer.reserve([nbytes], columns=[self.reader.column])
        self.writer.commit([record])
        view = self.reader.open(record.handle)
        self.writer.drop([record], self.reader.column)
        return view

    def close(self) -> None:
        self.reader.close()
        self.writer.close()


@pytest.fixture
def pair(registrar: Registrar) -> Iterator[Pair]:
    pair = Pair(registrar, 3 * STEP + 5 * MIB, growth=STEP)
    yield pair
    pair.close()
    gc.collect()
    until(lambda: not registrar.state().rings, "the rings are forgotten")


def test_whole_steps_behind_the_mark_and_the_end_of_the_ring(
    registrar: Registrar, memory: Memory, pair: Pair
) -> None:
    pair.send(MIB)
    until(lambda: len(memory.ranges) == 2, "the first step of both sides")
    assert memory.ranges == {pair.writers_address: STEP, pair.readers_address: STEP}
    assert {(address, read_only) for _, address, _, read_only in memory.calls} == {
        (pair.writers_address, False),
        (pair.readers_address, True),
    }
    view = pair.send(3 * STEP + 4 * MIB)
    until(lambda: sum(memory.ranges.values()) == 2 * (3 * STEP + 5 * MIB), "all of both")
    assert sorted(memory.ranges.values()) == sorted(2 * [STEP, STEP, STEP, 5 * MIB])
    until(lambda: registrar.state().nbytes == sum(memory.ranges.values()), "it knows what is registered")
    assert registrar.state().refused == ""
    del view


def test_unregistered_before_it_is_unmapped_and_then_forgotten(registrar: Registrar, memory: Memory) -> None:
    pair = Pair(registrar, 2 * MIB)
    view = pair.send(MIB)
    until(lambda: len(memory.ranges) == 2, "both are registered")
    pair.close()
    until(lambda: pair.writers_address not in memory.ranges, "the writer's is not registered any more")
    assert pair.readers_address in memory.ranges  # since a view lives
    assert mapped(pair.readers_address)
    del view
    gc.collect()
    until(lambda: not registrar.state().rings, "it is unmapped")
    assert not memory.ranges
    assert not mapped(pair.readers_address)
    # The kernel is free to map the next one there: this has to be possible, time and again.
    for _ in range(5):
        again = Pair(registrar, 2 * MIB)
        again.send(MIB)
        until(lambda: len(memory.ranges) == 2, "both are registered")
        again.close()
        gc.collect()
        until(lambda: not memory.ranges, "nothing is registered")
    assert registrar.state().refused == ""


def test_rings_from_before_the_start_are_registered_too(registrar: Registrar) -> None:
    pair = Pair(registrar, 2 * MIB)
    pair.send(MIB)
    gone = Pair(registrar, 2 * MIB)
    gone.close()
    gc.collect()
    memory = Memory()
    registrar.start(lambda: memory)
    registrar.start(lambda: pytest.fail("started twice"))
    until(lambda: len(memory.ranges) == 2, "both are registered")
    assert set(memory.ranges) == {pair.writers_address, pair.readers_address}
    pair.close()
    gc.collect()
    until(lambda: not memory.ranges, "nothing is registered")


def test_a_ring_that_ends_while_it_is_being_registered(registrar: Registrar, memory: Memory) -> None:
    memory.go_on.clear()
    pair = Pair(registrar, 2 * MIB)
    pair.send(MIB)
    pair.close()
    gc.collect()
    assert mapped(pair.readers_address)
    assert registrar.state().rings == 2
    memory.go_on.set()
    until(lambda: not registrar.state().rings, "both are unmapped")
    assert not mapped(pair.readers_address)
    assert not mapped(pair.writers_address)
    assert not memory.ranges
    kinds = [kind for kind, address, _, _ in memory.calls if address == pair.readers_address]
    assert kinds == ["register", "unregister"]


def test_a_refusal_is_said_once_and_ends_it(registrar: Registrar, caplog: pytest.LogCaptureFixture) -> None:
    memory = Memory(refuse_from=1)
    registrar.start(lambda: memory)
    with caplog.at_level(logging.WARNING, "tensorferry.transport"):
        pair = Pair(registrar, 2 * MIB)
        view = pair.send(MIB)
        until(lambda: bool(registrar.state().refused and caplog.records), "the reason is known and said")
    assert "already mapped" in registrar.state().refused
    assert [record.message for record in caplog.records] == [
        f"rings are not registered with CUDA, copies to the device are slower: {registrar.state().refused}"
    ]
    assert len(memory.ranges) == 1  # what is registered stays so
    pair.close()
    del view
    gc.collect()
    until(lambda: not memory.ranges, "and is unregistered in the end")


def test_without_a_runtime_there_is_a_reason_and_nothing_else(registrar: Registrar) -> None:
    def none() -> Memory:
        raise DeviceError("torch finds no CUDA device here")

    registrar.start(none)
    pair = Pair(registrar, 2 * MIB)
    view = pair.send(MIB)
    until(lambda: registrar.state().refused != "", "the reason is known")
    assert registrar.state() == (2, 0, "torch finds no CUDA device here")
    del view
    pair.close()
    gc.collect()
    until(lambda: not mapped(pair.readers_address), "it is unmapped all the same")


def test_copies_are_cut_at_every_step_of_the_ring_they_are_in(registrar: Registrar, pair: Pair) -> None:
    def pieces(offset: int, nbytes: int) -> list[tuple[int, int]]:
        return list(registrar.pieces(pair.readers_address + offset, nbytes))

    assert pieces(0, 10) == [(0, 10)]
    assert pieces(STEP - 1, 2) == [(0, 1), (1, 2)]
    assert pieces(STEP, STEP) == [(0, STEP)]
    assert pieces(10, 2 * STEP) == [(0, STEP - 10), (STEP - 10, 2 * STEP - 10), (2 * STEP - 10, 2 * STEP)]
    assert list(registrar.pieces(4096, 5 * STEP)) == [(0, 5 * STEP)]  # no ring
    assert pieces(0, 0) == [(0, 0)]


def test_a_ring_grows_by_what_is_registered_at_once() -> None:
    """Else the end of a ring that does not grow any more stays unregistered."""
    assert GROWTH_BYTES == STEP
