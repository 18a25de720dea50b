"""One payload for several peers of one host: it crosses to one of them, the others read it in its ring.

The sender keeps its own bytes until each has acknowledged, so that whatever fails on the other host, each is
sent them after all: a follower waits for nothing but this sender's word. For a hub's thread, `plan` excepted.

    sender                 leader            follower
    ANNOUNCE 7, for 2  →
    ANNOUNCE 4, behind ------------------→
    CHUNK 7 …          →
                       ←   LANDED 7, places                kept there for 2 until LET_GO
    PLACED 4, places   ------------------→
                       ←------------------   LANDED 4      it is open; or GRANT 4: not found, send it
    LET_GO 7           →
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from transport.backends.base import Peer
from transport.bulk.frames import Frame, Kind
from transport.bulk.lodging import MOST_NEIGHBOURS
from transport.bulk.transfer import Outgoing
from transport.waiting import Lasting

WORTH_SHARING = 256 << 10  # bytes; less is there sooner by itself
_UNKNOWN = object()  # of a pair that was not introduced yet
_PATIENCE = 1.0  # seconds in which the leader takes nothing, after which the others get it for themselves
LOOK_EVERY = 0.25


class Line(Protocol):
    """A channel, as it is seen here. slow: its neighbours got for themselves what it was slow to take."""

    peer: Peer
    slow: bool
    over: bool

    @property
    def sent(self) -> int:
        """The bytes that were sent, whatever for."""

    def place(self, outgoing: Outgoing, neighbour: int, places: bytes) -> None:
        """Say where in a neighbour's ring a transfer is."""

    def send_directly(self, outgoing: Outgoing) -> None:
        """No neighbour will have it."""

    def cancel(self, outgoing: Outgoing) -> None:
        """The peer is not to have it any more."""

    def post(self, frame: Frame, body: bytes = b"") -> bool:
        """Send a frame, if there is a connection; whether there is."""


class Crossing:
    """One transfer to a leader and the followers that wait for it.

    doubt: called with the channels of a leader and of a follower that found nothing in its ring. crossed:
    whether somebody was told to read it there.
    """

    def __init__(
        self,
        channel: Line,
        leader: Outgoing,
        followers: Sequence[tuple[Line, Outgoing]],
        doubt: Callable[[Line, Line], object],
    ) -> None:
        self._doubt = doubt
        self.crossed = False
        self.followers = {outgoing: follower for follower, outgoing in followers}
        self._channel = channel
        self._leader = leader
        self._places = b""
        self._step = -1
        self._standing = Lasting(LOOK_EVERY)  # the leader
        leader.crossing = self
        leader.neighbours = [follower.peer.link for follower, _ in followers]
        for _, outgoing in followers:
            outgoing.crossing, outgoing.behind = self, True

    @property
    def over(self) -> bool:
        """Whether nobody waits."""
        return not self.followers

    def landed(self, places: bytes) -> None:
        """The leader has it, and says where; empty where the others cannot read it."""
        self._channel.slow = False
        self._places = places
        if self.over and places:
            self._channel.post(Frame(Kind.LET_GO, self._leader.number))
        for outgoing, channel in list(self.followers.items()):
            if not outgoing.behind:
                continue
            if places:
                self.crossed = True
                channel.place(outgoing, self._channel.peer.link, places)
            else:
                channel.send_directly(outgoing)

    def say_again(self, outgoing: Outgoing) -> None:
        """A follower may not have heard where it is: its connection was made anew."""
        self.followers[outgoing].place(outgoing, self._channel.peer.link, self._places)

    def not_found(self, outgoing: Outgoing) -> None:
        """A follower did not find it where it was said to be: it may have to be introduced again."""
        if outgoing in self.followers:
            self._doubt(self._channel, self.followers[outgoing])

    def do_without(self, leader: Line, follower: Line) -> None:
        """A follower does not read the leader's ring: if that is what it waits for, it is sent its own."""
        if leader is self._channel:
            for outgoing, channel in list(self.followers.items()):
                if channel is follower and outgoing.behind:
                    channel.send_directly(outgoing)

    def awaits(self, outgoing: Outgoing) -> bool:
        """Whether others wait for this one to land."""
        return outgoing is self._leader and not outgoing.landed and not self.over

    def gone(self, outgoing: Outgoing) -> None:
        """Somebody has it, or will not have it, or not from the leader."""
        if outgoing is self._leader:
            if not self._leader.landed:
                self._give_up()
        elif self.followers.pop(outgoing, None) is not None and self.over:
            if self._leader.landed:
                self._channel.post(Frame(Kind.LET_GO, self._leader.number))
            elif self._leader.released:
                self._channel.cancel(self._leader)

    def look(self, now: float) -> None:
        """Do without a leader that takes nothing."""
        if self._channel.sent != self._step or self._leader.writing:
            self._step = self._channel.sent
            self._standing.end()
        if self._standing.look(now) > _PATIENCE and not self._leader.landed:
            self._channel.slow = True
            self._give_up()

    def _give_up(self) -> None:
        for outgoing, channel in list(self.followers.items()):
            if outgoing.behind:
                channel.send_directly(outgoing)


