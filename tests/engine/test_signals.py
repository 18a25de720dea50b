"""Signals that come at a time when Python drops exceptions."""

from __future__ import annotations

import os

from tests.engine.processes import ran

INTERRUPTED_IN_A_FINALIZER = """
import os, signal, weakref
from engine import signals

class Thing: pass

signals.install()
thing = Thing()
watched = weakref.ref(thing, lambda _: os.kill(os.getpid(), signal.SIGINT))
del thing
try:
    signals.check()
except KeyboardInterrupt:
    print("kept")
watched = weakref.ref(thing := Thing(), lambda _: 1 / 0)
del thing
"""


def test_an_interrupt_in_a_finalizer_is_kept_and_says_nothing() -> None:
    done = ran(["-c", INTERRUPTED_IN_A_FINALIZER], dict(os.environ))
    assert done.stdout == "kept\n"
    assert "KeyboardInterrupt" not in done.stderr
    assert "ZeroDivisionError" in done.stderr  # other faults are shown as ever
