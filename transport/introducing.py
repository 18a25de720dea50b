"""Before a peer is sent tensors: it is offered what the backend puts, and proves that it reads that."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from transport.backends.base import Outbound, Refusal
from transport.config import TransportConfig
from transport.errors import TransportError
from transport.lateness import Lateness
from transport.link import Link
from transport.message import Offered
from transport.roster import Roster

_ANSWER_NAP = 5e-3


class _Offer(NamedTuple):
    """For which inbound a link was made its last offer, and when (`time.monotonic()`)."""

    backend: str
    when: float


class Introductions:
    """The offers of one endpoint, one for each link and inbound: a peer that does not read must not find
    thousands of them. Safe for several threads.

    `pump` handles what has come while this one waits; `wait` sleeps.
    """

    def __init__(
        self,
        config: TransportConfig,
        roster: Roster,
        outbound: Outbound,
        lateness: Lateness,
        pump: Callable[[], None],
        wait: Callable[[float], None],
    ) -> None:
        self._config = config
        self._roster = roster
        self._outbound = outbound
        self._lateness = lateness
        self._pump = pump
        self._wait = wait
        self._claiming = threading.Lock()
        self._offers: dict[int, _Offer] = {}  # by link
        self._begun = False  # somebody was offered something

    def greet(self, link: Link) -> None:
        """A link was made: offer at once what others were offered, so that no message waits for it."""
        if self._begun:
            self._offer_ahead(link)

    def offer_to_all(self) -> None:
        """Offer to every peer that may soon be sent what is being made now."""
        for link in self._roster.links():
            self._offer_ahead(link)

    def introduce(self, links: Sequence[Link], sizes: Sequence[int], deadline: float) -> None:
        """Offer where tensors of these sizes want a proof, and wait for the answers for a bounded time."""
        late = [link for link in links if self._outbound.wants_offer(link.peer, sizes)]
        while late := [link for link in late if self._may_answer(link, sizes)]:
            # Since the offer, not since this call: who never answers delays one message, not every one.
            offers = [self._offers.get(link.peer.link) for link in late]
            asked = [offer.when for offer in offers if offer is not None]
            if not asked:  # the links have just ended, in another thread
                continue
            patience = max(asked) + self._config.admission_timeout
            left = min(deadline, patience) - time.monotonic()
            if left <= 0:
                if patience <= time.monotonic():
                    wait = f"a send waited {self._config.admission_timeout:g} s, and goes on without,"
                    self._lateness.say("the answer to the offer of the ring", late, wait)
                return  # the backend goes without, or says who has not answered
            self._wait(min(_ANSWER_NAP, left))
            self._pump()

    def forget(self, link: Link) -> None:
        """The link has ended."""
        self._offers.pop(link.peer.link, None)
        self._outbound.drop(link.peer)

    def _offer_ahead(self, link: Link) -> None:
        """Before there is a message, whose size is unknown."""
        if self._wants_first(link, [self._config.max_message_bytes]):
            self._offer_once(link)

    def _may_answer(self, link: Link, sizes: Sequence[int]) -> bool:
        """Whether an offer to a link waits for its answer, offered now where it has to be."""
        if link.ended:
            return False
        if self._wants_first(link, sizes):
            self._offer_once(link)
        return link.peer.link in self._offers and self._outbound.wants_offer(link.peer, sizes)

    def _wants_first(self, link: Link, sizes: Sequence[int]) -> bool:
        return self._outbound.wants_offer(link.peer, sizes) and not self._was_offered(link)

    def _was_offered(self, link: Link) -> bool:
        """Whether the last offer to a link was for the inbound that the next one would be for."""
        offer = self._offers.get(link.peer.link)
        return offer is not None and offer.backend == self._outbound.reads(link.peer)

    def _offer_once(self, link: Link) -> None:
        """Unless another thread just did."""
        backend = self._outbound.reads(link.peer)
        with self._claiming:
            if self._was_offered(link):
                return
            self._offers[link.peer.link] = _Offer(backend, time.monotonic())
        self._offer(link, backend)
        if link.ended:  # in another thread, which may have forgotten it before there was an offer
            self.forget(link)

    def _offer(self, link: Link, backend: str) -> None:
        try:
            offer = self._outbound.offer(link.peer)
        except TransportError:
            return  # the backend remembers why, and says it in `explain`
        self._begun = True
        if backend not in link.accepts:
            self._outbound.admit(link.peer, Refusal(f"the peer does not read {backend}"))
            return
        link.tell(Offered(link.peer.link, backend, offer))
        self._config.emit("admission.offered", peer=link.peer.name)
