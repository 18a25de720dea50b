"""Peers that share a host: this endpoint as their sender, as the one that is read, as a reader."""

from __future__ import annotations

from transport.bulk.crossing import LOOK_EVERY, Crossing, Introductions, Line
from transport.bulk.frames import Frame, Kind
from transport.bulk.lodging import Guest, Host

INTRODUCTIONS = (
    Kind.INVITE,
    Kind.INVITED,
    Kind.OFFER,
    Kind.PROOF,
    Kind.ADMIT,
    Kind.ADMITTED,
    Kind.SETTLED,
    Kind.LEFT,
)


class Neighbours:
    """For the thread of a hub. opened: transfers that were read in a neighbour's ring here."""

    def __init__(self, host: Host, guest: Guest) -> None:
        self.introductions = Introductions(self._do_without)
        self.host = host
        self.guest = guest
        self.opened = self._crossed = 0
        self._crossings: list[Crossing] = []

    def begin(self, crossing: Crossing) -> None:
        """Look after it until nobody waits."""
        self._crossings.append(crossing)

    @property
    def crossed(self) -> int:
        """Transfers of this sender that others were told to read at their neighbour. In any thread."""
        return self._crossed + sum(crossing.crossed for crossing in list(self._crossings))

    def _do_without(self, leader: Line, follower: Line) -> None:
        for crossing in self._crossings:
            crossing.do_without(leader, follower)

    def look(self, now: float) -> list[float]:
        """Do without leaders that take nothing; in how many seconds to look again."""
        for crossing in self._crossings:
            crossing.look(now)
        self._crossed += sum(crossing.crossed for crossing in self._crossings if crossing.over)
        self._crossings = [crossing for crossing in self._crossings if not crossing.over]
        return [LOOK_EVERY] if self._crossings else []

    def take(self, channel: Line, frame: Frame, body: bytes) -> None:
        """A frame of an introduction."""
        link, number = channel.peer.link, frame.transfer
        match frame.kind:
            case Kind.INVITE:
                name = body.decode(errors="replace")[:64]
                channel.post(Frame(Kind.INVITED, number), self.host.invite(link, number, name))
            case Kind.OFFER:
                channel.post(Frame(Kind.PROOF, number), self.guest.accept(link, number, body))
            case Kind.ADMIT:
                admitted = self.host.admit(link, number, body)
                channel.post(Frame(Kind.ADMITTED, number, index=admitted))
            case Kind.SETTLED:
                self.guest.settle(link, number, admitted=bool(frame.index))
            case Kind.LEFT:
                (self.guest if frame.index else self.host).leave(link, number)
            case _:
                self.introductions.take(channel, frame, body)
