"""Records of the ring as the tensors of one message, kept until each reader has let go of them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial

import shm
from transport.backends.base import Load, Parcel, Peer
from transport.tensors import Source


class ShmParcel(Parcel):
    """Records that count as in flight for each reader until it has taken the message."""

    def __init__(
        self, writer: shm.RingWriter, records: list[shm.Record], load: Load, columns: dict[Peer, int]
    ) -> None:
        self._writer = writer
        self._records = records
        self._load = load
        self._columns = columns

    @property
    def records(self) -> Sequence[tuple[shm.RingWriter, shm.Record]]:
        """The records and their ring; in the order of the tensors, where none of these is a loan or empty."""
        return [(self._writer, record) for record in self._records]

    def load(self, reader: Peer) -> Load:
        return self._load

    def release(self, reader: Peer) -> None:
        self._writer.drop(self._records, self._columns[reader])


class Unfilled(ShmParcel):
    """Records that are published, and filled only when the readers have been told, who follow the copy."""

    def __init__(
        self,
        writer: shm.RingWriter,
        records: list[shm.Record],
        load: Load,
        columns: dict[Peer, int],
        *,
        left: Sequence[tuple[Source, shm.Record]],
        threads: int,
    ) -> None:
        super().__init__(writer, records, load, columns)
        self._left = left
        self._threads = threads
        self._waiting = set(columns)  # who has not let go
        self._given_up: set[int] = set()  # slots
        self._lock = threading.Lock()

    def fill(self) -> None:
        try:
            _tenure = self._writer.tenure  # as in `ShmOutbound._fill`
            for source, record in self._left:
                if not self._waiting:  # nobody was told, or nobody is left
                    break
                source.fill(
                    self._writer.buffer(record),
                    threads=self._threads,
                    progress=partial(self._writer.progress, record),
                )
            else:
                self._writer.commit([record for _, record in self._left])
                self._left = ()  # what was copied may go, though the message is not acknowledged
                return
        except BaseException:
            self.abandon()
            raise
        self.abandon()

    def abandon(self) -> None:
        records = [record for _, record in self._left]
        self._left = ()
        with self._lock:
            self._given_up = {record.slot for record in records}
            self._writer.abort(records)

    def release(self, reader: Peer) -> None:
        with self._lock:
            self._waiting.discard(reader)
            records = [record for record in self._records if record.slot not in self._given_up]
            self._writer.drop(records, self._columns[reader])


class Parcels(Parcel):
    """One parcel for each ring that readers of a message map."""

    def __init__(self, parcels: Sequence[tuple[Parcel, Sequence[Peer]]]) -> None:
        self._parcels = [parcel for parcel, _ in parcels]
        self._of = {peer: parcel for parcel, readers in parcels for peer in readers}

    def load(self, reader: Peer) -> Load:
        return self._of[reader].load(reader)

    def release(self, reader: Peer) -> None:
        self._of[reader].release(reader)

    def fill(self) -> None:
        left = list(self._parcels)
        try:
            while left:
                left.pop().fill()
        except BaseException:  # the one that failed has given itself up
            for parcel in left:
                parcel.abandon()
            raise

    def abandon(self) -> None:
        for parcel in self._parcels:
            parcel.abandon()
