"""docs/byte-format.md against the code, and against the bytes of a real segment."""

from __future__ import annotations

import os
import re
import struct
import sys
import time

import pytest

from shm import RingReader, RingWriter
from shm import layout as at
from shm.liveness import started
from tests.shm.rings import ROOT, attach, pattern

DOCUMENT = (ROOT / "docs" / "byte-format.md").read_text()
ROW = re.compile(r"^\| (\w+) \| ([^|]+) \| (writer|reader) \| (.+) \|$", re.MULTILINE)
WORDS = {name: (where.strip(), by) for name, where, by, _ in ROW.findall(DOCUMENT)}


def up(value: int, multiple: int) -> int:
    """The document's own notation."""
    return -(-value // multiple) * multiple


def place(name: str, *, slot: int = 0, column: int = 0, layout: at.Layout) -> int:
    """The byte that the document says a word begins at, from what it says alone."""
    columns = up(at.PAGE + 64 * layout.slots, at.PAGE)
    bases = {"slot": at.PAGE + 64 * slot, "column": columns + column * up(64 + 16 * layout.slots, at.PAGE)}
    total = 0
    for term in WORDS[name][0].split(" + "):
        factor = re.fullmatch(r"8 · SLOTS", term)
        total += bases[term] if term in bases else 8 * layout.slots if factor else int(term)
    return total


def test_the_table_names_every_word_of_the_code() -> None:
    ours = {
        name: value
        for name, value in vars(at).items()
        if re.match(r"[HSC]_[A-Z]", name) and isinstance(value, int)
    }
    assert set(WORDS) == {*ours, "opened_ns"}
    layout = at.Layout(1 << 20, 64, 4)
    for name, index in ours.items():
        base = {"H": 0, "S": layout.slots_offset, "C": layout.columns_offset}[name[0]]
        assert place(name, layout=layout) == base + index * at.WORD, name
        assert WORDS[name][1] == ("reader" if name[0] == "C" else "writer")
    assert place("opened_ns", layout=layout) == layout.columns_offset + layout.opened_word * at.WORD


@pytest.mark.parametrize(
    ("capacity", "slots", "columns"), [(1 << 20, 64, 4), (4096, 8, 1), (1 << 33, 16384, 64)]
)
def test_the_arithmetic_of_the_document_is_that_of_the_code(capacity: int, slots: int, columns: int) -> None:
    layout = at.Layout(capacity, slots, columns)
    first = up(at.PAGE + 64 * slots, at.PAGE)
    column = up(64 + 16 * slots, at.PAGE)
    data = up(first + columns * column, 2 << 20)
    assert (layout.columns_offset, layout.column_bytes, layout.data_offset) == (first, column, data)
    assert layout.total == data + capacity
    assert [layout.column_offset(c) for c in range(columns)] == [first + c * column for c in range(columns)]


def test_the_document_fits_on_two_screens() -> None:
    assert len(DOCUMENT.splitlines()) <= 120


class Segment:
    """The bytes of a living segment, read from its file."""

    def __init__(self, writer: RingWriter, layout: at.Layout) -> None:
        self.path = f"/dev/shm/{writer.name}"
        self.layout = layout

    def bytes(self, start: int, length: int) -> bytes:
        with open(self.path, "rb") as file:
            return os.pread(file.fileno(), length, start)

    def word(self, name: str, *, slot: int = 0, column: int = 0, index: int = 0) -> int:
        start = place(name, slot=slot, column=column, layout=self.layout) + 8 * index
        return int.from_bytes(self.bytes(start, 8), sys.byteorder)


def test_a_real_segment_has_these_bytes() -> None:
    before = time.time_ns(), time.monotonic_ns()
    layout = at.Layout(1 << 20, 16, 3)
    writer = RingWriter(1 << 20, slots=16, columns=3)
    segment = Segment(writer, layout)
    assert os.stat(segment.path).st_size == layout.total
    assert segment.bytes(0, 8) == struct.pack("=Q", int.from_bytes(b"tferry\x00\x01", "little"))
    figures = [segment.word(f"H_{name}") for name in ("VERSION", "PAGE", "CAPACITY", "SLOTS", "COLUMNS")]
    assert figures == [1, os.sysconf("SC_PAGESIZE"), 1 << 20, 16, 3]
    assert segment.word("H_IDENTITY") == writer.identity
    assert writer.identity % 2 == 1
    assert segment.word("H_MARK") == 0
    assert segment.word("H_PID") == os.getpid()
    assert segment.word("H_STARTED") == started(os.getpid()) > 0
    assert before[0] <= segment.word("H_CREATED_NS") <= time.time_ns()
    assert segment.word("H_LIMIT") == 0

    first = attach(writer, "first")
    offer = writer.offer()
    assert offer.column == 1
    assert segment.word("H_CHALLENGE", index=1) == offer.challenge != 0
    reader = RingReader(offer, "zweite Säule")
    assert segment.word("C_CHALLENGE", column=1) == offer.challenge
    writer.admit(offer, "second")
    assert segment.word("H_CHALLENGE", index=1) == 0
    assert segment.word("C_PID", column=1) == os.getpid()
    assert segment.word("C_STARTED", column=1) == started(os.getpid())
    assert before[0] <= segment.word("C_ATTACHED_NS", column=1) <= time.time_ns()
    name = segment.bytes(place("C_NAME", column=1, layout=layout), 32)
    assert name == "zweite Säule".encode().ljust(32, b"\0")

    zero, record = writer.reserve([100, 5000], columns=[1])
    assert segment.word("H_MARK") == 1 << 20
    assert [segment.word(f"H_{name}") for name in ("RECORDS", "LIVE", "USED")] == [2, 2, 5100]
    writer.buffer(record)[:] = pattern(3, 5000)
    writer.publish(record, message=77)
    writer.progress(record, 4000)
    line = ("GENERATION", "OFFSET", "NBYTES", "FILLED", "ADDRESSED", "MESSAGE")

    def slot(which: int) -> list[int]:
        return [segment.word(f"S_{name}", slot=which) for name in line]

    assert {zero.slot, record.slot} == {0, 1}
    assert slot(zero.slot) == [0] * 6
    assert slot(record.slot) == [1, record.offset, 5000, 4000, 0b10, 77]
    assert before[1] <= segment.word("S_PUBLISHED_NS", slot=record.slot) <= time.monotonic_ns()
    writer.commit([record])
    assert slot(record.slot) == [1, record.offset, 5000, 5000, 0b10, 77]
    assert segment.bytes(layout.data_offset + record.offset, 5000) == pattern(3, 5000).tobytes()

    view = reader.open(record.handle)
    assert segment.word("C_HAZARD", column=1, index=record.slot) == 1
    assert segment.word("C_HAZARD", column=0, index=record.slot) == 0
    assert before[1] <= segment.word("opened_ns", column=1, index=record.slot) <= time.monotonic_ns()
    del view
    assert segment.word("C_HAZARD", column=1, index=record.slot) == 0
    writer.drop([record], 1)
    writer.look()
    assert segment.word("S_GENERATION", slot=record.slot) == 0
    writer.abort([zero])
    assert [segment.word(f"H_{name}") for name in ("RECORDS", "LIVE", "USED")] == [2, 0, 0]
    (again,) = writer.reserve([64])
    writer.commit([again])
    assert segment.word("S_GENERATION", slot=again.slot) == 2
    first.close()
    reader.close()
    writer.close()
