"""The packed state: one byte for each word of the protocol, then the messages under way, sorted."""

from __future__ import annotations

from collections.abc import Iterator

from tests.protocol.config import Config

# A step: the state after it; whether the protocol owes it or the world may choose it; the violation that it
# is, or ""; the words of its trace line, formatted only when somebody wants to read them.
Step = tuple[bytes, bool, str, tuple[object, ...]]

CORRUPT = "CORRUPT: bytes were given back under an open view"
LEAK = "LEAK: at rest, something is still held"
STUCK = "STUCK: somebody waits for ever"
REFUSED = "VALID HANDLE REFUSED"

# A process. Its column's lock is held from LOCKED to LEAVING; RENEWING is admitted and waits for a new link.
ABSENT, LOCKED, ZEROED, RENEWING, LINKED, LEAVING, DEAD = range(7)
READY, AWAIT_FINALIZER, STORE, REREAD = range(4)  # a reader's open
IDLE, LOOK, MARK, SCAN, GONE = range(5)  # the writer's reclaim
NEVER, LIVE, ENDED = range(3)  # a link, as its sending end sees it

# A message under way is (link, lane, number, slot, version). Sorted, the lowest HANDLE of a link is the next.
# EXTRA is a handle that comes a second time, or that nobody sent; FORGED is one whose extent is wrong, too.
RECORD = 5
HANDLE, ACK, EXTRA, FORGED, MISDELIVERED = range(5)
PING = 255  # the slot of an empty message

BUDGETS = (
    *("kills", "restarts", "replacements", "reconnects", "goodbyes"),
    *("losses", "doubles", "forgeries", "hand_ons", "resends", "writer_kills"),
)


def owed(out: list[Step], n: bytearray, *words: object, violation: str = "") -> None:
    """The protocol will take this step, sooner or later."""
    out.append((bytes(n), True, violation, words))


def possible(out: list[Step], n: bytearray, *words: object) -> None:
    """The world may take this step, or never."""
    out.append((bytes(n), False, "", words))


