"""What copies to a GPU keep, without one: the thread that lets go of it, and the end of the process."""

from __future__ import annotations

import subprocess
import sys

WAIT = 60.0

ENDS_WHILE_LETTING_GO = """
import os, sys, threading, time
from transport import devices

devices._LAST_MOMENT = 1000.0
devices.Kept._await = lambda kept, done: None  # every copy is done at once
begun = threading.Event()

class Source:
    def __del__(self, thread=threading.get_ident, main=threading.get_ident()):
        if thread() == main:  # what is left when the interpreter is taken down
            return
        begun.set()
        while not kept._ending:  # however long the end of the process takes to begin
            time.sleep(0.01)
        time.sleep(0.3)  # as torch does when it destroys an event: without the GIL, and then it asks for it
        os.write(1, b"whole ")

kept = devices.Kept()
{fork}
for _ in range(3):
    kept.keep(object(), Source())
begun.wait()
"""


def _ends(fork: str) -> tuple[int, str, str]:
    code = ENDS_WHILE_LETTING_GO.format(fork=fork)
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=WAIT, check=False
    )
    return ended.returncode, ended.stdout, ended.stderr


def test_the_end_of_a_process_waits_for_what_is_just_let_go_of_and_then_nothing_is() -> None:
    """A thread whose stack Python unwinds there has C++ of torch's on it, which aborts the process."""
    assert _ends("") == (0, "whole ", "")


def test_a_forked_child_ends_though_its_parents_thread_was_letting_go() -> None:
    child = "kept._letting_go.acquire(); child = os.fork()\nif not child: sys.exit()\n"
    then = "os.waitpid(child, 0); os.write(1, b'child '); kept._letting_go.release()"
    assert _ends(child + then) == (0, "child whole ", "")
