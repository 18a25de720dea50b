"""Who keeps a send waiting: what a peer has not acknowledged or holds open, since when, and the warnings."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from functools import partial

from transport.backends.base import Outbound
from transport.config import TransportConfig
from transport.link import Link
from transport.roster import Roster
from transport.waiting import Poll, RateLimit, Wait

_log = logging.getLogger("tensorferry.transport")


class Lateness:
    """Knows which peers are late, and says so once a wait gets long. Slow is not dead."""

    def __init__(self, config: TransportConfig, roster: Roster, outbound: Outbound) -> None:
        self._warn_after = config.warn_after
        self._roster = roster
        self._outbound = outbound
        self._warnings = RateLimit()

    def is_slow(self, link: Link) -> bool:
        """Whether a message has not been acknowledged for longer than `warn_after`."""
        return link.oldest > self._warn_after

    def watched(self, poll: Poll, what: str, links: Sequence[Link], nbytes: int) -> Poll:
        """The poll of a wait for `what` to send to these links, which names who is late when it gets long."""
        return Wait(poll, self._warn_after, partial(self._warn, what, links, nbytes))

    def say(self, what: str, links: Sequence[Link], wait: str) -> None:
        """Warn that a wait was for these peers, each at most every 30 s."""
        for link in links:
            text = f"{wait} for {what}: {self.account(link)}"
            self._warnings.tell(_log.warning, text, link.peer.name, what)

    def account(self, link: Link) -> str:
        """What a peer has not acknowledged and what it holds, since when, for a person."""
        return f"{link.overdue()}{self.holding(link)}"

    def holding(self, link: Link) -> str:
        """The second half of that; "" where a peer reads no memory of this endpoint's."""
        held = self._outbound.held(link.peer)
        if held is None:
            return ""
        oldest = f", the oldest open for {held.oldest:.1f} s" if held.oldest else ""
        return f"; it holds {held.records} records ({held.nbytes} bytes){oldest}"

    def linked(self) -> str:
        """The account of every peer, and since when it is linked; "nobody" when there is none."""
        return "; ".join(map(self._with_age, self._roster.links())) or "nobody"

    def named(self, name: str) -> str:
        """The same of the peer of that name; where it is not linked, why."""
        link = self._roster.named(name)
        return self._roster.missing(name) if link is None else self._with_age(link)

    def _with_age(self, link: Link) -> str:
        return f"{self.account(link)}; linked for {time.monotonic() - link.since:.1f} s"

    def _warn(self, what: str, links: Sequence[Link], nbytes: int, seconds: float) -> None:
        """Name the receivers that are late; else whoever is, and may hold the room; else the receivers."""
        everybody = self._roster.links()
        late = self._late(links) or self._late(everybody) or links or everybody
        self.say(what, late, f"a send of {nbytes} bytes has waited {seconds:.1f} s")

    def _late(self, links: Sequence[Link]) -> list[Link]:
        return [link for link in links if self.is_slow(link) or self._holds_long(link)]

    def _holds_long(self, link: Link) -> bool:
        held = self._outbound.held(link.peer)
        return held is not None and held.oldest > self._warn_after
