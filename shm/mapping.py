"""Shared mappings that a forked child does not inherit, and whose addresses it cannot use for anything else.

A child that kept the parent's mappings would keep its memory, and could read bytes that change or store
into words that have another writer. `MADV_DONTFORK` takes them away; but then the child's own memory may
come to lie at those addresses, where a view that the child inherited would read or write it, and the
collection of an inherited `mmap` object would unmap it. So a child puts inaccessible pages there first.
(A fork from C runs no hook: such a child has the addresses free, and no Python to use them with.)
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref

READ = mmap.PROT_READ
READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
_PROT_NONE = 0
_MAP_NORESERVE = 0x4000
_MAP_FIXED_NOREPLACE = 0x100000
_PLACEHOLDER = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE | _MAP_FIXED_NOREPLACE

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t) + (ctypes.c_int,) * 3 + (ctypes.c_long,)

_parents: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()
_forks = 0  # how many forks lie between this process and the one that imported this


class _Buffer(ctypes.Structure):
    """CPython's `Py_buffer`, as far as the address; the rest is room."""

    _fields_ = (("address", ctypes.c_void_p), ("rest", ctypes.c_char * 256))


def lineage() -> int:
    """Another number in a forked child than in its parent: os.getpid() for hot paths, without the call."""
    return _forks


def map_shared(fd: int, length: int, offset: int, protection: int, *, dump: bool = True) -> mmap.mmap:
    """Map part of a file, shared, for this process alone; `dump`: a core dump holds its bytes."""
    mapping = mmap.mmap(fd, length, flags=mmap.MAP_SHARED, prot=protection, offset=offset)
    mapping.madvise(mmap.MADV_DONTFORK)
    if not dump:
        mapping.madvise(mmap.MADV_DONTDUMP)
    _parents.add(mapping)
    return mapping


def address_of(mapping: mmap.mmap) -> int:
    """Where a mapping begins in this process's memory."""
    buffer = _Buffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(mapping), ctypes.byref(buffer), 0)
    try:
        return int(buffer.address or 0)
    finally:
        ctypes.pythonapi.PyBuffer_Release(ctypes.byref(buffer))


def _in_child() -> None:
    global _forks
    _forks += 1
    for mapping in list(_parents):
        address = address_of(mapping)
        if _libc.mmap(address, len(mapping), _PROT_NONE, _PLACEHOLDER, -1, 0) != address:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(mapping))  # never collected, so never unmapped
    _parents.clear()


os.register_at_fork(after_in_child=_in_child)
