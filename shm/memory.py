"""How much memory /dev/shm, the cgroup and the machine still have, asked before pages are taken.

Pages of a tmpfs are taken when first touched: a short /dev/shm is then a SIGBUS in the middle of a
copy, and a short cgroup the OOM killer. So every step is asked for here and reserved before use.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path

from shm.errors import NoSpace

DIRECTORY = Path("/dev/shm")
MADV_POPULATE_READ = 22
MADV_POPULATE_WRITE = 23
_TMPFS = 0x01021994
_NO_LIMIT = 1 << 62
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


@dataclass(frozen=True)
class Space:
    """Bytes: the size of /dev/shm, what is free there, what the cgroup and the machine still give."""

    total: int
    free: int
    cgroup: int | None
    machine: int

    @property
    def available(self) -> int:
        return min(self.free, self.machine, self.machine if self.cgroup is None else self.cgroup)

    def __str__(self) -> str:
        cgroup = "" if self.cgroup is None else f", the cgroup allows {human(self.cgroup)} more"
        return (
            f"{DIRECTORY} has {human(self.free)} of {human(self.total)} free, the machine has"
            f" {human(self.machine)} available{cgroup}"
        )


def human(nbytes: float) -> str:
    """A number of bytes as people read it: 1536 is '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024:
            return f"{nbytes:.4g} {unit}"
        nbytes /= 1024
    return f"{nbytes:.4g} TiB"


def space() -> Space:
    """What is left now. `NoSpace` where there is no /dev/shm."""
    try:
        stat = os.statvfs(DIRECTORY)
    except FileNotFoundError as error:
        raise NoSpace(f"there is no {DIRECTORY} here: mount a tmpfs on it") from error
    if not stat.f_blocks:  # a tmpfs mounted without a limit says 0 of 0
        return Space(_NO_LIMIT, _NO_LIMIT, _cgroup(), _machine())
    return Space(stat.f_blocks * stat.f_frsize, stat.f_bavail * stat.f_frsize, _cgroup(), _machine())


def check(nbytes: int, purpose: str, spare: int = 0) -> None:
    """`NoSpace`, with the sizes and what to do, unless that many bytes can be had now, and `spare` bytes of
    /dev/shm are still free then.
    """
    now = space()
    if nbytes > now.available or nbytes > now.free - spare:
        left = f" and leaves {human(spare)} of {DIRECTORY} to others (shm_spare_bytes)" if spare else ""
        raise NoSpace(f"{purpose} needs {human(nbytes)}{left}, but {now}. {REMEDY}")


def require_space(nbytes: int) -> None:
    """`NoSpace`, with the sizes and what to do, when /dev/shm could not hold a ring of that size empty."""
    now = space()
    if nbytes > now.total:
        raise NoSpace(f"a ring of {human(nbytes)} does not fit: {now}. {REMEDY}")


REMEDY = (
    "Give /dev/shm more (docker run --shm-size=2g; Kubernetes: an emptyDir with medium Memory mounted"
    " on /dev/shm; a host: mount -o remount,size=2g /dev/shm), raise the memory limit, or make the"
    " ring smaller (ring_bytes, --shm-ring-gb)."
)


def is_tmpfs(fd: int) -> bool:
    """Whether a file lies on a tmpfs, where locks and mappings are those of one kernel."""
    buffer = ctypes.create_string_buffer(512)
    if _libc.fstatfs(fd, buffer):
        raise OSError(ctypes.get_errno(), "fstatfs failed")
    return ctypes.c_long.from_buffer(buffer).value == _TMPFS


def populate(address: int, nbytes: int, *, writing: bool) -> None:
    """Touch mapped pages ahead of use; best effort. ctypes lets go of the GIL meanwhile."""
    _libc.madvise(address, nbytes, MADV_POPULATE_WRITE if writing else MADV_POPULATE_READ)


def _machine() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return _NO_LIMIT


def _cgroup() -> int | None:
    """What the tightest memory limit above this process still allows; None without a limit."""
    left: list[int] = []
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:  # a kernel without cgroups
        return None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            left += _walk(Path("/sys/fs/cgroup"), path, "memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
            left += _walk(Path("/sys/fs/cgroup/memory"), path, *names)
    return min(left, default=None)


def _walk(root: Path, path: str, limit_name: str, usage_name: str) -> list[int]:
    left = []
    here = root / path.lstrip("/")
    for folder in (here, *here.parents):
        if not folder.is_relative_to(root):
            break
        limit, usage = _number(folder / limit_name), _number(folder / usage_name)
        if limit is not None and usage is not None and limit < _NO_LIMIT >> 2:
            left.append(max(0, limit - usage + _reclaimable(folder)))
    return left


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # not there, or the word "max"
        return None


def _reclaimable(folder: Path) -> int:
    try:
        for line in (folder / "memory.stat").read_text().splitlines():
            if line.startswith(("inactive_file ", "total_inactive_file ")):
                return int(line.split()[1])
    except (OSError, ValueError):
        return 0
    return 0
