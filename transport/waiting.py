"""How this package waits for something that nobody announces: look, sleep a little longer, look again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

_FIRST_NAP, _LONGEST_NAP = 50e-6, 2e-3


def attempts(timeout: float, poll: Callable[[], object]) -> Iterator[bool]:
    """One item for each attempt, True for the last one, when `timeout` seconds are over.

    Between attempts it calls `poll` and sleeps 50 µs, doubling to 2 ms.
    """
    deadline = time.monotonic() + timeout
    nap = _FIRST_NAP
    while True:
        last = time.monotonic() >= deadline
        yield last
        if last:
            return
        poll()
        time.sleep(nap)
        nap = min(2 * nap, _LONGEST_NAP)
