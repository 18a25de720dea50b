"""Which peers left without a word: whose connection ended, and who is dead though a child keeps theirs.

A connection that ended is first read to its end. A peer is dead whose kernel lock is free or, where it has
none, whose process has ended; its connection is then read until it is silent.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping

from transport.backends.base import Inbound, Outbound
from transport.link import Link
from transport.roster import Roster
from transport.waiting import Lasting
from transport.wire import Wire

_LOOK_EVERY = 0.5
_LOOK_AT_THE_DEAD_EVERY = 0.1
_CONNECTION_OUTLIVES_PEER = 0.3  # seconds in which one looked and found nothing new from a dead peer
_SUSPECT_FOR, _SUSPECT_NAP = 1.0, 0.01


class _Silence(Lasting):
    """That of a dead peer after the last number that came. zmq's thread may have been stopped, too."""

    def __init__(self, arrived: int) -> None:
        super().__init__(_LOOK_AT_THE_DEAD_EVERY)
        self.arrived = arrived


class Departures:
    """Finds them, for who handles what comes and under its lock; `read_all` handles what has come.

    `dialling` holds the sockets whose handshake is under way. `finish` is called with a link that has ended
    and why, `fail` with one whose peer lives but is not reached by a backend, and why.
    """

    def __init__(
        self,
        wire: Wire,
        roster: Roster,
        outbound: Outbound,
        inbounds: Mapping[str, Inbound],
        *,
        dialling: Collection[int],
        read_all: Callable[[], None],
        finish: Callable[[Link, str], None],
        fail: Callable[[Link, str], None],
    ) -> None:
        self._wire = wire
        self._roster = roster
        self._outbound = outbound
        self._inbounds = inbounds
        self._dialling = dialling
        self._read_all = read_all
        self._finish = finish
        self._fail = fail
        self._suspects: dict[int, float] = {}  # sockets on which a connection ended, and until when
        self._silences: dict[int, _Silence] = {}  # of the dead, by link
        self._looked = 0.0

    @property
    def looks_every(self) -> float:
        """Seconds from one look for dead peers to the next: a death is noticed within one second."""
        return _LOOK_AT_THE_DEAD_EVERY if self._silences else _LOOK_EVERY

    @property
    def nap(self) -> float:
        """For how many seconds one may sleep before the next `look`."""
        return _SUSPECT_NAP if self._suspects else self.looks_every

    def look(self) -> bool:
        """Find the links whose connection ended, and where it is time those of the dead; whether it was."""
        for socket in self._wire.lost():
            self._suspects[socket] = time.monotonic() + _SUSPECT_FOR
        if self._suspects:
            self._examine()
        if time.monotonic() - self._looked < self.looks_every:
            return False
        self._look_for_the_dead()
        return True

    def has_failed(self, socket: int) -> bool:
        """Whether the connection of a socket that is dialling ended."""
        return socket in self._suspects  # still, should another thread just make its link

    def is_alive(self, link: Link) -> bool:
        """Whether nothing tells that a peer is dead or its connection gone."""
        return not self._death(link) and link.reachable()

    def is_silent(self, link: Link) -> bool:
        """Whether a dead peer's connection has brought nothing for so long that no more will come."""
        self._read_all()
        silence = self._silences.get(link.peer.link)
        if silence is None or link.arrived != silence.arrived:  # zmq reads on as it is emptied
            silence = _Silence(link.arrived)
        if not link.ended:
            self._silences[link.peer.link] = silence
        return silence.look(time.monotonic()) > _CONNECTION_OUTLIVES_PEER

    def forget(self, link: Link) -> None:
        """A link has ended."""
        self._silences.pop(link.peer.link, None)

    def _examine(self) -> None:
        """A connection ended on some sockets: find out whose, after reading what it still sent."""
        now = time.monotonic()
        for socket, until in list(self._suspects.items()):
            if socket in self._dialling:
                continue
            links = self._roster.on(socket)
            gone = [link for link in links if link.peer.dialled or not link.reachable()]
            if gone:
                self._read_all()
            for link in gone:
                self._finish(link, "is gone: the connection ended")
            if now > until or not links:
                self._suspects.pop(socket, None)

    def _look_for_the_dead(self) -> None:
        self._looked = time.monotonic()
        for link in self._roster.links():
            fault = self._fault(link)
            if fault:
                self._fail(link, fault)
            elif not (death := self._death(link)):
                self._silences.pop(link.peer.link, None)
            elif self.is_silent(link):
                self._finish(link, f"died: {death}")

    def _fault(self, link: Link) -> str:
        """Why a backend cannot bring its tensors there, or has lost some of its."""
        return self._outbound.fault(link.peer) or next(
            (fault for inbound in self._inbounds.values() if (fault := inbound.fault(link.peer))), ""
        )

    def _death(self, link: Link) -> str:
        """What tells that a peer is dead; "" when nothing does. /proc is asked where there is no lock."""
        locks = [self._outbound.alive(link.peer)]
        locks += [inbound.alive(link.peer) for inbound in self._inbounds.values()]
        if False in locks:
            return "its lock is free"
        if True in locks or link.process is None or link.process.runs():
            return ""
        return "its process has ended"
