"""Ctrl-C and SIGTERM that cannot get lost: Python drops an exception that is raised inside a finalizer.

A handler raises in whatever runs just then, which may be the end of a tensor's view. So it also takes a
note, and long loops call `check`; that it got lost is not worth a traceback then.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

_noted: list[int] = []


class Terminated(KeyboardInterrupt):
    """SIGTERM came: everything ends as after Ctrl-C, with another exit code."""


def exit_code(interrupt: KeyboardInterrupt) -> int:
    """What a shell expects of who was ended by that signal."""
    return 128 + (signal.SIGTERM if isinstance(interrupt, Terminated) else signal.SIGINT)


def install() -> None:
    """Handle SIGTERM like Ctrl-C, so that ranks are ended and rings removed; leave what is ignored alone."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _note)
            sys.unraisablehook = _unraisable


def check() -> None:
    """Raise now what a signal raised before, in case it got lost: `KeyboardInterrupt` or `Terminated`."""
    if _noted:
        _raise(_noted[-1])


def _note(number: int, _frame: FrameType | None) -> None:
    _noted.append(number)
    _raise(number)


def _unraisable(lost: UnraisableHookArgs) -> None:
    if not (_noted and isinstance(lost.exc_value, KeyboardInterrupt)):
        sys.__unraisablehook__(lost)


def _raise(number: int) -> None:
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated
