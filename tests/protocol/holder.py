"""What a reader does with its views: hand on, drop, finalize; and the ends of its links and of itself."""

from __future__ import annotations

from tests.protocol.words import DEAD, ENDED, LEAVING, LIVE, READY, Step, Words, owed, possible


class Holder(Words):
    """One step is at most one access to a word that the writer reads; the rest of it is private."""

    def holding_steps(self, s: bytes, j: int, out: list[Step]) -> None:
        for slot in range(self.slots):
            if s[self.view + j * self.slots + slot]:
                self._view_steps(s, j, slot, out)
            if s[self.orphan + j * self.slots + slot]:
                self._late_finalizer(s, j, slot, out)
        self._end_peer_links(s, j, out)
        if s[self.status + j] == LEAVING:
            self._detach(s, j, out)

    def _view_steps(self, s: bytes, j: int, slot: int, out: list[Step]) -> None:
        if s[self.view + j * self.slots + slot] & 1:
            self._finalize(s, j, slot, out)
            return
        if not self.is_kept(s, j, slot):
            n = bytearray(s)
            n[self.view + j * self.slots + slot] |= 1
            owed(out, n, "p{} drops its view of s{}", j, slot)
        if s[self.hand_ons] and self.is_up(s, j):
            self._hand_on(s, j, slot, out)

    def _finalize(self, s: bytes, j: int, slot: int, out: list[Step]) -> None:
        """The store queues behind the opening thread's own, or is of a thread that got the view later."""
        buffer, hazards = self.buffer + j * 4, self.hazards(s, j)
        n = bytearray(s)
        n[self.view + j * self.slots + slot] = 0
        if slot + 1 not in (s[buffer], s[buffer + 2]):
            elsewhere = n[:]
            elsewhere[hazards + slot] = 0
            owed(out, elsewhere, "p{}'s finalizer stores 0 for s{}", j, slot)
        if self.config.tso and self.has_room(s, buffer):
            self.store(n, buffer, hazards, slot, 0)
            owed(out, n, "p{}'s finalizer stores 0 in the opening thread, for s{}", j, slot)

    def _hand_on(self, s: bytes, j: int, slot: int, out: list[Step]) -> None:
        version = s[self.view + j * self.slots + slot] >> 1
        for k in range(self.processes):
            if not self.is_up(s, k) or s[self.name + k] == s[self.name + j]:
                continue
            if self.untouched_before(s, k) or s[self.link + self.peer_link(j, k)] == ENDED:
                continue
            n = bytearray(s)
            n[self.hand_ons] -= 1
            self.touch(n, k)
            self.send(n, self.peer_link(j, k), slot, version, keep=self.guards.keep_view)
            possible(out, n, "p{} hands s{} g{} on to p{}", j, slot, version, k)

    def _late_finalizer(self, s: bytes, j: int, slot: int, out: list[Step]) -> None:
        n = bytearray(s)
        n[self.orphan + j * self.slots + slot] = 0
        n[self.hazards(s, j) + slot] = 0
        owed(out, n, "p{}'s older finalizer stores 0 for s{}", j, slot)

    # -- ends

    def _end_peer_links(self, s: bytes, j: int, out: list[Step]) -> None:
        for k in range(self.processes):
            link = self.peer_link(j, k)
            if s[self.link + link] == LIVE and (not self.is_up(s, k) or self.successor(s, k)):
                n = bytearray(s)
                self.end_link(n, link)
                owed(out, n, "p{} ends its link to p{}, which is dead, leaving or replaced", j, k)

    def end_own_links(self, n: bytearray, j: int) -> None:
        for k in range(self.processes):
            self.end_link(n, self.peer_link(j, k))

    def die(self, n: bytearray, j: int) -> None:
        """The lock goes when the process is torn down, so its pending stores have reached memory before."""
        self.fence(n, self.buffer + j * 4, self.hazards(n, j))
        n[self.status + j] = DEAD
        self.end_own_links(n, j)
        self.forget_open(n, j)
        for word in (self.view, self.orphan):
            n[word + j * self.slots : word + (j + 1) * self.slots] = bytes(self.slots)

    def _detach(self, s: bytes, j: int, out: list[Step]) -> None:
        start, end = j * self.slots, (j + 1) * self.slots
        busy = s[self.opening + j] or any(s[self.orphan + start : self.orphan + end])
        if not busy and not any(s[self.view + start : self.view + end]):
            n = bytearray(s)
            self.die(n, j)
            owed(out, n, "p{} has no view left and lets its lock go", j)

    def forget_open(self, n: bytearray, j: int) -> None:
        n[self.opening + j] = READY
        n[self.open_slot + j] = n[self.open_version + j] = 0
        n[self.open_link + j] = n[self.open_number + j] = n[self.open_lane + j] = 0
