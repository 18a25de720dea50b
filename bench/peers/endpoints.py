"""tensorferry itself, told to send by one backend, with limits that let 64 images through in one message."""

from __future__ import annotations

from pathlib import Path

from bench import links

GIB = 1 << 30
LIMITS = {
    # Half of the ring is one peer's share: 64 images of 16 MB fit.
    "ring_bytes": 2 * GIB,
    # The thread's variants send a message whole; the defaults would send it in parts.
    "detour_bytes": 4 * GIB,
    "max_control_bytes": 2 * GIB,
    # The benchmark says whether a tensor travels in the message, not its size.
    "inline_below": 0,
}


def open_near(folder: Path, way: str, *, nbytes: int, count: int) -> links.Link:
    """An endpoint that waits for its peer."""
    return links.open_near(folder, way, **LIMITS)


def open_far(folder: Path, way: str, *, nbytes: int, count: int) -> links.Link:
    """The peer."""
    return links.open_far(folder, way, **LIMITS)
