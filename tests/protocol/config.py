"""What one exploration covers: sizes, how often each thing may go wrong, which guards are in force."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Guards:
    """The rules that keep the record protocol right; each may be taken away alone, to see what it was for."""

    open_fence: bool = True  # between the store of the hazard and the second read of the slot line
    reclaim_fence: bool = True  # between the CLOSING mark and the second look at the hazards
    second_look: bool = True  # reclaim reads every hazard again after the mark
    reread: bool = True  # open reads the slot line after its hazard stands
    closing_mark: bool = True  # reclaim says "perhaps" (g|CLOSING) before it says "gone" (0)
    restore: bool = True  # a record found in use gets its line back
    ask_lock: bool = True  # the writer asks the lock before it believes a hazard
    link_check: bool = True  # a message of another link is dropped, neither opened nor counted
    keep_view: bool = True  # who hands a view on keeps it until the acknowledgement
    scan_until_free: bool = True  # a column is scanned until its lock is free, goodbye or not
    scan_before_answer: bool = True  # a column is scanned before its admission is acknowledged
    zeroing: bool = True  # a new tenant zeroes its column before it is admitted
    reconnect_keeps_column: bool = True  # a new link of an admitted process does not zero its column again
    new_generation: bool = True  # each use of a slot has a generation of its own
    in_flight_count: bool = True  # reclaim leaves alone what was sent and is not acknowledged
    own_count: bool = True  # reclaim leaves alone what the writer itself still has a view of
    ack_after_open: bool = True  # a message is acknowledged after its handles were opened, not when it comes
    clear_on_refusal: bool = True  # an open that fails takes its hazard back
    wait_for_finalizer: bool = True  # open waits while an older view's finalizer is about to store 0
    compare_extent: bool = True  # open compares offset and nbytes, not the generation alone
    end_clears_queue: bool = True  # the end of a link clears what it kept alive
    send_lock: bool = True  # ending a link and sending in it exclude each other
    ask_writer_lock: bool = True  # who waits for CLOSING to pass asks whether the writer lives
    ping: bool = True  # who waits for an acknowledgement sends an empty message


@dataclass(frozen=True, slots=True)
class Config:
    """One exploration. Counts are upper bounds on how often something happens in one run of the protocol."""

    slots: int = 1
    columns: int = 2
    readers: int = 2  # processes that are admitted at the start, reader r in column r
    generations: int = 1  # how often each slot is used
    hand_ons: int = 0
    kills: int = 0  # SIGKILL of a reader, between any two of its steps
    restarts: int = 0  # a new process under a dead one's name, in any free column
    replacements: int = 0  # a new process under the name of one that lives on
    reconnects: int = 0  # a new link of the same process (0 or 1)
    goodbyes: int = 0
    losses: int = 0
    doubles: int = 0
    forgeries: int = 0  # handles that nobody sent: any generation, right or wrong extent
    resends: int = 0  # a record that the writer has an own count on goes to one more link
    writer_kills: int = 0
    broadcast: bool = False  # a commit may address two links at once
    loans: bool = False  # a commit may keep an own count
    tso: bool = False  # store buffers as x86-64 has them
    first_look: bool = False  # the look that makes a candidate in its steps, not with any outcome
    symmetry: bool = True  # readers and slots that nothing happened to yet are explored once, for all
    guards: Guards = field(default_factory=Guards)

    def __post_init__(self) -> None:
        if self.readers > self.columns:
            raise ValueError(f"{self.readers} readers need as many columns, not {self.columns}")
        if not 0 <= self.reconnects <= 1:
            raise ValueError(f"reconnects is 0 or 1, not {self.reconnects}: a link has two epochs here")
        if self.columns > 8 or self.generations > 60:
            raise ValueError("a state packs columns into one byte and generations into six bits")

    def without(self, *names: str) -> Config:
        """The same exploration with these guards taken away."""
        unknown = set(names) - {guard.name for guard in dataclasses.fields(Guards)}
        if unknown:
            raise ValueError(f"no such guard: {', '.join(sorted(unknown))}")
        guards = dataclasses.replace(self.guards, **dict.fromkeys(names, False))
        return dataclasses.replace(self, guards=guards)


def parse(words: Iterable[str]) -> Config:
    """Read `name=value` words as the command line has them; `without=a,b` takes guards away."""
    given = dict(word.partition("=")[::2] for word in words)
    removed = [name for name in given.pop("without", "").split(",") if name]
    defaults = {
        option.name: option.default for option in dataclasses.fields(Config) if option.name != "guards"
    }
    unknown = set(given) - set(defaults)
    if unknown:
        raise ValueError(
            f"no such option: {', '.join(sorted(unknown))}; there are {', '.join(defaults)}, without"
        )
    values: dict[str, Any] = {}
    for name, word in given.items():
        values[name] = bool(int(word)) if isinstance(defaults[name], bool) else int(word)
    values.setdefault("readers", values.get("columns", 2))
    return Config(**values).without(*removed)
