"""What `--additional-config '{"tensorferry": {...}}'` says, and where the processes of one vLLM meet."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import socket
import stat
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import shm
from transport import TransportConfig

KEY = "tensorferry"
SAVED, NEW = ".json", ".new"  # the counters of a process, `PID-NUMBER.json`, and as they are being written
_RING_BYTES = 2 << 30  # in half of it two prompts of 32 images of 1 megapixel in bfloat16 fit
_LEAST_RING_BYTES = 256 << 20
# An image is larger. Steps of the usual size would keep up to two of them reserved beyond what is needed.
_RING_STEP_BYTES = 1 << 20
# What each queue from an EngineCore to its workers may touch: 10 chunks of 16 MiB. It does not reserve them,
# and where no page is left its writer dies of SIGBUS.
_SPARE_BYTES = 160 << 20
_YOUNG = 10.0  # seconds; a socket that zmq has bound and not yet listened at refuses, too
_FIXED = {"backend", "trace", "insecure"}  # vLLM's own path is what the ring is not


@dataclass(frozen=True)
class Settings:
    """How tensors go between vLLM's processes.

    `transport`: the fields that were given, all of `TransportConfig` but `backend`, `trace` and `insecure`.
    `copy_above`: part of the ring (0 to 1) above which the receiver copies a tensor out as it arrives, so
    that what vLLM keeps for minutes does not fill the ring; 0 copies always.
    """

    transport: TransportConfig
    copy_above: float = 0.5

    @property
    def largest(self) -> int:
        """Bytes of the largest tensor that one record can hold, its alignment included."""
        ring = self.transport.ring_bytes
        return min(int(ring * self.transport.peer_share), ring - ring // 16)


def options_in(additional_config: object) -> Any:
    """What it says of us, right or wrong; None where it asks for nothing."""
    given = additional_config.get(KEY) if isinstance(additional_config, Mapping) else None
    return None if given is False else given


def settings_of(
    additional_config: object, *, engines: int = 1, queues: int = 1, cache_bytes: int = 0
) -> Settings | None:
    """The settings in vLLM's `additional_config`; None when there are none: vLLM then runs as without us.

    The defaults depend on engines: those of a front end; queues: from EngineCores to workers on this host;
    cache_bytes: what an EngineCore's own cache of images may keep.
    ValueError: an option that is unknown or wrong, by name, or what is no option at all.
    """
    given = options_in(additional_config)
    if given is None:
        return None
    if given is not True and not isinstance(given, Mapping):
        example = '{"ring_bytes": 4294967296}'
        raise ValueError(f"{KEY} must be true, false or options such as {example}, not {given!r}")
    options: dict[str, Any] = {} if given is True else {str(name): given[name] for name in given}
    copy_above = options.pop("copy_above", 0.5)
    known = {field.name for field in dataclasses.fields(TransportConfig)} - _FIXED
    if unknown := sorted(set(options) - known):
        every = ", ".join(sorted({*known, "copy_above"}))
        raise ValueError(f"{KEY}: unknown option {', '.join(unknown)}; known: {every}")
    if not isinstance(copy_above, int | float) or not 0 <= copy_above <= 1:
        raise ValueError(f"{KEY}: copy_above must be from 0 to 1, not {copy_above!r}")
    spare = _SPARE_BYTES * max(1, queues)
    # Of several engines a stopped one must not have the whole ring; a single one may.
    defaults: dict[str, Any] = {
        "ring_bytes": _ring_bytes(cache_bytes, spare),
        "ring_step_bytes": _RING_STEP_BYTES,
        "shm_spare_bytes": spare,
        "peer_share": 1.0 if engines == 1 else 0.5,
    }
    try:
        transport = TransportConfig(**{**defaults, **options}, backend="shm")
    except ValueError as error:
        raise ValueError(f"{KEY}: {error}") from None
    return Settings(transport, float(copy_above))


def _ring_bytes(cache_bytes: int, spare: int) -> int:
    """So much that what the cache keeps stays below `copy_above`, half of it, as far as /dev/shm has that.

    An image of the cache takes memory in the ring in place of memory of the EngineCore.
    """
    try:
        free = (shm.space().free - spare) >> 20 << 20
    except shm.NoSpace:
        free = 0
    if free < _LEAST_RING_BYTES:
        return _RING_BYTES  # which does not fit: who makes the ring says so, and what to do
    return min(_RING_BYTES + 2 * cache_bytes, free)


def folder() -> Path:
    """Where this user's sockets and counters lie, mode 0700. OSError: somebody else's folder is there."""
    path = _place()
    path.mkdir(mode=0o700, exist_ok=True)
    seen = path.lstat()
    if not stat.S_ISDIR(seen.st_mode) or seen.st_uid != os.getuid() or seen.st_mode & 0o077:
        raise OSError(f"{path} must be a folder of this user alone (mode 0700)")
    return path


def _place() -> Path:
    return Path(tempfile.gettempdir(), f"tensorferry-{os.getuid()}")


def front_address(vllm_address: str) -> str:
    """Where the front end listens that binds this address of vLLM's own, which its engines know as well.

    Engines on other hosts compute it, too, and find nobody there.
    """
    return f"ipc://{folder()}/{hashlib.sha256(vllm_address.encode()).hexdigest()[:20]}.front"


def core_address(pid: int) -> str:
    """Where the EngineCore of that process listens for its workers, which are its children."""
    return f"ipc://{folder()}/{pid}.core"


def sweep() -> None:
    """Remove what killed processes left: their rings, their counters, and sockets where nobody answers."""
    if not _place().exists():  # none of this user's vLLMs was asked to use rings
        return
    shm.sweep()
    sweep_counters()
    for path in folder().glob("*.*"):
        if path.suffix in (".front", ".core"):
            with socket.socket(socket.AF_UNIX) as asked:
                try:
                    old = time.time() - path.lstat().st_mtime > _YOUNG
                    asked.connect(str(path))
                except ConnectionRefusedError:
                    if old:
                        path.unlink(missing_ok=True)
                except OSError:  # gone just now, or busy
                    continue


def identity() -> dict[str, int]:
    """Which process this is: pids come again, soonest in a container that starts again."""
    return {"pid": os.getpid(), "started": shm.started(os.getpid())}  # in clock ticks since boot; 0: unknown


def sweep_counters() -> None:
    """Remove the counters of processes that were killed."""
    for path in folder().iterdir():
        if path.suffix in (SAVED, NEW) and _is_left(path):
            path.unlink(missing_ok=True)


def _is_left(counters: Path) -> bool:
    """Whether their process has ended, also where another has its pid now."""
    try:
        pid = int(counters.stem.partition("-")[0])
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except ValueError:  # none of ours
        return False
    except OSError:  # another user's: not the one that wrote them, if it can be told
        pass
    try:
        noted = json.loads(counters.read_text())["started"]
    except (OSError, ValueError, LookupError, TypeError):  # being written, or an older version's
        return False
    started = shm.started(pid)
    return bool(noted and started and noted != started)


def exists(address: str) -> bool:
    """Whether the socket of an `ipc://` address is there, be it alive or not."""
    return os.path.exists(address.removeprefix("ipc://"))
