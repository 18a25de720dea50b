"""Device memory that another process on the same GPU reads: the proof that it can, a pool, and its other end.

CUDA shares whole allocations, so what is shared is not the sender's tensor but a pool of our own: the tensor
is copied into it, which on the device takes a fiftieth of the way over the bus. How long a piece of the pool
is in use is told by a record in the ring that stands for it (`transport.backends.cuda`).

Two processes see the same GPU if they see the same UUID and one of them can read what the other wrote into
an allocation that it shared: virtual machines, containers and CUDA_VISIBLE_DEVICES make numbers worthless.
"""

from __future__ import annotations

import logging
import secrets
import threading
from bisect import insort
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import msgspec
import torch

from transport import cudart, devices
from transport.cudart import DeviceError

_log = logging.getLogger("tensorferry.transport")

_CHALLENGE_BYTES = 32
_ALIGNMENT = 512


class _Shared(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """An allocation that another process may open: on which GPU, and by what."""

    device: str
    handle: bytes


class Region(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Some bytes of a shared allocation: what the record in the ring holds."""

    device: str
    handle: bytes
    offset: int
    nbytes: int


class Challenge(NamedTuple):
    """What a peer is asked to read: the GPU's number here, the offer to it, and the answer that is right."""

    device: int
    offer: bytes
    answer: bytes


def uuid_of(device: int) -> str:
    """What a GPU is called everywhere."""
    return str(torch.cuda.get_device_properties(device).uuid)


class Exporter:
    """The sharing side of a process: challenges, and one pool for each GPU, made when first used."""

    def __init__(self, pool_bytes: int) -> None:
        self._pool_bytes = pool_bytes
        self._lock = threading.Lock()
        self._challenge: Challenge | None = None
        self._pools: dict[int, Pool] = {}
        self._owned: list[int] = []

    def challenge(self) -> Challenge | None:
        """For every peer the same; None where this process does not use a GPU."""
        if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            return None
        with self._lock:
            if self._challenge is None:
                try:
                    self._challenge = self._make_challenge()
                except DeviceError:  # a GPU that shares nothing, as some virtual ones
                    return None
            return self._challenge

    def _make_challenge(self) -> Challenge:
        runtime, device = cudart.runtime(), torch.cuda.current_device()
        secret = secrets.token_bytes(_CHALLENGE_BYTES)
        address = runtime.allocate(_CHALLENGE_BYTES)
        self._owned.append(address)
        data = torch.frombuffer(bytearray(secret), dtype=torch.uint8)
        stream = torch.cuda.current_stream()
        runtime.copy(address, data.data_ptr(), _CHALLENGE_BYTES, stream.cuda_stream)
        stream.synchronize()
        offer = msgspec.msgpack.encode(_Shared(uuid_of(device), runtime.share(address)))
        return Challenge(device, offer, secret)

    def pool(self, device: int) -> Pool:
        """The pool on that GPU. `DeviceError` when there is no memory for it."""
        with self._lock:
            if device not in self._pools:
                with torch.cuda.device(device):
                    address = cudart.runtime().allocate(self._pool_bytes)
                    self._owned.append(address)
                    handle = cudart.runtime().share(address)
                self._pools[device] = Pool(address, self._pool_bytes, uuid_of(device), handle)
            return self._pools[device]

    def close(self) -> None:
        """Give the memory back. Who has it open reads on: the driver counts."""
        with self._lock:
            self._challenge = None
            self._pools.clear()
            while self._owned:
                with suppress(DeviceError):  # at exit the driver may have taken it back already
                    cudart.runtime().free(self._owned.pop())


class Pool:
    """One shared allocation, of which pieces are in use. Not safe for threads."""

    def __init__(self, address: int, nbytes: int, device: str, handle: bytes) -> None:
        self.address = address
        self.nbytes = nbytes
        self._device = device
        self._handle = handle
        self._used: list[tuple[int, int]] = []  # offset, end; in order

    def take(self, nbytes: int) -> Region | None:
        """The lowest place that fits, or None."""
        offset = 0
        for start, end in self._used:
            if start - offset >= nbytes:
                break
            offset = -(-end // _ALIGNMENT) * _ALIGNMENT
        if offset + nbytes > self.nbytes:
            return None
        insort(self._used, (offset, offset + nbytes))
        return Region(self._device, self._handle, offset, nbytes)

    def give(self, region: Region) -> None:
        """A piece is not used any more."""
        self._used.remove((region.offset, region.offset + region.nbytes))


class Importer:
    """The other side: allocations of other processes, opened once for each link."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._opened: dict[int, dict[bytes, int]] = {}

    def answer(self, link: int, offer: bytes) -> bytes:
        """What the peer wrote into the allocation that it offers; b"" where this process cannot read it."""
        if not offer or not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            return b""
        try:
            shared = msgspec.msgpack.decode(offer, type=_Shared)
            stream = torch.cuda.current_stream(self.device(shared.device))
            found = torch.empty(_CHALLENGE_BYTES, dtype=torch.uint8)
            address = self.open(link, shared.device, shared.handle)
            cudart.runtime().copy(found.data_ptr(), address, _CHALLENGE_BYTES, stream.cuda_stream)
            stream.synchronize()
            return bytes(found.numpy())
        except (msgspec.DecodeError, UnicodeDecodeError, DeviceError):
            return b""

    def device(self, uuid: str) -> int:
        """The number here of a GPU. `DeviceError` when this process does not see it."""
        for device in range(torch.cuda.device_count()):
            if uuid_of(device) == uuid:
                return device
        raise DeviceError("that GPU is not visible here")

    def open(self, link: int, uuid: str, handle: bytes) -> int:
        """The address here of an allocation. `DeviceError`."""
        if len(handle) != cudart.IPC_HANDLE_BYTES:
            raise DeviceError(f"a handle has {cudart.IPC_HANDLE_BYTES} bytes, not {len(handle)}")
        with self._lock:
            opened = self._opened.setdefault(link, {})
            if handle not in opened:
                with torch.cuda.device(self.device(uuid)):
                    opened[handle] = cudart.runtime().attach(handle)
            return opened[handle]

    def drop(self, link: int) -> None:
        """The link ended: let its allocations go, once the copies from them that are under way are done."""
        with self._lock:
            opened = self._opened.pop(link, {})
        if opened:
            devices.after_copies(partial(_detach, list(opened.values())))

    def close(self) -> None:
        """Let every allocation go, likewise."""
        for link in list(self._opened):
            self.drop(link)


def _detach(addresses: Sequence[int]) -> None:
    for address in addresses:
        try:
            cudart.runtime().detach(address)
        except DeviceError as error:
            _log.warning("memory of another process on the GPU stays open here: %s", error)
