"""Tensors that stay on the GPU on their way to a process on the same GPU, by CUDA IPC.

The sender copies the tensor into its pool, the receiver out of it. A record in the ring stands for the piece
of the pool: it says where the piece is, and as long as it lives the piece is not used again. So all that the
ring promises (generations, stale handles, readers that die) holds for device memory, too. The receiver keeps
the record until an event behind its copy has happened.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import msgspec
import numpy as np
import torch

import shm
from transport import cudart, devices
from transport.backends.base import Bytes, Inbound, Load, Parcel, Peer, Poll
from transport.backends.records import ShmParcel
from transport.backends.shm import ShmInbound, ShmOutbound
from transport.config import TransportConfig
from transport.errors import Full, ProtocolError
from transport.sharing import Importer, Pool, Region
from transport.sources import DeviceSource
from transport.tensors import Source, source_of

NAME = "cuda"

_encode = msgspec.msgpack.Encoder().encode
_regions = msgspec.msgpack.Decoder(Region)


class CudaOutbound:
    """Puts tensors of a GPU for readers that proved to see the same one. A part of `auto`."""

    name = NAME

    def __init__(self, ring: ShmOutbound) -> None:
        self._ring = ring
        self._lock = threading.Lock()
        self._in_use: list[tuple[shm.RingWriter, shm.Record, Pool, Region]] = []
        self._tensors = self._nbytes = 0

    def takes(self, source: Source, readers: Sequence[Peer]) -> bool:
        """Whether a tensor can stay where it is for all of these readers."""
        if not isinstance(source, DeviceSource) or not self._ring.map_one_ring(readers):
            return False
        return all(self._ring.device_of(reader) == source.device for reader in readers)

    def put(
        self, sources: Sequence[Source], readers: Sequence[Peer], *, timeout: float, poll: Poll
    ) -> Parcel:
        """As `Outbound.put`, of sources that this takes. `Full` when the pool has no room now: no waiting."""
        mine = [source for source in sources if isinstance(source, DeviceSource)]
        taken = self._take(mine)
        try:
            for source, (pool, region) in zip(mine, taken, strict=True):
                source.copy_out(pool.address + region.offset)
            blobs = [np.frombuffer(_encode(region), np.uint8) for _, region in taken]
            records = [source for source in map(source_of, blobs) if source is not None]
            parcel = self._ring.put(records, readers, timeout=timeout, poll=poll)
        except BaseException:
            with self._lock:
                for pool, region in taken:
                    pool.give(region)
            raise
        assert isinstance(parcel, ShmParcel)
        with self._lock:
            for (ring, record), (pool, region) in zip(parcel.records, taken, strict=True):
                self._in_use.append((ring, record, pool, region))
            self._tensors += len(sources)
            self._nbytes += sum(source.nbytes for source in sources)
        return _OnDevice(parcel)

    def _take(self, sources: Sequence[DeviceSource]) -> list[tuple[Pool, Region]]:
        taken: list[tuple[Pool, Region]] = []
        with self._lock:
            for source in sources:
                pool = self._pool(source.device)
                region = pool.take(source.nbytes)
                if region is None and self._reclaim():
                    region = pool.take(source.nbytes)
                if region is None:
                    for other, piece in taken:
                        other.give(piece)
                    raise Full(f"{source.nbytes} bytes do not fit the pool of {pool.nbytes} on the GPU now")
                taken.append((pool, region))
        return taken

    def _pool(self, device: int) -> Pool:
        try:
            return self._ring.exporter.pool(device)
        except cudart.DeviceError as error:
            raise Full(f"there is no pool on the GPU: {error}") from error

    def _reclaim(self) -> bool:
        """Take back the pieces whose records nobody counts on or has open; whether there were any."""
        for ring in {ring.identity: ring for ring, *_ in self._in_use}.values():
            while ring.look():
                pass
        in_use, self._in_use = self._in_use, []
        for ring, record, pool, region in in_use:
            if ring.lives(record):
                self._in_use.append((ring, record, pool, region))
            else:
                pool.give(region)
        return len(self._in_use) < len(in_use)

    def statistics(self) -> dict[str, object]:
        """Tensors and bytes that stayed on a GPU."""
        return {"tensors": self._tensors, "nbytes": self._nbytes}


class _OnDevice(Parcel):
    """The records of a parcel under this backend's name."""

    def __init__(self, parcel: Parcel) -> None:
        self._parcel = parcel

    def load(self, reader: Peer) -> Load:
        return Load([(NAME, handle) for _, handle in self._parcel.load(reader).handles])

    def release(self, reader: Peer) -> None:
        self._parcel.release(reader)


class CudaInbound(Inbound):
    """Opens what `CudaOutbound` puts, into memory of this process's own on the same GPU."""

    name = NAME
    on_device = True

    def __init__(self, config: TransportConfig, ring: ShmInbound) -> None:
        super().__init__(config)
        self._ring = ring
        self._importer: Importer = ring.importer

    def open(self, peer: Peer, handle: bytes, nbytes: int, frames: Sequence[Bytes]) -> Bytes:
        """The bytes on the host, for who cannot have them on the GPU; see `open_on_device`."""
        array: Bytes = self.open_on_device(peer, handle, nbytes).cpu().numpy()
        return array

    def open_on_device(self, peer: Peer, handle: bytes, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes] on the GPU; the copy is queued on this thread's current stream there."""
        piece, device = self._find(peer, handle, nbytes)
        tensor = torch.empty(nbytes, dtype=torch.uint8, device=torch.device("cuda", device))
        devices.copy_in(tensor, 0, piece, torch.cuda.current_stream(device))
        return tensor

    def follow(
        self, peer: Peer, handle: bytes, nbytes: int, frames: Sequence[Bytes]
    ) -> Iterator[tuple[int, devices.Piece]]:
        yield 0, self._find(peer, handle, nbytes)[0]

    def _find(self, peer: Peer, handle: bytes, nbytes: int) -> tuple[devices.Piece, int]:
        record = self._ring.open_record(peer, handle)
        try:
            region = _regions.decode(record.data)
            if region.nbytes != nbytes or region.offset < 0:
                raise ProtocolError(f"{region.nbytes} bytes on the GPU where {nbytes} should be")
            address = self._importer.open(peer.link, region.device, region.handle) + region.offset
            return devices.Piece(address, nbytes, record), self._importer.device(region.device)
        except (msgspec.DecodeError, UnicodeDecodeError, cudart.DeviceError) as error:
            raise ProtocolError(f"a piece of {peer.name}'s GPU memory cannot be opened: {error}") from error

    def drop(self, peer: Peer) -> None:
        self._importer.drop(peer.link)

    def close(self) -> None:
        self._importer.close()
