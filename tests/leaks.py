"""What a test leaves behind: segments, mappings, descriptors and processes, looked at before and after it.

Two things make the answer sound while other test processes run beside:

- Each test process gets a /dev/shm of its own, in a mount namespace, where the system allows it. Everything
  in it then is ours, and a sweep in one test can't reach the segments of another.
- Each test process puts a mark into its environment. What it starts inherits the mark, so that a process is
  found even after its parent died and it no longer descends from us.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import os
import re
import signal
import time
import uuid
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
MARK_NAME = "PYTEST_LEAK_MARK"
SETTLE_SECONDS = 10.0

_CLONE_NEWNS = 0x20000
_MS_NOSUID, _MS_NODEV, _MS_REC, _MS_SLAVE = 0x2, 0x4, 0x4000, 0x80000
_SEGMENT = re.compile(r"/dev/shm/(tensorferry\.[^/\s]+)")
_older: set[str] = set()  # pids of processes older than this one, which need no second look


def own_shared_memory() -> bool:
    """Give this process and all that it starts an empty /dev/shm; False where that is not allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS) != 0:
        return False
    # As a slave, our mounts stay ours while the host's still arrive.
    if libc.mount(b"none", b"/", None, _MS_REC | _MS_SLAVE, None) != 0:
        return False
    target, options = os.fsencode(SHARED_MEMORY), b"mode=1777"
    return bool(libc.mount(b"tmpfs", target, b"tmpfs", _MS_NOSUID | _MS_NODEV, options) == 0)


def mark_environment() -> None:
    os.environ[MARK_NAME] = uuid.uuid4().hex


@dataclasses.dataclass(frozen=True)
class Process:
    """One process of the test's tree; pid and start time (clock ticks since boot) together are unique."""

    pid: int
    started: int
    parent: int = dataclasses.field(compare=False)
    state: str = dataclasses.field(compare=False)
    name: str = dataclasses.field(compare=False)

    def __str__(self) -> str:
        what = "zombie, nobody waited for it" if self.state == "Z" else f"state {self.state}"
        return f"process {self.pid} ({self.name}, {what})"


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """What is there at one moment."""

    segments: frozenset[str]
    mappings: frozenset[str]
    descriptors: frozenset[tuple[int, str]]
    processes: frozenset[Process]

    @classmethod
    def take(cls) -> Snapshot:
        return cls(
            frozenset(path.name for path in SHARED_MEMORY.glob("tensorferry.*")),
            frozenset(_mapped("self")),
            frozenset(_descriptors()),
            frozenset(_tree()),
        )

    def since(self, before: Snapshot) -> Snapshot:
        """What is there now and was not there before."""
        return Snapshot(
            self.segments - before.segments,
            self.mappings - before.mappings,
            self.descriptors - before.descriptors,
            self.processes - before.processes,
        )

    def of_this_tree(self, *, alone: bool) -> Snapshot:
        """Without segments of others, where /dev/shm is shared with them.

        Somebody maps it: ours if that is one of our processes. Nobody does: ours only if no other test
        process runs beside (`alone`), since a killed writer leaves no trace of whose it was.
        """
        tree = {str(process.pid) for process in self.processes} | {str(os.getpid())}
        mapped = {pid: _mapped(pid) for pid in os.listdir("/proc") if pid.isdigit()} if self.segments else {}
        holders = {name: {pid for pid in mapped if name in mapped[pid]} for name in self.segments}
        ours = (name for name in self.segments if holders[name] & tree or (alone and not holders[name]))
        return dataclasses.replace(self, segments=frozenset(ours))

    def lines(self) -> list[str]:
        """One line for each thing, for people."""
        return [
            *(f"segment {SHARED_MEMORY / name}" for name in sorted(self.segments)),
            *(f"mapping of {name} in this process" for name in sorted(self.mappings)),
            *(f"descriptor {number} -> {target}" for number, target in sorted(self.descriptors)),
            *(str(process) for process in sorted(self.processes, key=lambda process: process.pid)),
        ]


def settled(before: Snapshot, *, isolated: bool, alone: bool, seconds: float) -> Snapshot:
    """What is left since `before` once garbage is collected and the dying are gone, or after `seconds`."""
    deadline = time.monotonic() + seconds
    pause = 0.002
    while True:
        left = Snapshot.take().since(before)
        if left.segments and not isolated:
            left = left.of_this_tree(alone=alone)
        if not left.lines() or time.monotonic() > deadline:
            return left
        gc.collect()
        time.sleep(pause)
        pause = min(2 * pause, 0.2)


def tidy(left: Snapshot, *, isolated: bool) -> None:
    """Remove what a test left, so that the next ones are not judged for it. Kills only what `left` names."""
    for process in left.processes & _tree():
        if process.state != "Z":
            os.kill(process.pid, signal.SIGKILL)
        if process.parent == os.getpid():
            os.waitpid(process.pid, 0)
    if isolated:
        for name in left.segments:
            (SHARED_MEMORY / name).unlink(missing_ok=True)


def _mapped(pid: str) -> set[str]:
    """Names of the segments that a process maps, removed ones too; none where we may not look."""
    try:
        return set(_SEGMENT.findall(Path(f"/proc/{pid}/maps").read_text()))
    except OSError:
        return set()


def _descriptors() -> set[tuple[int, str]]:
    found = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{number}")
        except FileNotFoundError:  # the descriptor that listed the folder
            continue
        if not target.startswith("/dev/nvidia"):  # the driver keeps these until the process ends
            found.add((int(number), target))
    return found


def _tree() -> set[Process]:
    """All processes below this one and all that carry its mark."""
    entries = [entry for entry in os.listdir("/proc") if entry not in _older]
    everybody = {process.pid: process for process in map(_process, entries) if process}
    me = everybody[os.getpid()]
    _older.update(str(process.pid) for process in everybody.values() if process.started < me.started)
    found: set[Process] = set()
    for process in sorted(everybody.values(), key=lambda process: process.started):
        if process.pid == me.pid or process.started < me.started:
            continue
        if _descends(process, me, everybody) or _marked(process):
            found.add(process)
    return found


def _descends(process: Process, ancestor: Process, everybody: dict[int, Process]) -> bool:
    above = everybody.get(process.parent)
    while above is not None and above.pid != ancestor.pid:
        above = everybody.get(above.parent)
    return above is not None


def _marked(process: Process) -> bool:
    try:
        environment = Path(f"/proc/{process.pid}/environ").read_bytes()
    except OSError:  # gone, or somebody else's
        return False
    return f"{MARK_NAME}={os.environ[MARK_NAME]}".encode() in environment.split(b"\0")


def _process(entry: str) -> Process | None:
    if not entry.isdigit():
        return None
    try:
        text = Path(f"/proc/{entry}/stat").read_text(errors="replace")
    except OSError:
        return None
    name, rest = text.split("(", 1)[1].rsplit(")", 1)  # a name may hold parentheses
    words = rest.split()
    return Process(int(entry), int(words[19]), parent=int(words[1]), state=words[0], name=name)
