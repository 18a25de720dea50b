"""Who keeps a send waiting: what a peer has not acknowledged or holds open, since when, and the warnings."""

from __future__ import annotations

import logging
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
            left_out = self._warnings.left_out(link.peer.name, what)
            if left_out is not None:
                more = f" ({left_out} more such warnings left out)" if left_out else ""
                _log.warning("%s for %s: %s%s", wait, what, self._account(link), more)

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

    def _account(self, link: Link) -> str:
        """What a peer has not acknowledged and what it holds, since when, for a person."""
        held = self._outbound.held(link.peer)
        if held is None:
            return link.overdue()
        text = f"{link.overdue()}; it holds {held.records} records ({held.nbytes} bytes)"
        return f"{text}, the oldest open for {held.oldest:.1f} s" if held.oldest else text
