"""The few calls of the CUDA runtime that torch does not offer: host memory registered, device memory shared.

They go to the library that torch has loaded, so that both see the same contexts. Nothing here is loaded
before it is needed. A call that fails leaves its error behind for the next call of its thread to raise,
innocent or not: so every failure is taken away (`cudaGetLastError`) and raised here.
"""

from __future__ import annotations

import ctypes
from ctypes import c_char, c_char_p, c_int, c_size_t, c_uint, c_void_p
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import torch

REGISTER_READ_ONLY = 8  # cudaHostRegisterReadOnly: for memory that is mapped read-only here
IPC_HANDLE_BYTES = 64
_LAZY_PEER_ACCESS = 1
_FROM_ADDRESSES = 4  # cudaMemcpyDefault: addresses tell which side is the device


class DeviceError(Exception):
    """A call of the CUDA runtime failed, or there is none; what was called and its own words."""


class _IpcHandle(ctypes.Structure):
    _fields_ = (("reserved", c_char * IPC_HANDLE_BYTES),)


class Runtime:
    """The CUDA runtime, for the device that is current in the calling thread. Methods raise `DeviceError`."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.cudaGetErrorString.restype = c_char_p
        library.cudaGetErrorString.argtypes = (c_int,)
        library.cudaHostRegister.argtypes = (c_void_p, c_size_t, c_uint)
        library.cudaHostUnregister.argtypes = (c_void_p,)
        library.cudaMemcpyAsync.argtypes = (c_void_p, c_void_p, c_size_t, c_int, c_void_p)
        library.cudaEventSynchronize.argtypes = (c_void_p,)
        library.cudaMalloc.argtypes = (ctypes.POINTER(c_void_p), c_size_t)
        library.cudaFree.argtypes = (c_void_p,)
        library.cudaIpcGetMemHandle.argtypes = (ctypes.POINTER(_IpcHandle), c_void_p)
        library.cudaIpcOpenMemHandle.argtypes = (ctypes.POINTER(c_void_p), _IpcHandle, c_uint)
        library.cudaIpcCloseMemHandle.argtypes = (c_void_p,)

    def use(self, device: int) -> None:
        """Make a device current in this thread, with the context that torch uses."""
        self._call("cudaSetDevice", c_int(device))

    def register(self, address: int, nbytes: int, *, read_only: bool) -> None:
        """Pin host memory (whole pages) and map it for every device."""
        self._call("cudaHostRegister", address, nbytes, REGISTER_READ_ONLY if read_only else 0)

    def unregister(self, address: int) -> None:
        """Undo `register` of a range that began at `address`."""
        self._call("cudaHostUnregister", address)

    def copy(self, destination: int, source: int, nbytes: int, stream: int) -> None:
        """Queue a copy between any two places that CUDA can tell by their addresses."""
        code = self._library.cudaMemcpyAsync(destination, source, nbytes, _FROM_ADDRESSES, stream)
        if code:
            self._fail("cudaMemcpyAsync", code)

    def wait(self, event: torch.cuda.Event) -> None:
        """Until all that was queued before an event is done; asleep, where the event is a blocking one.

        Unlike torch's own call this may stand in a daemon thread: Python ends one by unwinding its stack when
        the interpreter ends, and C++ that has let go of the GIL calls that an error and aborts the process.
        """
        self._call("cudaEventSynchronize", event.cuda_event)

    def allocate(self, nbytes: int) -> int:
        """The address of device memory of its own, which an IPC handle may share."""
        pointer = c_void_p()
        self._call("cudaMalloc", ctypes.byref(pointer), nbytes)
        return int(pointer.value or 0)

    def free(self, address: int) -> None:
        """Give an allocation back; waits for the device."""
        self._call("cudaFree", address)

    def share(self, address: int) -> bytes:
        """What another process of this host opens an allocation by, `IPC_HANDLE_BYTES` bytes."""
        handle = _IpcHandle()
        self._call("cudaIpcGetMemHandle", ctypes.byref(handle), address)
        return bytes(memoryview(handle))

    def attach(self, handle: bytes) -> int:
        """The address here of another process's allocation."""
        pointer = c_void_p()
        self._call(
            "cudaIpcOpenMemHandle",
            ctypes.byref(pointer),
            _IpcHandle.from_buffer_copy(handle),
            _LAZY_PEER_ACCESS,
        )
        return int(pointer.value or 0)

    def detach(self, address: int) -> None:
        """Undo `attach`."""
        self._call("cudaIpcCloseMemHandle", address)

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            self._fail(name, code)

    def _fail(self, name: str, code: int) -> NoReturn:
        self._library.cudaGetLastError()
        words = self._library.cudaGetErrorString(code).decode(errors="replace")
        raise DeviceError(f"{name} failed with error {code}: {words}")


@lru_cache(maxsize=1)
def runtime() -> Runtime:
    """The runtime that torch uses here. `DeviceError` where there is no GPU or no such library."""
    if not torch.cuda.is_available():
        raise DeviceError("torch finds no CUDA device here")
    torch.cuda.init()  # type: ignore[no-untyped-call]
    for name in (_loaded(), f"libcudart.so.{str(torch.version.cuda).partition('.')[0]}"):
        try:
            return Runtime(ctypes.CDLL(name))
        except (OSError, AttributeError) as error:
            reason = str(error)
    raise DeviceError(f"the CUDA runtime library that torch uses cannot be called: {reason}")


def _loaded() -> str:
    """The path of the runtime library in this process's memory."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.partition("/")[2]
        if path.rpartition("/")[2].startswith("libcudart"):
            return "/" + path
    return "no libcudart is loaded"
