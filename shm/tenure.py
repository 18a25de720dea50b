"""How long the data of a ring stays mapped in a process, and who outside of the ring hears of its end first.

Whoever made something of the memory besides reading it, such as a registration with a device, has to undo
that before the pages are unmapped: the next mapping may come to lie at the same address. So the end of a
mapping is handed to it, in one piece with what unmaps and unlocks.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Callable
from functools import partial
from typing import Protocol, TypeAlias

from shm.mapping import address_of


class Watched(Protocol):
    """What a watcher keeps of one mapping of a ring's data. Its methods return at once, in any thread."""

    def grown(self, mark: int) -> None:
        """The first `mark` bytes have pages from now on."""

    def ended(self, let_go: Callable[[], None]) -> None:
        """Nobody here uses the data any more. `let_go`, to be called once, unmaps it and then unlocks.

        Called by a finalizer: in any thread, in the middle of any function. It takes no lock.
        """


Watch: TypeAlias = Callable[[int, int, bool], Watched]
"""Called as watch(address, nbytes, writable) for data that was just mapped and that nobody uses yet."""


class Tenure:
    """One mapping of a ring's data, held by the segment and by every lease or loan; its end unmaps.

    `lock`: what is to be let go of after that, the lock that tells others that this process reads here.
    """

    def __init__(self, data: mmap.mmap, lock: object, watch: Watch | None, *, writable: bool) -> None:
        self.watched = watch(address_of(data), len(data), writable) if watch else None
        let_go = partial(_let_go, [lock, data])
        weakref.finalize(self, _end, let_go, self.watched, os.getpid()).atexit = False

    def grown(self, mark: int) -> None:
        """Pages up to `mark` bytes are there."""
        if self.watched is not None:
            self.watched.grown(mark)


def _end(let_go: Callable[[], None], watched: Watched | None, pid: int) -> None:
    # In a forked child there is nothing mapped, and the watcher is its parent's.
    if watched is None or os.getpid() != pid:
        let_go()
    else:
        watched.ended(let_go)


def _let_go(kept: list[object]) -> None:
    while kept:
        kept.pop()  # the mapping, then the lock
