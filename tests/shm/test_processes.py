"""Real writers and readers at full speed in a ring so small that its bytes are reused all the time."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import random
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import pytest

from shm import Handle, Offer, Record, RingFull, RingReader, RingWriter
from tests.shm.rings import hear, pattern, tell

SECONDS = 1.5
CAPACITY = 256 << 10
SPAWN = multiprocessing.get_context("spawn")


@dataclass
class Held:
    """A lease and what must be in it."""

    number: int
    view: Any

    def check(self) -> None:
        if not np.array_equal(self.view, pattern(self.number, self.view.nbytes)):
            raise AssertionError(f"record {self.number}: its bytes changed under an open view")


def read(front: Connection, onward: Connection | None, backward: Connection | None, seed: int) -> None:
    """A reader: open, check, hold at random, check again, drop; hand on what `onward` is for.

    From the writer: an offer, then [number, handle] or null. To it: a line for each record taken.
    `backward` is where handles come from that another reader hands on; each is answered with its number.
    """
    draw = random.Random(seed)
    reader = RingReader(Offer(*hear(front)), f"reader {seed}")  # type: ignore[misc] # from our own test
    tell(front, "ready")
    hear(front)
    held: list[Held] = []
    queue: deque[Held] = deque()  # handed on, not acknowledged
    sources = [source for source in (front, backward) if source is not None]
    while sources:
        arrived = multiprocessing.connection.wait(sources + ([onward] if queue and onward else []), 0.01)
        if held and not arrived:  # the writer may be waiting for space
            held.pop(draw.randrange(len(held))).check()
        for source in arrived:
            assert isinstance(source, Connection)
            message: Any = hear(source)
            if source is onward:
                queue.popleft()
                continue
            if message is None:
                sources.remove(source)
                continue
            number, handle = message[0], Handle(*message[1])
            lease = Held(number, reader.open(handle))
            lease.check()
            tell(source, number)
            if onward is not None and draw.random() < 0.5:
                tell(onward, message)
                queue.append(lease)
            held.append(lease)
            del lease
            while len(held) > draw.randrange(8):
                held.pop(draw.randrange(len(held))).check()
    if onward is not None:
        tell(onward, None)
        while queue:
            hear(onward)
            queue.popleft().check()
    for lease in held:
        lease.check()
    count = reader.opened
    held.clear()
    lease = None  # type: ignore[assignment] # the last one counts, too
    reader.close()
    tell(front, count)


class Reader:
    """One reader process as the writer sees it."""

    def __init__(
        self, writer: RingWriter, seed: int, onward: Connection | None, backward: Connection | None
    ) -> None:
        self.pipe, theirs = SPAWN.Pipe()
        self.process = SPAWN.Process(target=read, args=(theirs, onward, backward, seed))
        self.process.start()
        theirs.close()
        offer = writer.offer()
        tell(self.pipe, offer)
        assert hear(self.pipe) == "ready"
        writer.admit(offer, f"reader {seed}")
        tell(self.pipe, "admitted")
        self.column = offer.column
        self.flying: deque[tuple[int, Record]] = deque()

    def send(self, number: int, record: Record) -> None:
        self.flying.append((number, record))
        tell(self.pipe, [number, record.handle])

    def acknowledged(self, writer: RingWriter) -> None:
        while self.flying and self.pipe.poll():
            number, record = self.flying.popleft()
            assert hear(self.pipe) == number
            writer.drop([record], self.column)

    def finish(self, writer: RingWriter) -> int:
        tell(self.pipe, None)
        deadline = time.monotonic() + 60
        while self.flying and time.monotonic() < deadline:
            self.acknowledged(writer)
        opened = hear(self.pipe)
        assert isinstance(opened, int)
        self.process.join(60)
        assert self.process.exitcode == 0
        return opened


@contextmanager
def readers(writer: RingWriter, number: int) -> Iterator[list[Reader]]:
    """That many reader processes, each of which hands on to the next."""
    with ExitStack() as stack:
        links = [SPAWN.Pipe() for _ in range(number - 1)]
        outs = [*(link[0] for link in links), None]
        ins = [None, *(link[1] for link in links)]
        made = []
        for seed, (onward, backward) in enumerate(zip(outs, ins, strict=True)):
            reader = Reader(writer, seed, onward, backward)
            stack.callback(reader.process.close)
            stack.callback(reader.process.join)
            stack.callback(reader.process.kill)
            stack.callback(reader.pipe.close)
            made.append(reader)
        for link in links:
            link[0].close()
            link[1].close()
        yield made


@pytest.mark.parametrize("number", [1, 2], ids=["two processes", "three processes with hand-on"])
def test_no_byte_changes_under_an_open_view(number: int) -> None:
    writer = RingWriter(CAPACITY, slots=32, columns=number)
    draw = random.Random(number)
    sent = full = 0
    with readers(writer, number) as all_readers:
        columns = [reader.column for reader in all_readers]
        end = time.monotonic() + SECONDS

        def poll() -> None:
            for reader in all_readers:
                reader.acknowledged(writer)

        while time.monotonic() < end or sent <= 50:  # else it never reused a byte, and proved nothing
            size = draw.choice([draw.randint(1, 300), draw.randint(1, 40_000)])
            wanted = [c for c in columns if draw.random() < 0.7] or columns[:1]
            try:
                (record,) = writer.reserve([size], columns=wanted, timeout=60, poll=poll)
            except RingFull:
                full += 1
                break
            writer.buffer(record)[:] = pattern(sent, size)
            writer.commit([record])
            for reader in all_readers:
                if reader.column in wanted:
                    reader.send(sent, record)
            sent += 1
            poll()
        opened = [reader.finish(writer) for reader in all_readers]
    now = writer.statistics()
    writer.close()
    assert (now.live, now.used, now.largest_free) == (0, 0, CAPACITY)
    assert full == 0
    assert min(opened) > 10
    assert now.records == sent
