"""Samples the memory of a process tree from outside: `python -m bench.sampler [--mixed] FOLDER PID…`.

It goes on until its standard input closes and prints everything as JSON then. For each sample it appends a
byte to a file in FOLDER, so that a part can hold a state until it has been seen (`wait_for_samples`).

One sample is a sum over the processes given and their descendants:

- `anon` and `file`: Pss_Anon and Pss_File of /proc/PID/smaps_rollup. The proportional set size splits a
  shared page over the processes that map it, so that the sum counts it once.
- `shared`: the bytes allocated (st_blocks) to the files in /dev/shm that any of these processes maps or whose
  names begin with FOLDER's, or, where there are none, the sum of Pss_Shmem. Allocated pages that nobody has
  touched yet are in no PSS but are memory all the same, and the PSS of several processes, read one after the
  other while pages are being mapped, counts some twice: so the files, where there are any. For rows that
  share both kinds at once (vLLM's: files without a name, memory pinned by CUDA) there is `--mixed`: whichever
  is more.

Not counted: socket buffers in the kernel (zmq over ipc keeps at most a few hundred KiB there) and the
sampler itself, whoever started it.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

INTERVAL = 0.01
"""Seconds from one sample to the next."""

COLUMNS = ("time", "anon", "file", "shared")
"""What a sample holds: time.monotonic() in seconds, then bytes."""

_SHM = "/dev/shm"
_TAKEN = "samples.taken"


def tree(pids: Iterable[int]) -> Iterator[int]:
    """These processes and all their living descendants."""
    for pid in pids:
        yield pid
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{pid}/task"):
                yield from tree(map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split()))


def proportional(pid: int) -> tuple[int, int, int]:
    """Anonymous, file and shared part of a process's proportional set size, bytes; zeros when it is gone."""
    found = {"Pss_Anon": 0, "Pss_File": 0, "Pss_Shmem": 0}
    # A process may end between being listed and being read.
    with contextlib.suppress(OSError), open(f"/proc/{pid}/smaps_rollup") as lines:
        for line in lines:
            name, _, rest = line.partition(":")
            if name in found:
                found[name] = int(rest.split()[0]) * 1024
    return found["Pss_Anon"], found["Pss_File"], found["Pss_Shmem"]


class Segments:
    """The files in /dev/shm that belong to a process tree, found by who maps them.

    One that is to be counted while nobody maps it, too, has a name that begins with `prefix`.
    """

    def __init__(self, prefix: str = "") -> None:
        self._prefix = prefix
        self._ours: set[str] = set()

    def allocated(self, pids: Sequence[int]) -> int:
        """Bytes allocated to the named files that ``pids`` map or have mapped, and to those of the prefix."""
        total = 0
        with os.scandir(_SHM) as entries:
            found = {entry.name: entry for entry in entries}
        if self._prefix:
            self._ours |= {name for name in found if name.startswith(self._prefix)}
        # Reading the maps of a process with torch costs about a millisecond: only for names not yet known.
        if found.keys() - self._ours:
            self._ours |= found.keys() & mapped(pids)
        for name in found.keys() & self._ours:
            with contextlib.suppress(OSError):
                total += found[name].stat().st_blocks * 512
        return total


def mapped(pids: Iterable[int]) -> set[str]:
    """Names of the files in /dev/shm that any of these processes maps."""
    names: set[str] = set()
    for pid in pids:
        with contextlib.suppress(OSError), open(f"/proc/{pid}/maps") as lines:
            paths = (line.rstrip("\n").partition(f"{_SHM}/") for line in lines)
            names |= {name for _, found, name in paths if found}
    return names


def sample(pids: Sequence[int], segments: Segments, *, mixed: bool = False) -> tuple[float, int, int, int]:
    """One sample, in the order of `COLUMNS`."""
    members = [pid for pid in tree(pids) if pid != os.getpid()]
    parts = [proportional(pid) for pid in members]
    anon, file, shmem = (sum(column) for column in zip(*parts, strict=True))
    named = segments.allocated(members)
    return time.monotonic(), anon, file, max(named, shmem) if mixed else named or shmem


def wait_for_samples(folder: Path, count: int, *, timeout: float) -> None:
    """Until `count` samples were begun and taken from now on; TimeoutError after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    path = folder / _TAKEN
    # One more: the next to end may have begun before this call.
    wanted = (path.stat().st_size if path.exists() else 0) + count + 1
    while not path.exists() or path.stat().st_size < wanted:
        if time.monotonic() > deadline:
            raise TimeoutError(f"the memory sampler did not take {count} samples in {timeout:g} s")
        time.sleep(INTERVAL)


def main(folder: Path, pids: Sequence[int], *, mixed: bool) -> None:
    """Sample until standard input closes, then print everything as JSON."""
    with folder.joinpath(_TAKEN).open("wb", buffering=0) as taken:
        samples = _sample_until_closed(pids, taken, Segments(f"{folder.name}."), mixed=mixed)
    json.dump({"interval": INTERVAL, "columns": COLUMNS, "samples": samples}, sys.stdout)


def _sample_until_closed(
    pids: Sequence[int], taken: IO[bytes], segments: Segments, *, mixed: bool
) -> list[tuple[float, int, int, int]]:
    samples = []
    due = time.monotonic()
    while True:
        samples.append(sample(pids, segments, mixed=mixed))
        taken.write(b".")
        due = max(due + INTERVAL, time.monotonic())
        if select.select([sys.stdin], [], [], max(0.0, due - time.monotonic()))[0]:
            return samples


if __name__ == "__main__":
    given = [argument for argument in sys.argv[1:] if argument != "--mixed"]
    main(Path(given[0]), [int(pid) for pid in given[1:]], mixed="--mixed" in sys.argv)
