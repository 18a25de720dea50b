"""The readers' columns as the writer sees them: offered, admitted, scanned until their lock is free."""

from __future__ import annotations

import secrets
import time

import numpy as np
from numpy.typing import NDArray

from shm import layout as at
from shm.errors import AdmissionFailed, RingFull
from shm.handle import Offer
from shm.record import Tenant
from shm.segment import WriterSegment

Words = NDArray[np.uint64]
Mask = NDArray[np.bool_]


class Columns:
    """Who may open records of one ring. For the writer, under its lock."""

    def __init__(self, segment: WriterSegment) -> None:
        self.tenants: dict[int, Tenant] = {}
        self._segment = segment
        self._layout = segment.layout
        self._words = segment.columns
        self._array: Words = np.frombuffer(segment.columns, np.uint64)
        self._offered: dict[int, int] = {}
        self._scanned: list[tuple[int, int]] = []  # admitted columns, and their first hazard's index
        self._hazards: dict[int, Words] = {}

    def offer(self) -> Offer:
        """Name a free column and a fresh challenge for one reader; its pages are reserved from now on."""
        for column in range(self._layout.columns):
            taken = column in self.tenants or column in self._offered
            if not taken and not self._segment.reader_alive(column):
                self._segment.reserve_column(column)
                challenge = secrets.randbits(64) or 1
                self._segment.header[at.H_CHALLENGE + column] = challenge
                self._offered[column] = challenge
                return Offer(self._segment.name, column, challenge)
        raise RingFull(f"all {self._layout.columns} columns for readers are taken", what="columns")

    def admit(self, offer: Offer, name: str, pid: int) -> None:
        """Scan a column from now on, on the evidence of this process's own mapping of it."""
        column = offer.column
        if self._offered.get(column) != offer.challenge:
            raise AdmissionFailed(f"column {column} was not offered so")
        start = self._segment.column_word(column)
        if self._words[start + at.C_CHALLENGE] != offer.challenge:
            raise AdmissionFailed(f"the challenge is not in column {column}: not the same memory")
        if not self._segment.reader_alive(column):
            raise AdmissionFailed(f"nobody holds the lock of column {column}")
        self.withdraw(offer)
        first = start + at.C_HAZARD
        self._scanned.append((column, first))
        self._hazards[column] = self._array[first : first + self._layout.slots]
        self.tenants[column] = Tenant(name, pid, time.monotonic())

    def withdraw(self, offer: Offer) -> None:
        """The offer is good no longer: who comes with it now is refused."""
        if self._offered.get(offer.column) == offer.challenge:
            del self._offered[offer.column]
            self._segment.header[at.H_CHALLENGE + offer.column] = 0

    def reap(self) -> dict[int, Tenant]:
        """Stop scanning the columns whose lock is free; who had them."""
        gone = {c: tenant for c, tenant in self.tenants.items() if not self._segment.reader_alive(c)}
        for column in gone:
            del self.tenants[column], self._hazards[column]
        if gone:
            self._scanned = [entry for entry in self._scanned if entry[0] not in gone]
        return gone

    def name(self, column: int) -> str:
        """Who has a column, for people: its name, and its pid if known."""
        tenant = self.tenants.get(column)
        if tenant is None:
            return f"column {column}"
        return f"{tenant.name} (pid {tenant.pid})" if tenant.pid else tenant.name

    def unopened(self, generations: Words, *, most: int) -> list[int]:
        """The slots whose generation there is not 0 and open nowhere, as far as a glance can tell."""
        mask = generations != 0
        for hazards in self._hazards.values():
            mask &= hazards[: len(generations)] != generations
        slots: list[int] = mask.nonzero()[0][:most].tolist()
        return slots

    def has_reader(self, slot: int, generation: int) -> bool:
        """Whether a living reader has that generation open: each hazard word is read once."""
        words = self._words
        for column, first in self._scanned:
            if words[first + slot] == generation and self._segment.reader_alive(column):
                return True
        return False

    def opened(self, column: int, generations: Words) -> Mask:
        """Which of these slots a reader has open in these generations (0: no record)."""
        if column not in self._hazards:
            return np.zeros(len(generations), np.bool_)
        mask: Mask = (generations != 0) & (self._hazards[column][: len(generations)] == generations)
        return mask

    def oldest(self, column: int, opened: Mask) -> tuple[int, int] | None:
        """The slot that a reader has had open for longest, and since when (monotonic ns)."""
        slots = opened.nonzero()[0]
        if not len(slots):
            return None
        first = self._segment.column_word(column) + self._layout.opened_word
        since = self._array[first + slots]
        index = int(since.argmin())
        return int(slots[index]), int(since[index])

    def close(self) -> None:
        """Let go of the mapping."""
        self.tenants.clear()
        self._offered.clear()
        self._scanned.clear()
        self._hazards.clear()
        self._words = memoryview(b"").cast("Q")
        self._array = np.empty(0, np.uint64)
