"""Forks for tests: one as C code does it, and waiting for a child that ends by being killed, not for ever."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time

_SETTLE = 0.05
_NEVER = 1000.0


def raw_fork() -> int:
    """fork as C code does it: no hook of Python's runs. The child's pid, 0 in the child.

    A thread that waits for the interpreter's lock makes its holder hand it over; in a child there is no
    other thread, and it would wait for ever. So nobody may be asking when the fork happens.
    """
    interval = sys.getswitchinterval()
    sys.setswitchinterval(_NEVER)
    try:
        time.sleep(_SETTLE)  # who asked before gets it now
        return int(ctypes.PyDLL(None).fork())
    finally:
        sys.setswitchinterval(interval)


def reap(pid: int, timeout: float = 30.0) -> int:
    """The exit status of a child; one that does not end in time is killed, which shows in the status."""
    deadline = time.monotonic() + timeout
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return status
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            return os.waitpid(pid, 0)[1]
        time.sleep(0.005)
