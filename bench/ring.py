"""What a record costs the ring itself, without the copy, with 1 to 10,000 leases held at random."""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench.harness import Result, Row, numbers
from bench.part import Json, Report, WrongAnswerError
from bench.report import FAILED, Benchmark, Grid, figure
from shm import Record, RingReader, RingWriter

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
LIVE = (1, 100, 1_000, 10_000)
BLOCKS, QUICK_BLOCKS, BLOCK = 10, 3, 500
CHECKED = 200
AIM = 3.0

METHOD = f"""\
One process writes and reads a ring. A step reserves a record of random size (in flight to the
reader), commits it, opens it, acknowledges it and releases another lease, drawn at random, so that
the number of live leases stays. Nothing is copied, and no page of a record touched, in the timed
steps. A round times {BLOCKS} blocks of {BLOCK} steps, each beside a block on a second ring of the
same capacity with one live lease: "ratio" is the median of these quotients. Afterwards {CHECKED}
more steps carry a number in their bytes that is read back, every lease is dropped, and the ring
must then be one free block again. Figures: median [lowest..highest round]."""


@dataclass(frozen=True)
class Ring:
    """One ring with both sides and the leases held in it."""

    writer: RingWriter
    reader: RingReader
    leases: list[NDArray[np.uint8]]
    sizes: list[int]
    draws: list[int]

    @classmethod
    def create(cls, capacity: int, live: int, smallest: int, largest: int, seed: int) -> Ring:
        """A ring with `live` leases open, of sizes drawn between `smallest` and `largest` bytes."""
        writer = RingWriter(capacity)
        offer = writer.offer()
        reader = RingReader(offer, "bench")
        writer.admit(offer, "bench")
        draw = random.Random(seed)
        sizes = [draw.randint(smallest, largest) for _ in range(8191)]
        draws = [draw.randrange(live) for _ in range(8191)]
        ring = cls(writer, reader, [], sizes, draws)
        for size in itertools.islice(itertools.cycle(sizes), live):
            ring.leases.append(ring._through(ring._reserve(size)))
        return ring

    def _reserve(self, size: int) -> Record:
        (record,) = self.writer.reserve([size], columns=(self.reader.column,))
        return record

    def _through(self, record: Record) -> NDArray[np.uint8]:
        self.writer.commit([record])
        lease = self.reader.open(record.handle)
        self.writer.drop([record], self.reader.column)
        return lease

    def block(self, steps: int) -> float:
        """Microseconds per step over `steps` steps."""
        reserve, commit, acknowledge = self.writer.reserve, self.writer.commit, self.writer.drop
        opens, leases, column = self.reader.open, self.leases, self.reader.column
        columns = (column,)
        start = time.perf_counter()
        for size, place in zip(self.sizes[:steps], self.draws[:steps], strict=True):
            records = reserve([size], columns=columns)
            commit(records)
            lease = opens(records[0].handle)
            acknowledge(records, column)
            leases[place] = lease
            del lease
        seconds = time.perf_counter() - start
        random.shuffle(self.draws)
        return seconds / steps * 1e6

    def check(self, steps: int) -> int:
        """Run steps whose records carry a number; how many of them were read back right."""
        for number, (size, place) in enumerate(zip(self.sizes[:steps], self.draws[:steps], strict=True)):
            record = self._reserve(size)
            self.writer.buffer(record)[:8].view(np.int64)[0] = number
            self.leases[place] = lease = self._through(record)
            found = int(lease[:8].view(np.int64)[0])
            if found != number or lease.nbytes != size:
                raise WrongAnswerError(
                    f"record {number} of {size} bytes: found {found}, {lease.nbytes} bytes"
                )
        return steps

    def close(self) -> None:
        """Drop every lease; the ring must be empty and whole then."""
        self.leases.clear()
        left = self.writer.statistics()
        if left.live or left.used or left.largest_free != left.capacity:
            raise WrongAnswerError(f"the ring is not whole after everything was released: {left}")
        self.reader.close()
        self.writer.close()


def measure(_folder: Path, *, capacity: int, live: int, smallest: int, largest: int, blocks: int) -> Report:
    """Blocks on a ring with `live` leases and on one with a single lease, in turn."""
    ring = Ring.create(capacity, live, smallest, largest, seed=live)
    beside = Ring.create(capacity, 1, smallest, largest, seed=1)
    for warm in (ring, beside):
        warm.block(BLOCK)
    times: dict[str, list[float]] = {"us": [], "one_us": []}
    for number in range(blocks):
        turn = [("us", ring), ("one_us", beside)]
        for name, each in turn if number % 2 else reversed(turn):
            times[name].append(each.block(BLOCK))
    verified = ring.check(CHECKED) + beside.check(CHECKED)
    ring.close()
    beside.close()
    return Report(values=times, expected=2 * CHECKED, verified=verified)


def _rows(quick: bool) -> list[Row]:
    rings = [("64 MiB", 64 * MIB, 1 * KIB, 4 * KIB), ("8 GiB", 8 * GIB, 64 * KIB, 512 * KIB)]
    return [
        Row(
            name=f"{name}, {live:,} live",
            parts={"ring": "bench.ring:measure"},
            arguments={
                "capacity": capacity,
                "live": live,
                "smallest": smallest,
                "largest": largest,
                "blocks": QUICK_BLOCKS if quick else BLOCKS,
            },
        )
        for name, capacity, smallest, largest in rings
        for live in LIVE
    ]


def _microseconds(values: Mapping[str, Json]) -> float:
    return statistics.median(numbers(values["us"]))


def _ratio(values: Mapping[str, Json]) -> float:
    pairs = zip(numbers(values["us"]), numbers(values["one_us"]), strict=True)
    return statistics.median(block / beside for block, beside in pairs)


def _show(results: Sequence[Result]) -> list[Grid]:
    rows, ratios, costs = [], [], []
    for result in results:
        if result.failure is not None:
            rows.append([result.row.name, FAILED, FAILED])
            continue
        cost, ratio = result.spread(_microseconds), result.spread(_ratio)
        costs.append(cost.median)
        ratios.append(ratio.median)
        rows.append([result.row.name, figure(cost), figure(ratio)])
    notes = []
    if ratios:
        met = "met" if max(ratios) <= AIM else "MISSED"
        notes.append(f"aim: flat within {AIM:g}x of one live lease. Largest ratio {max(ratios):.2f}: {met}.")
        notes.append(
            f"cheapest row {min(costs):.1f} µs, dearest {max(costs):.1f} µs: {max(costs) / min(costs):.2f}x."
        )
    title = "ring: reserve + commit + open + acknowledge + release, without the copy"
    return [
        Grid(
            title=title,
            columns=["ring, leases held", "µs a record", "ratio to 1 live"],
            rows=rows,
            notes=notes,
        )
    ]


BENCHMARK = Benchmark(
    title="cost of a record without its copy, at 1 to 10,000 live leases, in rings of 64 MiB and 8 GiB",
    method=METHOD,
    rows=_rows,
    show=_show,
)
