"""A watcher hears of each mapping of a ring's data, of its growth, and is the last to let it go."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from shm import RingReader, RingWriter
from tests.forks import reap
from tests.shm.rings import pattern, populated, send

MIB = 1 << 20


class Notes:
    """A watcher of one mapping that writes down what it hears and lets go when told to."""

    def __init__(self, address: int, nbytes: int, writable: bool) -> None:
        self.address, self.nbytes, self.writable = address, nbytes, writable
        self.marks: list[int] = []
        self.ends: list[Callable[[], None]] = []

    def grown(self, mark: int) -> None:
        self.marks.append(mark)

    def ended(self, let_go: Callable[[], None]) -> None:
        self.ends.append(let_go)

    def mapped(self) -> bool:
        start = f"{self.address:x}-"
        with open("/proc/self/maps") as lines:
            return any(line.startswith(start) for line in lines)


class Watcher:
    def __init__(self) -> None:
        self.notes: list[Notes] = []

    def __call__(self, address: int, nbytes: int, writable: bool) -> Notes:
        self.notes.append(Notes(address, nbytes, writable))
        return self.notes[-1]


@pytest.fixture
def watcher() -> Iterator[Watcher]:
    watcher = Watcher()
    yield watcher
    gc.collect()
    for notes in watcher.notes:
        for let_go in notes.ends:
            let_go()


def attached(writer: RingWriter, watcher: Watcher) -> tuple[RingReader, Notes]:
    offer = writer.offer()
    reader = RingReader(offer, "reader", watch=watcher)
    writer.admit(offer, "reader")
    return reader, watcher.notes[-1]


def test_a_reader_lets_go_after_its_last_view_and_unlocks_after_that(watcher: Watcher) -> None:
    writer = RingWriter(MIB, slots=8, columns=2)
    reader, notes = attached(writer, watcher)
    column = reader.column
    assert (notes.nbytes, notes.writable, notes.mapped()) == (MIB, False, True)
    record = send(writer, 1000)
    view = reader.open(record.handle)
    assert notes.marks == [MIB]
    assert notes.address <= view.ctypes.data < notes.address + MIB
    part = view[10:20]
    del view
    reader.close()
    gc.collect()
    assert notes.ends == []  # a view lives
    assert np.array_equal(part, pattern(1, 1000)[10:20])
    del part
    gc.collect()
    (let_go,) = notes.ends
    populated()
    assert notes.mapped()
    assert writer.reader_alive(column)  # whoever has the memory still in use has its lock
    notes.ends.clear()
    let_go()
    assert not notes.mapped()
    assert not writer.reader_alive(column)
    writer.close()


def test_a_writer_lets_go_after_its_last_loan(watcher: Watcher) -> None:
    writer = RingWriter(4 * MIB, slots=8, columns=1, growth=MIB, watch=watcher)
    (notes,) = watcher.notes
    assert (notes.writable, notes.marks) == (True, [])
    records = writer.reserve([MIB // 2])
    loan = writer.lend(records[0])
    assert notes.marks[0] == MIB
    writer.drop(records)
    writer.close()
    gc.collect()
    assert notes.ends == []
    loan[:] = 7
    del loan
    gc.collect()
    assert len(notes.ends) == 1
    assert notes.mapped()
    assert notes.marks == sorted(notes.marks)


def test_what_holds_the_tenure_of_a_closed_ring_keeps_its_memory(watcher: Watcher) -> None:
    writer = RingWriter(MIB, slots=8, columns=1, watch=watcher)
    (notes,) = watcher.notes
    tenure = writer.tenure
    writer.close()
    gc.collect()
    assert notes.ends == []
    del tenure
    assert len(notes.ends) == 1


def test_a_forked_child_tells_nobody(watcher: Watcher) -> None:
    """Its parent's registrations are not its own, and nothing is mapped there."""
    writer = RingWriter(MIB, slots=8, columns=1)
    reader, notes = attached(writer, watcher)
    view = reader.open(send(writer, 100).handle)
    pid = os.fork()
    if not pid:
        try:
            del view
            reader._segment.close()
            gc.collect()
        finally:
            os._exit(len(notes.ends))
    assert os.waitstatus_to_exitcode(reap(pid)) == 0
    assert notes.ends == []
    assert np.array_equal(view, pattern(1, 100))
    del view
    reader.close()
    writer.close()
