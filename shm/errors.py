"""The errors of the ring: `ShmError` and its leaves, each telling the caller what can be done.

ShmError
├── RingFull         later: slots, bytes, one hole large enough, columns or a reader's share
├── RecordTooLarge   never: larger than the ring
├── StaleHandle      the record is not there (any more): late, doubled, forged or misdelivered
├── Stalled          the writer stopped in the middle of something; try again later
├── RingClosed       you closed this end, or it was made in another process
├── SegmentMissing   no segment of that name here
├── SegmentExists    the name is taken
├── LayoutMismatch   not a segment that this version may map
├── AdmissionFailed  the mapping was not proved, or the column is taken
└── NoSpace          /dev/shm or memory is short: sizes and remedy
"""

from __future__ import annotations


class ShmError(Exception):
    """Base of everything that `shm` raises on purpose, argument errors excepted."""


class RingFull(ShmError):
    """Nothing fits now. `what`: "bytes", "hole", "slots", "columns", or "share" (`columns`: whose)."""

    def __init__(self, message: str, *, what: str, columns: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.what = what
        self.columns = columns


class RecordTooLarge(ShmError):
    """What was asked for exceeds the ring and never fits."""


class StaleHandle(ShmError):
    """The handle names no record that is there now; nothing was opened."""


class Stalled(ShmError):
    """The writer lives but stopped in the middle of a step for longer than was allowed."""


class RingClosed(ShmError):
    """This end was closed here, or was made in another process and inherited by fork."""


class SegmentMissing(ShmError):
    """There is no segment of that name in this process's /dev/shm."""


class SegmentExists(ShmError):
    """A segment of that name exists already."""


class LayoutMismatch(ShmError):
    """The object is not a segment of this layout, or its header does not agree with its size."""


class AdmissionFailed(ShmError):
    """The reader could not prove that it maps the writer's segment, or its column is taken."""


class NoSpace(ShmError):
    """/dev/shm, the cgroup or the machine has too little memory; the text says how to get more."""
