"""Bytes in a POSIX shared-memory ring: one writer, many readers, records released in any order.

writer = RingWriter(1 << 30)                    reader = RingReader(offer, "rank0")
offer = writer.offer()                          ... the reader says that it is ready ...
writer.admit(offer, "rank0")                    array = reader.open(record.handle)
record, = writer.reserve([nbytes])              del array                    # released
writer.buffer(record)[:] = ...
writer.commit([record])
"""

from __future__ import annotations

from shm.errors import (
    AdmissionFailed,
    LayoutMismatch,
    NoSpace,
    RecordTooLarge,
    RingClosed,
    RingFull,
    SegmentExists,
    SegmentMissing,
    ShmError,
    StaleHandle,
    Stalled,
)
from shm.handle import Handle, Offer
from shm.inspect import describe, names, records, sweep, try_lock
from shm.liveness import started
from shm.look import ReaderInfo, RecordInfo, RecordReader, SegmentInfo
from shm.memory import DIRECTORY, REMEDY, Space, human, require_space, space
from shm.reader import RingReader
from shm.record import Lease, Record, RingStatistics
from shm.tenure import Tenure, Watch, Watched
from shm.writer import RingWriter

__all__ = [
    "DIRECTORY",
    "REMEDY",
    "AdmissionFailed",
    "Handle",
    "LayoutMismatch",
    "Lease",
    "NoSpace",
    "Offer",
    "ReaderInfo",
    "Record",
    "RecordInfo",
    "RecordReader",
    "RecordTooLarge",
    "RingClosed",
    "RingFull",
    "RingReader",
    "RingStatistics",
    "RingWriter",
    "SegmentExists",
    "SegmentInfo",
    "SegmentMissing",
    "ShmError",
    "Space",
    "StaleHandle",
    "Stalled",
    "Tenure",
    "Watch",
    "Watched",
    "describe",
    "human",
    "names",
    "records",
    "require_space",
    "space",
    "started",
    "sweep",
    "try_lock",
]