class Words:
    """Where each word lies in a state, and the arithmetic on it.

    A `version` is the true number of a slot's use. Slot lines, hazards and handles carry its `tag`; the two
    differ only where the rule that each use has a generation of its own is taken away. A view is kept as
    2 * version, plus 1 from the moment nobody can reach it any more (its finalizer is still to store 0).
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.guards = config.guards
        self.slots, self.columns = config.slots, config.columns
        self.processes = config.readers + config.restarts + config.replacements
        self.writer_links = self.processes * (1 + config.reconnects)
        self.links = self.writer_links + self.processes**2
        self._size = 0
        self._place_shared_words()
        self._place_processes()
        self._place_budgets()
        self.net = self._size
        self._no_count = bytes(self.writer_links)
        self._not_kept = bytes(self.processes)

    def _take(self, count: int = 1) -> int:
        offset = self._size
        self._size += count
        return offset

    def _place_shared_words(self) -> None:
        self.generation, self.line = self._take(self.slots), self._take(self.slots)
        self.live, self.own = self._take(self.slots), self._take(self.slots)
        self.writer, self.writer_slot = self._take(), self._take()
        self.seen, self.asking = self._take(), self._take()
        self.writer_buffer = self._take(4)
        self.admitted, self.hazard = self._take(), self._take(self.columns * self.slots)
        self.link, self.number = self._take(self.links), self._take(self.links)
        self.entry = self._take(self.links * self.slots)

    def _place_processes(self) -> None:
        count = self.processes
        self.status, self.name, self.column, self.epoch = (self._take(count) for _ in range(4))
        self.opening, self.open_slot, self.open_version = (self._take(count) for _ in range(3))
        self.open_link, self.open_number, self.open_lane = (self._take(count) for _ in range(3))
        self.view, self.orphan = self._take(count * self.slots), self._take(count * self.slots)
        self.buffer = self._take(count * 4)

    def _place_budgets(self) -> None:
        self.touched = self._take()
        self.kills, self.restarts, self.replacements, self.reconnects = (self._take() for _ in range(4))
        self.goodbyes, self.losses, self.doubles, self.forgeries = (self._take() for _ in range(4))
        self.hand_ons, self.resends, self.writer_kills = (self._take() for _ in range(3))

    def initial(self) -> bytes:
        """All readers admitted, each with a link, nothing sent."""
        n = bytearray(self.net)
        for r in range(self.config.readers):
            n[self.status + r], n[self.name + r], n[self.column + r] = LINKED, r, r
            n[self.link + r] = LIVE
            n[self.admitted] |= 1 << r
        for budget in BUDGETS:
            n[getattr(self, budget)] = getattr(self.config, budget)
        return bytes(n)

    def tag(self, version: int) -> int:
        return version if self.guards.new_generation else 1

    # -- columns and locks

    def hazards(self, s: bytes | bytearray, process: int) -> int:
        return self.hazard + s[self.column + process] * self.slots

    def held(self, s: bytes | bytearray, column: int) -> bool:
        """Whether a process holds the lock of this column, as the kernel would say."""
        for j in range(self.processes):
            if s[self.column + j] == column and LOCKED <= s[self.status + j] <= LEAVING:
                return True
        return False

    def free_columns(self, s: bytes) -> list[int]:
        return [c for c in range(self.columns) if not self.held(s, c)]

    def successor(self, s: bytes, process: int) -> bool:
        """Whether a later process goes by the same name."""
        name = s[self.name + process]
        return any(
            s[self.status + k] and s[self.name + k] == name for k in range(process + 1, self.processes)
        )

    def untouched_before(self, s: bytes, process: int) -> bool:
        """Whether a reader of lower number that nothing happened to can stand for this one (symmetry)."""
        return self.config.symmetry and s[self.touched] < process < self.config.readers

    def touch(self, n: bytearray, process: int) -> None:
        if process < self.config.readers and n[self.touched] <= process:
            n[self.touched] = process + 1

    # -- links

    def writer_link(self, s: bytes | bytearray, process: int) -> int:
        return process + s[self.epoch + process] * self.processes

    def peer_link(self, sender: int, receiver: int) -> int:
        return self.writer_links + sender * self.processes + receiver

    def receiver(self, link: int) -> int:
        return (link if link < self.writer_links else link - self.writer_links) % self.processes

    def is_current(self, s: bytes | bytearray, link: int) -> bool:
        """Whether the receiving end of this link is up."""
        process = self.receiver(link)
        if link >= self.writer_links:
            return self.is_up(s, process)
        return s[self.status + process] == LINKED and self.writer_link(s, process) == link

    def is_up(self, s: bytes | bytearray, process: int) -> bool:
        """Whether this process is there for its peers."""
        return RENEWING <= s[self.status + process] <= LINKED

    def sender_lives(self, s: bytes | bytearray, link: int) -> bool:
        if link < self.writer_links:
            return s[self.writer] != GONE
        return self.is_up(s, (link - self.writer_links) // self.processes)

    def in_flight(self, s: bytes, slot: int) -> bool:
        """Whether the writer's count on this slot is above 0."""
        end = self.entry + self.writer_links * self.slots
        return s[self.entry + slot : end : self.slots] != self._no_count

    def is_kept(self, s: bytes, process: int, slot: int) -> bool:
        """Whether a queue of this process keeps its view of this slot."""
        start = self.entry + self.peer_link(process, 0) * self.slots
        return s[start + slot : start + self.processes * self.slots : self.slots] != self._not_kept

    def entries(self, s: bytes | bytearray, link: int) -> bytes | bytearray:
        start = self.entry + link * self.slots
        return s[start : start + self.slots]

    def end_link(self, n: bytearray, link: int) -> None:
        """The sending end gives the link up; acknowledgements in it would be dropped: they go now."""
        n[self.link + link], n[self.number + link] = ENDED, 0
        if self.guards.end_clears_queue:
            start = self.entry + link * self.slots
            n[start : start + self.slots] = bytes(self.slots)
        self.remove(n, link, ACK)

    # -- messages

    def messages(self, s: bytes | bytearray) -> Iterator[int]:
        return iter(range(self.net, len(s), RECORD))

    def post(self, n: bytearray, *record: int) -> None:
        tail = [bytes(n[i : i + RECORD]) for i in self.messages(n)]
        tail.append(bytes(record))
        tail.sort()
        n[self.net :] = b"".join(tail)

    def remove(self, n: bytearray, link: int, lane: int) -> None:
        for i in reversed(list(self.messages(n))):
            if n[i] == link and n[i + 1] == lane:
                del n[i : i + RECORD]

    def send(self, n: bytearray, link: int, slot: int, version: int, *, keep: bool = True) -> None:
        """Queue entry, then control message."""
        if n[self.link + link] == NEVER:
            n[self.link + link] = LIVE
        n[self.number + link] += 1
        number = n[self.number + link]
        if keep and slot != PING:
            n[self.entry + link * self.slots + slot] = number
        self.post(n, link, HANDLE, number, slot, version)

    # -- store buffers (total store order): two pending stores of (slot + 1, value), oldest first

    def has_room(self, s: bytes | bytearray, buffer: int) -> bool:
        return not s[buffer + 2]

    def store(self, n: bytearray, buffer: int, base: int, slot: int, value: int) -> None:
        """A plain store: at once, or into the store buffer, which has room."""
        if self.config.tso:
            at = buffer + (2 if n[buffer] else 0)
            n[at], n[at + 1] = slot + 1, value
        else:
            n[base + slot] = value

    def drain(self, n: bytearray, buffer: int, base: int) -> None:
        n[base + n[buffer] - 1] = n[buffer + 1]
        n[buffer : buffer + 4] = n[buffer + 2 : buffer + 4] + b"\0\0"

    def fence(self, n: bytearray, buffer: int, base: int) -> None:
        while n[buffer]:
            self.drain(n, buffer, base)

    def load(self, s: bytes | bytearray, buffer: int, base: int, slot: int) -> int:
        """What the storing thread itself reads: its youngest pending store, else memory."""
        for at in (buffer + 2, buffer):
            if s[at] == slot + 1:
                return s[at + 1]
        return s[base + slot]
