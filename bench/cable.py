"""Two hosts for two processes: each in a network namespace and with a /dev/shm of its own, joined by veth."""

from __future__ import annotations

import ctypes
import os
import subprocess
import time
from pathlib import Path

_CLONE_NEWNS, _CLONE_NEWNET = 0x20000, 0x40000000
_MS_REC, _MS_SLAVE = 0x4000, 0x80000
_NETWORK = "10.78.0"
_SECONDS = 30.0
_libc = ctypes.CDLL(None, use_errno=True)


def own_host() -> None:
    """Give this process a network and a /dev/shm of its own. OSError where that is not allowed."""
    for failed in (
        _libc.unshare(_CLONE_NEWNS | _CLONE_NEWNET),
        _libc.mount(b"none", b"/", None, _MS_REC | _MS_SLAVE, None),
        _libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, b"mode=1777"),
    ):
        if failed:
            raise OSError(ctypes.get_errno(), "no namespaces here (this needs root)")
    _ip("link set lo up")


def join_far(folder: Path) -> None:
    """The near end: wait for the far one and lay the cable to it."""
    pid = wait_for(folder / "far.pid")
    _ip(f"link add cable type veth peer name cable netns {pid}")
    _ip(f"address add {_NETWORK}.1/24 dev cable")
    _ip("link set cable up")
    leave(folder / "cable", "laid")


def join_near(folder: Path) -> None:
    """The far end: say who it is, and take the cable."""
    leave(folder / "far.pid", str(os.getpid()))
    wait_for(folder / "cable")
    _ip(f"address add {_NETWORK}.2/24 dev cable")
    _ip("link set cable up")


def host(network: str) -> str:
    """Where the near end listens."""
    return f"{_NETWORK}.1" if network == "veth" else "127.0.0.1"


def leave(path: Path, text: str) -> None:
    """Write a file that appears whole."""
    draft = path.with_suffix(".draft")
    draft.write_text(text)
    draft.rename(path)


def wait_for(path: Path) -> str:
    """The text of a file that the other end leaves. TimeoutError."""
    deadline = time.monotonic() + _SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"the other end did not leave {path.name}")
        time.sleep(0.005)
    return path.read_text()


def _ip(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True, timeout=_SECONDS)
