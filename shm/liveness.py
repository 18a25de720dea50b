"""Who is alive, told by kernel byte-range locks on the segment file (F_OFD_SETLK, Linux).

Byte 0 is the writer's, byte 1 + c that of column c. Such a lock is held under SIGSTOP and gone after
SIGKILL, knows no pids and therefore no reuse of pids and no namespaces. It belongs to an open file
description, which lives as long as any descriptor *or mapping* made from it, and fork inherits both.
So the lock is carried by a mapping of one page of a description of its own, which children do not
inherit (MADV_DONTFORK), and no descriptor stays open: unlocking is munmap.

Only the one who wants a lock uses F_OFD_SETLK. Everybody else asks with F_OFD_GETLK, through a
descriptor opened for asking: a description does not conflict with itself.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import struct
import threading
import weakref

from shm.errors import ShmError

_FLOCK = struct.Struct("hhqqi4x")  # l_type, l_whence, l_start, l_len, l_pid
_PROT_NONE = 0
_MADV_DONTFORK = 10
_MAP_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t) + (ctypes.c_int,) * 3 + (ctypes.c_long,)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

# Held while a description exists that a child could inherit together with its lock.
_claiming = threading.Lock()
os.register_at_fork(
    before=_claiming.acquire, after_in_parent=_claiming.release, after_in_child=_claiming.release
)


class LivenessLock:
    """Byte `byte` of an open file, locked until `release` or until the last reference goes.

    `BlockingIOError` when somebody else holds it, `ShmError` on a kernel without these locks.
    """

    def __init__(self, fd: int, byte: int) -> None:
        with _claiming:
            address = _claim(fd, byte)
        self._finalizer = weakref.finalize(self, _unmap, address, os.getpid())
        self._finalizer.atexit = False

    def release(self) -> None:
        """Unlock, at once. Calling it again does nothing."""
        self._finalizer()


def _claim(fd: int, byte: int) -> int:
    own = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.fcntl(own, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
        address = _libc.mmap(None, mmap.PAGESIZE, _PROT_NONE, mmap.MAP_SHARED, own, 0)
        if address == _MAP_FAILED:
            raise OSError(ctypes.get_errno(), "cannot map the page that carries a lock")
        if _libc.madvise(address, mmap.PAGESIZE, _MADV_DONTFORK):
            _libc.munmap(address, mmap.PAGESIZE)
            raise OSError(ctypes.get_errno(), "cannot keep a lock from being inherited by fork")
        return int(address)
    except PermissionError as error:  # some kernels answer EACCES instead of EAGAIN
        raise BlockingIOError(errno.EAGAIN, "the byte is locked") from error
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise ShmError("this kernel has no locks of open file descriptions (F_OFD_SETLK)") from error
        raise
    finally:
        os.close(own)


def _unmap(address: int, pid: int) -> None:
    # In a child nothing is mapped there, or something of the child's own.
    if os.getpid() == pid:
        _libc.munmap(address, mmap.PAGESIZE)


def is_held(fd: int, byte: int) -> bool:
    """Whether anybody holds that byte. `fd` must not be of the description that holds it."""
    question = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, question)
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def started(pid: int) -> int:
    """When a process started, in clock ticks since boot (0: not to be had); for people, not for proof."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0
