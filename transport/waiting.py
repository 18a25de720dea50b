"""How this package waits for something that nobody announces: look, sleep a little longer, look again.

And how a wait that gets long says so, without filling the log.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

_FIRST_NAP, _LONGEST_NAP = 50e-6, 2e-3
_SAY_AGAIN_AFTER = 30.0  # seconds
_REMEMBER = 1024  # kinds of warnings

Poll = Callable[[], object]


def attempts(timeout: float, poll: Poll) -> Iterator[bool]:
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


def take(lock: threading.Lock, took: list[bool], timeout: float = 0.0) -> bool:
    """Take a lock that is free within so many seconds; `took` says for a `finally` whether it was.

    It says so in the step that takes it: an interrupt (Ctrl-C) between the two would leave a lock that nobody
    gives back. (`with lock` is such a step, too, but waits for ever.)
    """
    # One call of C, in which no handler of signals runs once the lock is taken.
    took.extend(map(lock.acquire, (timeout > 0,), (timeout if timeout > 0 else -1,)))
    return took[-1]


class Lasting:
    """For how many seconds something lasts, as far as one looked: at most `most` from one look to the next.

    A process that was stopped goes on where it was. What it finds then says nothing of the time between: what
    others sent meanwhile may still be unread.
    """

    __slots__ = ("_looked", "_most", "_seconds")

    def __init__(self, most: float) -> None:
        self._most = most
        self._seconds = 0.0
        self._looked: float | None = None  # None: it does not last

    def look(self, now: float) -> float:
        """It lasts; for how long by now, 0 at the first look."""
        if self._looked is not None:
            self._seconds += min(now - self._looked, self._most)
        self._looked = now
        return self._seconds

    def end(self) -> None:
        """It lasts no longer; the next look is the first one."""
        self._seconds, self._looked = 0.0, None


class Wait:
    """The poll of one wait: calls `tell(seconds)` once it has lasted `patience` seconds, then every 30 s.

    A wait begins when it is first called.
    """

    __slots__ = ("_due", "_patience", "_poll", "_since", "_tell")

    def __init__(self, poll: Poll, patience: float, tell: Callable[[float], object]) -> None:
        self._poll = poll
        self._tell = tell
        self._patience = patience
        self._since = self._due = 0.0

    def __call__(self) -> None:
        self._poll()
        now = time.monotonic()
        if not self._since:  # most waits never begin
            self._since, self._due = now, now + self._patience
        if now >= self._due:
            self._due = now + _SAY_AGAIN_AFTER
            self._tell(now - self._since)


class RateLimit:
    """Lets one warning of each kind pass in `seconds`, and counts the others."""

    def __init__(self, seconds: float = _SAY_AGAIN_AFTER) -> None:
        self._seconds = seconds
        self._passed: dict[tuple[str, ...], tuple[float, int]] = {}  # when, and how many since then
        self._lock = threading.Lock()

    def left_out(self, *kind: str) -> int | None:
        """How many of that kind were left out since the last one; None: this one is to be left out, too."""
        now = time.monotonic()
        with self._lock:
            passed, left_out = self._passed.get(kind, (-self._seconds, 0))
            if now - passed < self._seconds:
                self._passed[kind] = passed, left_out + 1
                return None
            self._passed.pop(kind, None)  # so that the first of the dict passed longest ago
            self._passed[kind] = now, 0
            if len(self._passed) > _REMEMBER:
                del self._passed[next(iter(self._passed))]
            return left_out

    def tell(self, say: Callable[[str], object], text: str, *kind: str) -> None:
        """Say it, with how many of its kind were left out since the last one, or leave it out, too."""
        left_out = self.left_out(*kind)
        if left_out is not None:
            say(f"{text} ({left_out} more such warnings left out)" if left_out else text)
