"""The memory map of a segment: constants, offsets, pure arithmetic, nothing else.

    0            header line 0   MAGIC VERSION PAGE CAPACITY SLOTS COLUMNS IDENTITY -      writer
    64           header line 1   MARK PID STARTED CREATED_NS RECORDS LIVE USED LIMIT       writer
    128          challenge[c]    one word a column: the admission under way                writer
    page         slot line[s]    GENERATION OFFSET NBYTES FILLED PUBLISHED_NS ADDRESSED
                                 MESSAGE -                                                 writer
    columns      column[c]       line: CHALLENGE PID STARTED ATTACHED_NS NAME(32 bytes)    reader c
                                 hazard[s], then opened_ns[s]                              reader c
    data         records                                                                   writer

Every number is a native 8-byte word, aligned, with one writer. Columns and data begin on pages, so
that a reader maps its own column read-write and everything else read-only. `docs/byte-format.md` is
the normative text.
"""

from __future__ import annotations

import mmap
import re
from dataclasses import dataclass

MAGIC = int.from_bytes(b"tferry\x00\x01", "little")
VERSION = 1
PAGE = mmap.PAGESIZE
WORD = 8
LINE = 64
DATA_ALIGNMENT = 2 << 20  # a huge page, should /dev/shm be mounted with them

# header, in words
H_MAGIC, H_VERSION, H_PAGE, H_CAPACITY, H_SLOTS, H_COLUMNS, H_IDENTITY = range(7)
H_MARK, H_PID, H_STARTED, H_CREATED_NS, H_RECORDS, H_LIVE, H_USED, H_LIMIT = range(8, 16)
H_CHALLENGE = 16

# slot line, in words from its beginning
S_GENERATION, S_OFFSET, S_NBYTES, S_FILLED, S_PUBLISHED_NS, S_ADDRESSED, S_MESSAGE = range(7)
SLOT_WORDS = LINE // WORD

# column, in words from its beginning
C_CHALLENGE, C_PID, C_STARTED, C_ATTACHED_NS, C_NAME = range(5)
C_HAZARD = LINE // WORD
NAME_BYTES = 32

CLOSING = 1 << 62  # set in a slot's generation while the writer takes its second look
MAX_GENERATION = CLOSING - 1
MAX_COLUMNS = 64  # ADDRESSED is a mask in one word
MAX_SLOTS = 1 << 20
MAX_CAPACITY = 1 << 46

SMALL = 1 << 20  # records from here up begin on a page
NAME_PATTERN = re.compile(r"tensorferry\.([0-9]{1,10})\.([0-9a-f]{32})")


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not below `value`."""
    return -(-value // multiple) * multiple


def alignment(nbytes: int) -> int:
    """The alignment of a record of that size: a cache line, from 1 MiB up a page."""
    return PAGE if nbytes >= SMALL else LINE


@dataclass(frozen=True)
class Layout:
    """Where everything lies in a segment; `capacity` bytes of data, `slots` records, `columns` readers."""

    capacity: int
    slots: int
    columns: int

    def __post_init__(self) -> None:
        if not 0 < self.capacity <= MAX_CAPACITY or self.capacity % PAGE:
            raise ValueError(
                f"capacity must be a multiple of {PAGE} up to {MAX_CAPACITY}, not {self.capacity}"
            )
        if not 0 < self.slots <= MAX_SLOTS or self.slots % SLOT_WORDS:
            raise ValueError(f"slots must be a multiple of {SLOT_WORDS} up to {MAX_SLOTS}, not {self.slots}")
        if not 0 < self.columns <= MAX_COLUMNS:
            raise ValueError(f"columns must be from 1 to {MAX_COLUMNS}, not {self.columns}")

    @property
    def slots_offset(self) -> int:
        return PAGE

    @property
    def columns_offset(self) -> int:
        return round_up(self.slots_offset + self.slots * LINE, PAGE)

    @property
    def column_bytes(self) -> int:
        return round_up(LINE + 2 * self.slots * WORD, PAGE)

    @property
    def data_offset(self) -> int:
        return round_up(self.columns_offset + self.columns * self.column_bytes, DATA_ALIGNMENT)

    @property
    def total(self) -> int:
        return self.data_offset + self.capacity

    def slot_word(self, slot: int) -> int:
        """The index of the first word of a slot line, counted from the beginning of the segment."""
        return self.slots_offset // WORD + slot * SLOT_WORDS

    def column_offset(self, column: int) -> int:
        """The offset of a column in bytes, a multiple of the page."""
        return self.columns_offset + column * self.column_bytes

    @property
    def opened_word(self) -> int:
        """The index of opened_ns[0], in words from the beginning of a column."""
        return C_HAZARD + self.slots
