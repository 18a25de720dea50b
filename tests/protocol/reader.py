"""How a reader receives and opens: own hazard, fence, the line once more, then a view or a refusal."""

from __future__ import annotations

from tests.protocol.holder import Holder
from tests.protocol.words import (
    ACK,
    AWAIT_FINALIZER,
    CORRUPT,
    EXTRA,
    FORGED,
    GONE,
    HANDLE,
    LEAVING,
    LIVE,
    LOCKED,
    MISDELIVERED,
    PING,
    RECORD,
    REFUSED,
    RENEWING,
    REREAD,
    STORE,
    ZEROED,
    Step,
    owed,
)


class Reader(Holder):
    """One step is at most one access to a word that the writer writes or reads; the rest of it is private.

    Taking a message and looking at the own hazard are one step: only this process stores there. So are the
    second read of the line, the view and the acknowledgement, which may take its time afterwards.
    """

    def reader_steps(self, s: bytes, j: int, out: list[Step]) -> None:
        status = s[self.status + j]
        if status == LOCKED:
            self._prepare_column(s, j, out)
        if not RENEWING <= status <= LEAVING:
            return
        self._go_on_opening(s, j, out)
        self.holding_steps(s, j, out)
        if s[self.buffer + j * 4]:
            n = bytearray(s)
            self.drain(n, self.buffer + j * 4, self.hazards(s, j))
            owed(out, n, "p{}'s oldest store reaches memory", j)

    def _prepare_column(self, s: bytes, j: int, out: list[Step]) -> None:
        n = bytearray(s)
        n[self.status + j] = ZEROED
        if self.guards.zeroing:
            at = self.hazards(s, j)
            n[at : at + self.slots] = bytes(self.slots)
        owed(out, n, "p{} prepares its column {} and answers the challenge", j, s[self.column + j])

    # -- receive and open

    def take(self, n: bytearray, j: int, at: int, out: list[Step], *, mine: bool) -> None:
        """Take the message at `at` out of the network, and look at the own hazard."""
        link, lane, number, slot, version = n[at : at + RECORD]
        if not mine:  # only without the check of links: it is taken for a message of the receiver's own link
            link = self._link_of_same_sender(n, link, j)
            lane = MISDELIVERED if lane == HANDLE else lane
        del n[at : at + RECORD]
        n[self.open_slot + j], n[self.open_version + j] = slot, version
        n[self.open_link + j], n[self.open_number + j], n[self.open_lane + j] = link, number, lane
        if slot == PING:
            self._finish(n, j)
            owed(out, n, "p{} answers an empty message", j)
            return
        if not self.guards.ack_after_open:
            self._acknowledge(n, j)
        self._look_at_own_hazard(n, j, out)

    def _link_of_same_sender(self, n: bytearray, link: int, j: int) -> int:
        if link < self.writer_links:
            return self.writer_link(n, j)
        return self.peer_link((link - self.writer_links) // self.processes, j)

    def _own_hazard(self, s: bytes | bytearray, j: int, slot: int) -> int:
        return self.load(s, self.buffer + j * 4, self.hazards(s, j), slot)

    def _look_at_own_hazard(self, n: bytearray, j: int, out: list[Step]) -> None:
        slot, version = n[self.open_slot + j], n[self.open_version + j]
        view = self.view + j * self.slots + slot
        hazard = self._own_hazard(n, j, slot)
        if hazard and hazard != self.tag(version):
            self._refuse(n, j, out, clear=False)
        elif not hazard:
            self._begin_store(n, j, out)
        elif n[view] and not n[view] & 1:
            self._share(n, j, out)
        elif self.guards.wait_for_finalizer:
            n[self.opening + j] = AWAIT_FINALIZER
            owed(out, n, "p{} takes s{} g{} and waits for its finalizer", j, slot, version)
        else:
            n[view], n[self.orphan + j * self.slots + slot] = 0, 1
            self._begin_store(n, j, out)

    def _share(self, n: bytearray, j: int, out: list[Step]) -> None:
        slot, version = n[self.open_slot + j], n[self.open_version + j]
        forged = n[self.open_lane + j] == FORGED
        if forged and self.guards.compare_extent:
            self._refuse(n, j, out, clear=False)
            return
        wrong = forged or n[self.view + j * self.slots + slot] != 2 * version
        self._finish(n, j)
        owed(
            out,
            n,
            "p{} takes s{} g{} and shares its view",
            j,
            slot,
            version,
            violation=CORRUPT if wrong else "",
        )

    def _begin_store(self, n: bytearray, j: int, out: list[Step]) -> None:
        """Without the second read of the line, the first is all there is."""
        slot, version = n[self.open_slot + j], n[self.open_version + j]
        if self.guards.reread or n[self.line + slot] >> 1 == self.tag(version):
            n[self.opening + j] = STORE
            owed(out, n, "p{} takes s{} g{}", j, slot, version)
        else:
            self._refuse(n, j, out, clear=False)

    def _go_on_opening(self, s: bytes, j: int, out: list[Step]) -> None:
        opening = s[self.opening + j]
        if opening == REREAD:
            self._reread(s, j, out)
        elif opening == STORE:
            self._store_hazard(bytearray(s), j, out, "p{} stores its hazard of s{} g{}")
        elif opening == AWAIT_FINALIZER and not self._own_hazard(s, j, s[self.open_slot + j]):
            self._store_hazard(bytearray(s), j, out, "p{} sees 0 and stores its hazard of s{} g{}")

    def _store_hazard(self, n: bytearray, j: int, out: list[Step], label: str) -> None:
        """With the fence the store is visible when this step ends; without, it may stay in the buffer."""
        slot, version = n[self.open_slot + j], n[self.open_version + j]
        buffer, hazards = self.buffer + j * 4, self.hazards(n, j)
        if n[buffer + 2]:
            self.drain(n, buffer, hazards)
        self.store(n, buffer, hazards, slot, self.tag(version))
        if self.guards.open_fence:
            self.fence(n, buffer, hazards)
        n[self.opening + j] = REREAD
        owed(out, n, label, j, slot, version)

    def _reread(self, s: bytes, j: int, out: list[Step]) -> None:
        line, tag = s[self.line + s[self.open_slot + j]], self.tag(s[self.open_version + j])
        closing = line == 2 * tag + 1
        n = bytearray(s)
        if not self.guards.reread:
            self._view(n, j, out)
        elif closing and not (s[self.writer] == GONE and self.guards.ask_writer_lock):
            return  # yields until the writer has decided
        elif line >> 1 != tag or (s[self.open_lane + j] == FORGED and self.guards.compare_extent):
            self._refuse(n, j, out, clear=True)
        else:
            self._view(n, j, out)

    def _view(self, n: bytearray, j: int, out: list[Step]) -> None:
        slot, version = n[self.open_slot + j], n[self.open_version + j]
        current = n[self.live + slot] and n[self.generation + slot] == version
        wrong = not current or n[self.open_lane + j] == FORGED
        n[self.view + j * self.slots + slot] = 2 * version
        self._finish(n, j)
        label = (
            "p{} reads the line of s{} again: a view of g{}"
            if self.guards.reread
            else "p{} has a view of s{} g{}"
        )
        owed(out, n, label, j, slot, version, violation=CORRUPT if wrong else "")

    def _refuse(self, n: bytearray, j: int, out: list[Step], *, clear: bool) -> None:
        slot, version = n[self.open_slot + j], n[self.open_version + j]
        buffer, hazards = self.buffer + j * 4, self.hazards(n, j)
        violation = REFUSED if self._promised(n, j) else ""
        if clear and self.guards.clear_on_refusal:
            if n[buffer + 2]:
                self.drain(n, buffer, hazards)
            self.store(n, buffer, hazards, slot, 0)
        self._finish(n, j)
        owed(out, n, "p{} refuses s{} g{}", j, slot, version, violation=violation)

    def _promised(self, n: bytearray, j: int) -> bool:
        """An original handle, in a link that is up at both ends, from a sender that lives, must open."""
        link = n[self.open_link + j]
        up = n[self.link + link] == LIVE and self.sender_lives(n, link) and self.is_current(n, link)
        return up and n[self.open_lane + j] == HANDLE

    def _finish(self, n: bytearray, j: int) -> None:
        if self.guards.ack_after_open or n[self.open_slot + j] == PING:
            self._acknowledge(n, j)
        self.forget_open(n, j)

    def _acknowledge(self, n: bytearray, j: int) -> None:
        """Acknowledgements are cumulative: a younger one takes the place of an older one still under way."""
        link = n[self.open_link + j]
        if n[self.open_lane + j] in (EXTRA, FORGED) or n[self.link + link] != LIVE:
            return
        if self.sender_lives(n, link):
            self.remove(n, link, ACK)
            self.post(n, link, ACK, n[self.open_number + j], 0, 0)
