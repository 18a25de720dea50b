"""The record protocol as a graph of states: readers, one writer, the network between them, what may go wrong.

python -m tests.protocol.model slots=2 columns=3 kills=1 hand_ons=1 [without=closing_mark,...] [limit=5000000]
"""

from __future__ import annotations

import sys
import time

from tests.protocol.config import parse
from tests.protocol.explore import explore
from tests.protocol.reader import Reader
from tests.protocol.words import (
    ABSENT,
    ACK,
    DEAD,
    ENDED,
    EXTRA,
    FORGED,
    GONE,
    HANDLE,
    LEAK,
    LEAVING,
    LINKED,
    LIVE,
    LOCKED,
    PING,
    READY,
    RECORD,
    RENEWING,
    STUCK,
    Step,
    owed,
    possible,
)
from tests.protocol.writer import Writer


class Model(Reader, Writer):
    """Everything together; the README beside says what is modelled, and what is not."""

    def successors(self, s: bytes) -> list[Step]:
        out: list[Step] = []
        self.writer_steps(s, out)
        for j in range(self.processes):
            if s[self.status + j]:
                self.reader_steps(s, j, out)
                self._faults(s, j, out)
        self._network(s, out)
        if s[self.writer_kills] and s[self.writer] != GONE:
            self._kill_writer(s, out)
        return out

    def at_rest(self, s: bytes) -> str:
        """What is wrong in a state from which only the world can go on; "" if nothing is."""
        gone = s[self.writer] == GONE
        for status, opening in zip(s[self.status : self.name], s[self.opening : self.open_slot], strict=True):
            if opening != READY or status == LEAVING or (LOCKED <= status <= RENEWING and not gone):
                return STUCK
        if gone:
            return ""  # nothing is reclaimed any more; the sweep takes the whole segment
        held = any(s[self.live : self.live + self.slots]) or any(s[self.entry : self.status])
        return LEAK if held else ""

    # -- the network

    def _network(self, s: bytes, out: list[Step]) -> None:
        """Acknowledgements and extra handles come in any order, the messages of one link in theirs."""
        previous = -1
        for at in self.messages(s):
            link, lane = s[at], s[at + 1]
            if lane in (HANDLE, ACK):
                self._message_faults(s, at, out)
            if lane == ACK:
                self._acknowledged(s, at, out)
            elif lane != HANDLE or link != previous:
                self._deliver(s, at, out)
            previous = link
        if self.guards.ping and any(s[self.entry : self.status]):
            self._pings(s, out)

    def _message_faults(self, s: bytes, at: int, out: list[Step]) -> None:
        link, lane, number, slot, version = s[at : at + RECORD]
        if s[self.losses]:
            n = bytearray(s)
            n[self.losses] -= 1
            del n[at : at + RECORD]
            what = "acknowledgement" if lane == ACK else "message"
            possible(out, n, "{} {} of link {} is LOST", what, number, link)
        if s[self.doubles] and lane == HANDLE and slot != PING:
            n = bytearray(s)
            n[self.doubles] -= 1
            self.post(n, link, EXTRA, number, slot, version)
            possible(out, n, "message {} of link {} is DOUBLED", number, link)

    def _acknowledged(self, s: bytes, at: int, out: list[Step]) -> None:
        link, number = s[at], s[at + 2]
        n = bytearray(s)
        del n[at : at + RECORD]
        for word in range(self.entry + link * self.slots, self.entry + (link + 1) * self.slots):
            if n[word] <= number:
                n[word] = 0
        self._renumber(n, link)
        owed(out, n, "the sender of link {} gets acknowledgement {}", link, number)

    def _renumber(self, n: bytearray, link: int) -> None:
        """A link on which nothing is under way may count from 1 again: that makes alike states equal."""
        if any(self.entries(n, link)) or any(n[at] == link for at in self.messages(n)):
            return
        if not any(n[self.opening + j] and n[self.open_link + j] == link for j in range(self.processes)):
            n[self.number + link] = 0

    def _deliver(self, s: bytes, at: int, out: list[Step]) -> None:
        """The queue of a link that is down at either end may reach another process of its name, or nobody."""
        link = s[at]
        target, current = self.receiver(link), self.is_current(s, link)
        astray = not current or s[self.link + link] == ENDED
        for j in range(self.processes):
            mine = current and j == target
            if s[self.opening + j] != READY or not (mine or (astray and self._mistakes(s, j, target))):
                continue
            self.take(bytearray(s), j, at, out, mine=mine)
        if astray:
            n = bytearray(s)
            del n[at : at + RECORD]
            owed(out, n, "a message of link {} reaches another link, or nobody, and is dropped", link)

    def _mistakes(self, s: bytes, j: int, target: int) -> bool:
        """Whether j would take what was meant for another link to its name."""
        same_name = s[self.name + j] == s[self.name + target]
        return same_name and s[self.status + j] == LINKED and not self.guards.link_check

    def _pings(self, s: bytes, out: list[Step]) -> None:
        """Who waits for an acknowledgement while nothing is under way sends an empty message."""
        waiting = {(word - self.entry) // self.slots for word in range(self.entry, self.status) if s[word]}
        for link in sorted(waiting):
            j = self.receiver(link)
            busy = s[self.opening + j] and s[self.open_link + j] == link
            under_way = any(s[at] == link and s[at + 1] in (HANDLE, ACK) for at in self.messages(s))
            if busy or under_way or s[self.link + link] != LIVE or not self.is_current(s, link):
                continue
            n = bytearray(s)
            self.send(n, link, PING, 0)
            owed(out, n, "the sender of link {} sends an empty message", link)

    # -- what the world may do

    def _faults(self, s: bytes, j: int, out: list[Step]) -> None:
        status = s[self.status + j]
        if self.untouched_before(s, j):
            return
        if status != DEAD and s[self.kills]:
            n = self._spend(s, self.kills, j)
            self.die(n, j)
            possible(out, n, "SIGKILL p{}", j)
        if status == DEAD and s[self.restarts]:
            self._start(s, j, self.restarts, out)
        if status != LINKED:
            return
        if s[self.replacements]:
            self._start(s, j, self.replacements, out)
        if s[self.opening + j] == READY:
            self._ends(s, j, out)
        if s[self.forgeries]:
            self._forge(s, j, out)

    def _spend(self, s: bytes, budget: int, j: int) -> bytearray:
        n = bytearray(s)
        n[budget] -= 1
        self.touch(n, j)
        return n

    def _kill_writer(self, s: bytes, out: list[Step]) -> None:
        n = bytearray(s)
        n[self.writer_kills] -= 1
        self.fence(n, self.writer_buffer, self.line)
        n[self.writer] = GONE
        for link in range(self.writer_links):
            self.end_link(n, link)
        possible(out, n, "SIGKILL W")

    def _start(self, s: bytes, j: int, budget: int, out: list[Step]) -> None:
        new = s.find(ABSENT, self.status, self.name) - self.status
        if new < 0 or self.successor(s, j):
            return
        for column in self.free_columns(s):
            n = self._spend(s, budget, j)
            n[self.status + new], n[self.name + new], n[self.column + new] = LOCKED, s[self.name + j], column
            possible(out, n, "p{} starts under the name of p{} and locks column {}", new, j, column)

    def _ends(self, s: bytes, j: int, out: list[Step]) -> None:
        if s[self.goodbyes]:
            n = self._spend(s, self.goodbyes, j)
            n[self.status + j] = LEAVING
            self.end_own_links(n, j)
            possible(out, n, "p{} says goodbye", j)
        if s[self.reconnects] and s[self.epoch + j] == 0 and not self.successor(s, j):
            n = self._spend(s, self.reconnects, j)
            n[self.epoch + j] = 1
            n[self.status + j] = RENEWING if self.guards.reconnect_keeps_column else LOCKED
            possible(out, n, "p{} loses its connection and asks for a new link", j)

    def _forge(self, s: bytes, j: int, out: list[Step]) -> None:
        for slot in range(self.slots):
            for version in range(1, self.config.generations + 1):
                for lane, extent in ((EXTRA, "right"), (FORGED, "wrong")):
                    n = self._spend(s, self.forgeries, j)
                    self.post(n, self.writer_link(s, j), lane, 0, slot, version)
                    possible(out, n, "p{} gets a FORGED handle: s{} g{}, {} extent", j, slot, version, extent)


def main(arguments: list[str]) -> int:
    """Explore what the command line says, print what was seen, return 1 where a rule is violated."""
    words = dict(word.partition("=")[::2] for word in arguments)
    limit = int(words.pop("limit", "5000000"))
    model = Model(parse(f"{name}={value}" for name, value in words.items()))
    started = time.monotonic()
    result = explore(model, limit=limit)
    print(result)
    print(f"{time.monotonic() - started:.1f} s; {model.config}")
    return 1 if result.violation else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ValueError as error:
        sys.exit(f"error: {error}")
