"""The writer's steps: commit, reclaim, admission, and noticing that a link has ended."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

from tests.protocol.words import (
    CORRUPT,
    DEAD,
    ENDED,
    GONE,
    IDLE,
    LEAVING,
    LINKED,
    LIVE,
    LOOK,
    MARK,
    RENEWING,
    SCAN,
    ZEROED,
    Step,
    Words,
    owed,
    possible,
)


class Writer(Words):
    """One step is at most one access to a word that a reader writes or reads; the rest of it is private.

    The last look of a reclaim, the line's 0 and the return of the bytes are one step: who opens in between
    waits for CLOSING to pass, and is refused either way.
    """

    def writer_steps(self, s: bytes, out: list[Step]) -> None:
        if s[self.writer] == GONE:
            return
        for slot in range(self.slots):
            if not s[self.live + slot]:
                self._commits(s, slot, out)
                continue
            if s[self.own + slot]:
                self._own_count(s, slot, out)
            if s[self.writer] == IDLE:
                self._candidate(s, slot, out)
        if s[self.writer] != IDLE:
            self._go_on_reclaiming(s, out)
        if s[self.writer_buffer]:
            n = bytearray(s)
            self.drain(n, self.writer_buffer, self.line)
            owed(out, n, "W's oldest store reaches memory")
        for j in range(self.processes):
            self._peer_steps(s, j, out)

    # -- commit

    def _commits(self, s: bytes, slot: int, out: list[Step]) -> None:
        """Sending takes locks, so the line is visible before a message is."""
        used = s[self.generation + slot]
        if used >= self.config.generations or s[self.writer] != IDLE or s[self.writer_buffer]:
            return
        if self.config.symmetry and not used and any(not s[self.generation + other] for other in range(slot)):
            return  # slots that were never used are alike
        for links in self._addressees(s):
            for own in (0, 1) if self.config.loans else (0,):
                n = bytearray(s)
                version = n[self.generation + slot] = used + 1
                n[self.line + slot], n[self.live + slot], n[self.own + slot] = 2 * self.tag(version), 1, own
                for link in links:
                    self.send(n, link, slot, version)
                    self.touch(n, self.receiver(link))
                label = "W commits s{} g{} in links {}" + ", keeping a view of its own" * own
                possible(out, n, label, slot, version, links)

    def _addressees(self, s: bytes) -> Iterator[tuple[int, ...]]:
        sendable = (LIVE,) if self.guards.send_lock else (LIVE, ENDED)
        links = [x for x in range(self.writer_links) if s[self.link + x] in sendable]
        for link in links:
            if not self.untouched_before(s, self.receiver(link)):
                yield (link,)
        if self.config.broadcast:
            for a, b in combinations(links, 2):
                first, second = sorted((self.receiver(a), self.receiver(b)))
                reachable = max(s[self.touched], first + 1) if self.config.symmetry else self.config.readers
                if not self.untouched_before(s, first) and (
                    second <= reachable or second >= self.config.readers
                ):
                    yield (a, b)

    def _own_count(self, s: bytes, slot: int, out: list[Step]) -> None:
        n = bytearray(s)
        n[self.own + slot] = 0
        owed(out, n, "W drops its own view of s{}", slot)
        if not s[self.resends]:
            return
        for link in range(self.writer_links):
            if s[self.link + link] == LIVE and not self.untouched_before(s, self.receiver(link)):
                n = bytearray(s)
                n[self.resends] -= 1
                self.send(n, link, slot, s[self.generation + slot])
                self.touch(n, self.receiver(link))
                possible(out, n, "W sends s{} again, in link {}", slot, link)

    # -- reclaim

    def _candidate(self, s: bytes, slot: int, out: list[Step]) -> None:
        """The first look is only a filter: it may come out either way, unless its steps are asked for."""
        if self.guards.in_flight_count and self.in_flight(s, slot):
            return
        if self.guards.own_count and s[self.own + slot]:
            return
        due = not self._shown(s, slot)
        if not self.config.first_look:
            self._mark(s, slot, out, due=due)
            return
        n = bytearray(s)
        n[self.writer], n[self.writer_slot] = LOOK, slot
        out.append((bytes(n), due, "", ("W looks at s{}", slot)))

    def _shown(self, s: bytes, slot: int) -> bool:
        """Whether a look, now, would find the slot in use: then no reclaim is due."""
        tag = self.tag(s[self.generation + slot])
        return any(
            s[self.admitted] >> c & 1
            and s[self.hazard + c * self.slots + slot] == tag
            and self._believed(s, c)
            for c in range(self.columns)
        )

    def _believed(self, s: bytes, column: int) -> bool:
        return not self.guards.ask_lock or self.held(s, column)

    def _mark(self, s: bytes, slot: int, out: list[Step], *, due: bool) -> None:
        if not self.has_room(s, self.writer_buffer):
            return
        n = bytearray(s)
        closing = 2 * self.tag(s[self.generation + slot]) + 1 if self.guards.closing_mark else 0
        self.store(n, self.writer_buffer, self.line, slot, closing)
        if self.guards.reclaim_fence:
            self.fence(n, self.writer_buffer, self.line)
        n[self.writer], n[self.writer_slot] = SCAN, slot
        if self.guards.second_look:
            out.append((bytes(n), due, "", ("W marks s{} CLOSING", slot)))
        else:
            self._give_back(n, out)

    def _go_on_reclaiming(self, s: bytes, out: list[Step]) -> None:
        left = s[self.admitted] & ~s[self.seen]
        if s[self.writer] == MARK:
            self._mark(s, s[self.writer_slot], out, due=True)
        elif s[self.asking]:
            self._ask(s, s[self.asking] - 1, out)
        elif left:
            self._read_hazards(s, left, out)
        else:
            self._decided(bytearray(s), out)

    def _read_hazards(self, s: bytes, left: int, out: list[Step]) -> None:
        """Each admitted column once, in any order."""
        slot = s[self.writer_slot]
        for c in range(self.columns):
            if not left >> c & 1:
                continue
            n = bytearray(s)
            if s[self.hazard + c * self.slots + slot] == self.tag(s[self.generation + slot]):
                n[self.asking] = c + 1
                owed(out, n, "W reads a hazard of s{} in column {}", slot, c)
            else:
                self._clear(n, c, out)

    def _ask(self, s: bytes, column: int, out: list[Step]) -> None:
        n = bytearray(s)
        n[self.asking] = 0
        if not self._believed(s, column):
            self._clear(n, column, out)
            return
        slot = s[self.writer_slot]
        if s[self.writer] == SCAN and self.guards.restore:
            if not self.has_room(s, self.writer_buffer):
                return
            self.store(n, self.writer_buffer, self.line, slot, 2 * self.tag(s[self.generation + slot]))
        n[self.writer] = n[self.writer_slot] = n[self.seen] = 0
        owed(out, n, "W finds the lock of column {} held: s{} stays", column, slot)

    def _clear(self, n: bytearray, column: int, out: list[Step]) -> None:
        n[self.seen] |= 1 << column
        if n[self.admitted] & ~n[self.seen]:
            owed(out, n, "W finds s{} clear in column {}", n[self.writer_slot], column)
        else:
            self._decided(n, out)

    def _decided(self, n: bytearray, out: list[Step]) -> None:
        if n[self.writer] == LOOK:
            n[self.writer], n[self.seen] = MARK, 0
            owed(out, n, "W found s{} clear: a candidate", n[self.writer_slot])
        elif self.has_room(n, self.writer_buffer):
            self._give_back(n, out)

    def _give_back(self, n: bytearray, out: list[Step]) -> None:
        slot = n[self.writer_slot]
        self.store(n, self.writer_buffer, self.line, slot, 0)
        views = n[self.view + slot : self.orphan : self.slots]
        in_use = n[self.own + slot] or any(view and not view & 1 for view in views)
        n[self.live + slot] = n[self.own + slot] = 0
        n[self.writer] = n[self.writer_slot] = n[self.seen] = 0
        owed(out, n, "W gives the bytes of s{} back", slot, violation=CORRUPT if in_use else "")

    # -- links

    def _peer_steps(self, s: bytes, j: int, out: list[Step]) -> None:
        status = s[self.status + j]
        if ZEROED <= status <= RENEWING:
            self._admit(s, j, out)
        elif status >= LEAVING:
            self._notice(s, j, out)
        elif status == LINKED and not s[self.admitted] >> s[self.column + j] & 1:
            self._scan_at_last(s, j, out)

    def _admit(self, s: bytes, j: int, out: list[Step]) -> None:
        """The challenge stands in the column under a held lock: scan it from now on, then acknowledge."""
        n = bytearray(s)
        for k in range(self.processes):
            if s[self.name + k] == s[self.name + j] and s[self.status + k]:
                self._end_links_to(n, k)
        link = self.writer_link(s, j)
        n[self.status + j], n[self.link + link] = LINKED, LIVE
        if self.guards.scan_before_answer:
            n[self.admitted] |= 1 << s[self.column + j]
        owed(out, n, "W admits p{} in column {}, link {}", j, s[self.column + j], link)

    def _scan_at_last(self, s: bytes, j: int, out: list[Step]) -> None:
        n = bytearray(s)
        n[self.admitted] |= 1 << s[self.column + j]
        owed(out, n, "W scans column {} from now on", s[self.column + j])

    def _end_links_to(self, n: bytearray, process: int) -> bool:
        live = [x for x in range(process, self.writer_links, self.processes) if n[self.link + x] == LIVE]
        for link in live:
            self.end_link(n, link)
        return bool(live)

    def _notice(self, s: bytes, j: int, out: list[Step]) -> None:
        n = bytearray(s)
        column, dead = s[self.column + j], s[self.status + j] == DEAD
        ended = self._end_links_to(n, j)
        if (dead and not self._believed(s, column)) or (ended and not self.guards.scan_until_free):
            n[self.admitted] &= ~(1 << column)
        if n != s:
            owed(out, n, "W notices the {} of p{}", "death" if dead else "goodbye", j)
