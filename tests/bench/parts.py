"""Parts that the harness's tests run: good ones and every kind of bad one."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from bench import sampler
from bench.part import Report, WrongAnswerError


def good(folder: Path, *, name: str = "pid", answers: int = 1) -> Report:
    """Reports its process and folder, and as many checked answers as were expected."""
    return Report(
        values={name: os.getpid(), f"{name} folder": str(folder)}, expected=answers, verified=answers
    )


def seen(folder: Path) -> Report:
    """Stays until the memory sampler has seen it three times."""
    sampler.wait_for_samples(folder, 3, timeout=30)
    return good(folder)


def expects(folder: Path, *, verified: int = 5) -> Report:
    """A near end that sent five messages."""
    return Report(values={"near": os.getpid(), "near folder": str(folder)}, expected=5)


def checks(folder: Path, *, verified: int = 5) -> Report:
    """A far end that checked so many of them."""
    return Report(values={"far": os.getpid(), "far folder": str(folder)}, verified=verified)


def wrong(folder: Path) -> Report:
    """Finds other bytes than were sent."""
    raise WrongAnswerError("message 3: checksum 7, not 9")


def killed(folder: Path) -> Report:
    """Dies by SIGKILL."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still alive")


def faulted(folder: Path) -> Report:
    """Writes where nothing is mapped."""
    ctypes.memset(8, 0, 1)
    raise AssertionError("still alive")


def silent(folder: Path) -> Report:
    """Ends with status 0 and no result."""
    os._exit(0)


def endless(folder: Path, *, note: str) -> Report:
    """Never ends, nor does the process it starts, whose id it writes to the file `note`."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    draft = Path(f"{note}.draft")
    draft.write_text(str(child.pid))
    draft.rename(note)
    time.sleep(600)
    raise AssertionError("still alive")


def fails_once(folder: Path, *, mark: str) -> Report:
    """Fails the first time it is run, is good ever after."""
    if not Path(mark).exists():
        Path(mark).touch()
        raise RuntimeError("the first time")
    return Report(values={"figure": 1.0}, expected=1, verified=1)
