"""Private folders for sockets and files: locked while their maker lives, swept by the next when it died.

The lock is an flock on the folder itself. The mapping that carries the locks of rings past every fork carries
none on an overlayfs, where a container's /tmp may lie. So the descriptor stays open here, and a child forked
by Python closes it; one forked from C keeps the lock until it ends.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

from engine.errors import StartError

# A name of its own: the folder of the vLLM plugin, tensorferry-UID, stays from run to run.
_PREFIX = "tensorferry."
_NAME = re.compile(r"tensorferry\.[a-z0-9_]{8}")
# Longest path of a Unix socket, of which the folder leaves room for the file's name.
_LONGEST = 107 - len("/front.sock")
_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_TRIES = 10  # each fails only where a sweep meets just this folder in the moment before it is locked

# Held while a descriptor exists that a forked child would not know of.
_claiming = threading.Lock()
_held: set[PrivateFolder] = set()


class PrivateFolder:
    """An empty folder that only this user may enter, its path short enough for a socket in it.

    Raises:
        StartError: nowhere is such a folder possible.
    """

    def __init__(self) -> None:
        sweep()
        with _claiming:
            self.path, self._descriptor = _made()
            _held.add(self)

    def close(self) -> None:
        """Remove it and what is in it; again, or in a forked child, whose it is not: nothing."""
        with _claiming:
            if self not in _held:
                return
            _held.remove(self)
            with suppress(OSError):
                _remove(self._descriptor, self.path)
            os.close(self._descriptor)


def sweep(*, dry_run: bool = False) -> list[str]:
    """Remove the folders of this user whose maker is dead, told by their locks alone; their paths."""
    found = []
    for parent in _parents():
        with suppress(OSError):
            names = sorted(filter(_NAME.fullmatch, os.listdir(parent)))
            found += [str(path) for name in names if _sweep(path := Path(parent, name), dry_run=dry_run)]
    return found


def _parents() -> list[str]:
    """Where such folders may lie, the best place first."""
    places = (os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir(), "/tmp")
    return [place for place in dict.fromkeys(places) if place]


def _made() -> tuple[Path, int]:
    tried = []
    for parent in _parents():
        if len(os.fsencode(parent)) + len(f"/{_PREFIX}12345678") > _LONGEST:
            tried.append(f"{parent}: too long for the path of a socket")
            continue
        try:
            return _made_in(parent)
        except OSError as error:
            tried.append(f"{parent}: {error.strerror}")
    raise StartError(
        f"no folder for the socket of the ranks ({'; '.join(tried)}); set TMPDIR to a short path"
    )


def _made_in(parent: str) -> tuple[Path, int]:
    for _ in range(_TRIES):
        path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))  # 0700
        if (descriptor := _locked(path)) is not None:
            return path, descriptor
        with suppress(OSError):
            path.rmdir()
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def _sweep(path: Path, *, dry_run: bool) -> bool:
    if (descriptor := _locked(path)) is None:
        return False
    try:
        if not dry_run:
            _remove(descriptor, path)
    except OSError:  # a folder in it, which we never make
        return False
    finally:
        os.close(descriptor)
    return True


def _locked(path: Path) -> int | None:
    """A descriptor that holds the lock of a folder; None: somebody else does, it is gone, or it is not ours.

    The place is open to everybody: links are not followed, and what is locked is what the name means.
    """
    try:
        descriptor = os.open(path, _OPEN)
    except OSError:
        return None
    with suppress(OSError):
        there = os.fstat(descriptor)
        if there.st_uid == os.geteuid() and not stat.S_IMODE(there.st_mode) & 0o077:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(there, path.lstat()):  # else a sweep was quicker
                return descriptor
    os.close(descriptor)
    return None


def _remove(descriptor: int, path: Path) -> None:
    """Remove the files of an open folder, wherever its name may lead by now, and then the name."""
    for name in os.listdir(descriptor):
        os.unlink(name, dir_fd=descriptor)
    path.rmdir()


def _let_go_in_child() -> None:
    for folder in _held:
        with suppress(OSError):
            os.close(folder._descriptor)
    _held.clear()
    _claiming.release()


os.register_at_fork(
    before=_claiming.acquire, after_in_parent=_claiming.release, after_in_child=_let_go_in_child
)