class Introductions:
    """Which peers of this sender read which others' rings, by proof, and how they come to do so.

    refused: called with leader and follower when there is no proof.
    """

    def __init__(self, refused: Callable[[Line, Line], object]) -> None:
        self._refused = refused
        self._pairs: dict[tuple[Line, Line], bool | None] = {}  # leader, follower; None: asked
        self._unsaid: list[tuple[Line, Frame]] = []  # for want of a connection

    def plan(
        self, transfers: Sequence[tuple[Line, Outgoing]], nbytes: int
    ) -> tuple[list[Crossing], list[tuple[Line, Line]]]:
        """Who waits for whom, and whom to introduce to whom. For any thread.

        Who was never introduced waits as well, since the proof is there before much of a large payload is.
        For a proof that was asked for by an earlier payload nobody waits: it may never come.
        """
        hosts: list[list[tuple[Line, Outgoing]]] = []
        unknown: list[tuple[Line, Line]] = []
        for transfer in transfers if nbytes >= WORTH_SHARING else ():
            for host in hosts:
                if len(host) > MOST_NEIGHBOURS:
                    continue
                leader, follower = host[0][0], transfer[0]
                reads = self._pairs.get((leader, follower), _UNKNOWN)
                if reads is _UNKNOWN:
                    unknown.append((leader, follower))
                if reads and not leader.slow:
                    host.append(transfer)
                    break
            else:
                hosts.append([transfer])
        crossings = [Crossing(*host[0], host[1:], self.doubt) for host in hosts if len(host) > 1]
        return crossings, unknown

    def introduce(self, leader: Line, follower: Line) -> None:
        """Have the leader offer its ring to the follower."""
        if (leader, follower) in self._pairs or leader.over or follower.over:
            return
        if leader.post(Frame(Kind.INVITE, follower.peer.link), follower.peer.name.encode()):
            self._pairs[leader, follower] = None
        else:
            self._refused(leader, follower)  # for now: the next payload asks again

    def take(self, channel: Line, frame: Frame, body: bytes) -> None:
        """An answer of a leader or a follower."""
        other = next(
            (other for pair in self._pairs for other in pair if other.peer.link == frame.transfer), None
        )
        if other is None:
            return
        leader, follower = (other, channel) if frame.kind is Kind.PROOF else (channel, other)
        if self._pairs.get((leader, follower), _UNKNOWN) is not None:  # nothing was asked
            return
        said = True
        if frame.kind is Kind.INVITED and body:
            said = follower.post(Frame(Kind.OFFER, leader.peer.link), body)
        elif frame.kind is Kind.PROOF:
            said = leader.post(Frame(Kind.ADMIT, follower.peer.link), body)
        elif frame.kind is Kind.ADMITTED:
            self._pairs[leader, follower] = bool(frame.index)
            said = follower.post(Frame(Kind.SETTLED, leader.peer.link, index=frame.index))
        if not said:
            self.doubt(leader, follower)
        elif not body and frame.kind is not Kind.ADMITTED:  # it has nothing to offer, or no proof
            self._pairs[leader, follower] = False
        if self._pairs.get((leader, follower), False) is False:
            self._refused(leader, follower)

    def lost(self, channel: Line) -> None:
        """A connection was lost, and maybe an answer with it: ask again another time."""
        self._pairs = {
            pair: reads for pair, reads in self._pairs.items() if reads is not None or channel not in pair
        }

    def attached(self, channel: Line) -> None:
        """There is a connection again: say what could not be said."""
        unsaid, self._unsaid = self._unsaid, []
        for line, frame in unsaid:
            if line is not channel:
                self._unsaid.append((line, frame))
            else:
                line.post(frame)

    def doubt(self, leader: Line, follower: Line) -> None:
        """What was proved does not hold, or its answer was lost: let it be proved again."""
        self._pairs.pop((leader, follower), None)

    def forget(self, channel: Line) -> None:
        """The link ended: its neighbours need not keep anything for it."""
        for leader, follower in [pair for pair in self._pairs if channel in pair]:
            other = follower if channel is leader else leader
            left = Frame(Kind.LEFT, channel.peer.link, index=channel is leader)
            if self._pairs.pop((leader, follower)) is not False and not other.post(left):
                self._unsaid.append((other, left))
        self._unsaid = [(line, frame) for line, frame in self._unsaid if line is not channel]

    @property
    def proved(self) -> int:
        """How many neighbours read another's ring."""
        return sum(reads is True for reads in list(self._pairs.values()))
