"""Peers of one host, sent the same: the payload crosses once, and whatever fails there, everybody gets it."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pytest

import transport
from tests.transport.test_tcp import ADDRESS, MIB, config, elsewhere, hub_of, proxied, until, used
from transport.backends.base import Peer
from transport.backends.shm import ShmOutbound
from transport.bulk.arriving import Arriving
from transport.bulk.frames import Damaged, Frame, Kind
from transport.bulk.landing import Landing
from transport.bulk.lodging import MOST_NEIGHBOURS, Guest, Host
from transport.bulk.neighbours import Neighbours
from transport.conformance import Pumped, digest, joined, noise, same

NAMES = ("first", "second", "third")


@contextmanager
def three(
    *, window: int = 32 * MIB, met: bool = True, **changes: Any
) -> Iterator[tuple[transport.Endpoint, list[Pumped], Any]]:
    """A sender, three peers that share memory with each other (and tell by `tcp` alone), a proxy between.

    window: that of the peers. met: they were sent something together.
    """
    options = {"ring_bytes": 32 * MIB, "tcp_window": 32 * MIB, **changes}
    with ExitStack() as stack:
        front = stack.enter_context(transport.listen(ADDRESS, config=config(**options)))
        proxy = stack.enter_context(proxied(front))
        peers = []
        for name in NAMES:
            fields = {**options, "tcp_window": window}
            peers.append(Pumped(stack.enter_context(joined(front, name, config(**fields)))))
            stack.callback(peers[-1].stop)
        if met:
            send(front, peers, 0)
            until(lambda: statistics(front)["neighbours"] == len(NAMES) - 1)  # of the first, each
        yield front, peers, proxy


def send(
    front: transport.Endpoint,
    peers: Sequence[Pumped],
    seed: int,
    nbytes: int = 2 * MIB,
    to: Sequence[str] = NAMES,
) -> None:
    """One message to all, which all get right."""
    front.send({"value": noise(nbytes, seed)}, to=to)
    for peer in peers:
        assert same(peer.next().body["value"], noise(nbytes, seed))


def statistics(endpoint: transport.Endpoint) -> dict[str, Any]:
    return hub_of(endpoint).statistics()


def read(peers: Sequence[Pumped]) -> list[int]:
    """How many messages each has read at a neighbour."""
    return [statistics(peer.endpoint)["read at a neighbour"] for peer in peers]


def read_since(before: Sequence[int], peers: Sequence[Pumped]) -> list[int]:
    """The same, less what they had read before."""
    return [now - then for now, then in zip(read(peers), before, strict=True)]


def emptied(front: transport.Endpoint, peers: Sequence[Pumped]) -> None:
    """Nothing is kept for anybody."""
    until(lambda: bool(front.peers) and not any(used(end) for end in (front, *(p.endpoint for p in peers))))


@pytest.mark.usefixtures("patient")
def test_the_payload_crosses_once_and_the_others_read_it_there() -> None:
    with three() as (front, peers, _):
        before, had_read = statistics(front)["sent bytes"], read(peers)
        for seed in range(1, 5):
            send(front, peers, seed)
        after = statistics(front)["sent bytes"]
        assert after["first"] - before["first"] > 4 * 2 * MIB
        for name in NAMES[1:]:
            assert after[name] - before[name] < 10_000
        assert read_since(had_read, peers) == [0, 4, 4]
        emptied(front, peers)


def test_what_is_small_goes_to_each_by_itself() -> None:
    with three() as (front, peers, _):
        crossed, had_read = statistics(front)["crossed once"], read(peers)
        send(front, peers, 1, 100_000)
        assert statistics(front)["crossed once"] == crossed
        assert read_since(had_read, peers) == [0, 0, 0]


def test_a_connection_that_is_cut_again_and_again_loses_nothing() -> None:
    with three() as (front, peers, proxy):
        proxy.cuts = [proxy.forwarded + place for place in range(300_000, 12 * MIB, 1_300_000)]
        for seed in range(1, 7):
            send(front, peers, seed)
        emptied(front, peers)


@pytest.mark.usefixtures("patient")
def test_views_outlive_the_one_in_whose_ring_they_are() -> None:
    with three() as (front, peers, _):
        front.send({"value": noise(2 * MIB, 1)}, to=NAMES)
        messages = [peer.next() for peer in peers]
        peers[0].stop()
        peers[0].endpoint.close()
        until(lambda: len(front.peers) == 2)
        assert same(messages[1].body["value"], noise(2 * MIB, 1))
        until(lambda: statistics(front)["neighbours"] == 0)  # the first is forgotten, too

        def know_each_other() -> bool:  # once their connections are there again
            send(front, peers[1:], 2, to=NAMES[1:])
            return bool(statistics(front)["neighbours"])

        until(know_each_other)
        had_read = read(peers)
        send(front, peers[1:], 3, to=NAMES[1:])
        assert read_since(had_read, peers)[1:] == [0, 1]  # the second is the one now


@pytest.mark.usefixtures("patient")
def test_who_holds_its_share_of_a_neighbours_ring_gets_the_next_ones_itself() -> None:
    with three(ring_bytes=16 * MIB) as (front, peers, _):
        held, had_read = [], read(peers)
        for seed in range(1, 6):  # of 2 MiB, where a peer may hold 8
            front.send({"value": noise(2 * MIB, seed)}, to=NAMES)
            peers[0].next()
            held += [peer.next() for peer in peers[1:]]
        values = [message.body["value"] for message in held]
        assert all(same(value, noise(2 * MIB, 1 + number // 2)) for number, value in enumerate(values))
        assert 0 < read_since(had_read, peers)[1] < 5
        del held, values
        emptied(front, peers)


def fill_window(front: transport.Endpoint, first: Pumped) -> list[int]:
    """More for the first than its window of 4 MiB, while nobody takes anything there; the seeds."""
    first.stop()
    for seed in range(4):
        front.send({"value": noise(1_300_000, seed)}, to="first")
    return list(range(4))


def taken_up_again(peer: Pumped, seeds: Sequence[int]) -> Pumped:
    """Who was stopped goes on, and finds what was sent meanwhile."""
    again = Pumped(peer.endpoint)
    for seed in seeds:
        assert same(again.next().body["value"], noise(1_300_000, seed))
    return again


def test_a_leader_that_takes_nothing_does_not_keep_the_others_waiting() -> None:
    with three(window=4 * MIB) as (front, peers, _):
        had_read = read(peers)
        waiting = fill_window(front, peers[0])
        front.send({"value": noise(2 * MIB, 99)}, to=NAMES[:2])
        assert same(peers[1].next().body["value"], noise(2 * MIB, 99))
        assert read_since(had_read, peers)[1] == 0
        crossed = statistics(front)["crossed once"]
        front.send({"value": noise(2 * MIB, 98)}, to=NAMES[:2])  # nor does the next one wait for it
        assert same(peers[1].next().body["value"], noise(2 * MIB, 98))
        assert statistics(front)["crossed once"] == crossed
        again = taken_up_again(peers[0], waiting)
        for seed in (99, 98):
            assert same(again.next().body["value"], noise(2 * MIB, seed))
        until(lambda: not any(way.channel.slow for way in [*hub_of(front)._ways.values()]))
        send(front, [again, peers[1]], 97, to=NAMES[:2])
        assert read_since(had_read, peers)[1] == 1
        again.stop()


@pytest.mark.usefixtures("patient")
def test_the_first_payload_waits_for_the_proof_and_crosses_once() -> None:
    with three(window=4 * MIB, met=False) as (front, peers, _):
        for name, peer in zip(NAMES, peers, strict=True):
            front.send({"value": noise(MIB, 7)}, to=name)
            assert same(peer.next().body["value"], noise(MIB, 7))
        until(lambda: hub_of(front).flush(0.0))  # all is counted
        waiting = fill_window(front, peers[0])
        assert statistics(front)["neighbours"] == 0
        before = statistics(front)["sent bytes"]
        front.send({"value": noise(2 * MIB, 99)}, to=NAMES)
        until(lambda: statistics(front)["neighbours"] == len(NAMES) - 1)
        again = taken_up_again(peers[0], waiting)
        for peer in (again, *peers[1:]):
            assert same(peer.next().body["value"], noise(2 * MIB, 99))
        after = statistics(front)["sent bytes"]
        assert all(after[name] - before[name] < 10_000 for name in NAMES[1:])
        assert read(peers) == [0, 1, 1]
        again.stop()


@pytest.mark.skipif(os.geteuid() != 0, reason="another /dev/shm needs root")
def test_those_who_share_no_memory_each_get_it() -> None:
    with (
        transport.listen(ADDRESS, config=config(ring_bytes=32 * MIB)) as front,
        elsewhere(front, "there", {"ring_bytes": 32 * MIB}),
        joined(front, "here", config(ring_bytes=32 * MIB)) as endpoint,
    ):
        here = Pumped(endpoint)
        for seed in range(3):
            front.send({"do": "sum", "value": noise(2 * MIB, seed)}, to=["there", "here"])
            assert same(here.next().body["value"], noise(2 * MIB, seed))
            assert front.receive().body == digest(noise(2 * MIB, seed))
        assert statistics(front)["neighbours"] == statistics(front)["crossed once"] == 0
        here.stop()


@pytest.mark.skipif(os.geteuid() != 0, reason="another /dev/shm needs root")
@pytest.mark.usefixtures("patient")
def test_who_turns_out_to_share_no_memory_waits_for_the_first_no_longer() -> None:
    options = {"ring_bytes": 32 * MIB, "tcp_window": 32 * MIB}
    with (
        transport.listen(ADDRESS, config=config(**options)) as front,
        joined(front, "first", config(**{**options, "tcp_window": 4 * MIB})) as endpoint,
        elsewhere(front, "there", options),
    ):
        first = Pumped(endpoint)
        front.send({"value": noise(MIB, 7)}, to="first")  # the bulk connection is there
        assert same(first.next().body["value"], noise(MIB, 7))
        waiting = fill_window(front, first)
        front.send({"do": "sum", "value": noise(2 * MIB, 99)}, to=["first", "there"])
        assert front.receive().body == digest(noise(2 * MIB, 99))  # though the first takes nothing
        again = taken_up_again(first, waiting)
        assert same(again.next().body["value"], noise(2 * MIB, 99))
        again.stop()


class TestLodging:
    """What a sender may say that is none, or means harm."""

    def test_a_sender_gets_so_many_columns_and_no_more(self) -> None:
        ring = ShmOutbound(config())
        host = Host(ring)
        try:
            offers = [host.invite(1, number, "guest") for number in range(MOST_NEIGHBOURS + 2)]
            assert [bool(offer) for offer in offers] == [True] * MOST_NEIGHBOURS + [False] * 2
            assert host.invite(2, 1, "guest")
            host.forget(1)
            assert host.invite(1, 1, "guest")
        finally:
            ring.close()

    def test_only_who_proved_to_map_the_ring_is_kept_for(self) -> None:
        ring, guest = ShmOutbound(config()), Guest(config())
        host = Host(ring)
        try:
            arrays = ring.lend_all([5000, 7000], 1.0, lambda: None)
            for array in arrays:
                array[:] = 3
            offer = host.invite(1, 5, "guest")
            assert host.keep(1, 1, arrays, [5]) == b""
            assert not host.admit(1, 5, b"\x92\xc2\xc4\x00")  # a proof, but nothing was written into the ring
            assert not host.admit(1, 6, b"")
            assert not guest.accept(1, 9, b"nonsense")
            offer = host.invite(1, 5, "guest")
            proof = guest.accept(1, 9, offer)
            assert proof
            assert host.admit(1, 5, proof)
            guest.settle(1, 9, admitted=True)
            places = host.keep(1, 1, arrays, [5])
            assert places == host.kept(1, 1)
            assert guest.open(1, 9, b"nonsense", [5000, 7000]) is None
            assert guest.open(1, 9, places, [7000, 5000]) is None
            assert guest.open(1, 9, places, [5000]) is None
            assert guest.open(2, 9, places, [5000, 7000]) is None
            opened = guest.open(1, 9, places, [5000, 7000])
            assert opened is not None
            assert all(np.all(array == 3) and not array.flags.writeable for array in opened)
            host.let_go(1, 1)
            host.let_go(1, 1)
            del arrays
            assert all(np.all(array == 3) for array in opened)  # it is this side's now
            del opened
        finally:
            guest.close()
            ring.close()


class TestArriving:
    """What waits for a neighbour keeps its place, and comes directly where there is none."""

    @pytest.fixture
    def arriving(self) -> Iterator[tuple[Arriving, list[Frame]]]:
        ring, guest, posted = ShmOutbound(config()), Guest(config()), list[Frame]()
        landing = Landing(config(), lambda sizes: ring.lend_all(sizes, 0.0, lambda: None))
        peer = Peer(1, "sender")
        neighbours = Neighbours(Host(ring), guest)

        def post(frame: Frame, body: bytes = b"") -> None:
            posted.append(frame)

        arriving = Arriving(peer, config(), landing, neighbours, post, lambda: None)
        yield arriving, posted
        arriving.clear()
        arriving.close()
        guest.close()
        ring.close()

    def test_nothing_overtakes_it(self, arriving: tuple[Arriving, list[Frame]]) -> None:
        channel, posted = arriving
        sizes = struct.pack("<Q", 5000)
        for number, behind in ((1, 0), (2, 1), (3, 0)):
            channel.arrived(Frame(Kind.ANNOUNCE, number, start=behind), sizes)
        assert posted == [Frame(Kind.GRANT, 1)]
        with pytest.raises(Damaged):
            channel.arrived(Frame(Kind.PLACED, 2, start=7), bytes(1000))
        channel.arrived(Frame(Kind.PLACED, 2, start=7), b"nonsense from nobody")
        assert posted == [Frame(Kind.GRANT, 1)]
        chunk = Frame(Kind.CHUNK, 1, nbytes=5000)
        channel.body_of(chunk)[:] = bytes(5000)
        channel.arrived(chunk, b"")
        assert posted[1:] == [Frame(Kind.LANDED, 1), Frame(Kind.GRANT, 2), Frame(Kind.GRANT, 3)]

    @pytest.mark.parametrize("given_up", [False, True])
    def test_it_comes_directly_when_the_sender_says_so(
        self, arriving: tuple[Arriving, list[Frame]], given_up: bool
    ) -> None:
        channel, posted = arriving
        sizes = struct.pack("<Q", 5000)
        channel.arrived(Frame(Kind.ANNOUNCE, 1, start=1), sizes)
        channel.arrived(Frame(Kind.ANNOUNCE, 2), sizes)
        assert not posted
        with pytest.raises(Damaged):
            channel.body_of(Frame(Kind.CHUNK, 1, nbytes=5000))
        channel.arrived(Frame(Kind.CANCEL, 1) if given_up else Frame(Kind.ANNOUNCE, 1), sizes)
        assert posted == [Frame(Kind.GRANT, number) for number in ((2,) if given_up else (1, 2))]

    @pytest.mark.parametrize(
        ("neighbours", "words"), [(MOST_NEIGHBOURS + 1, 20), (2, 2), (1, 1), (1, 0), (1 << 31, 1)]
    )
    def test_an_announcement_for_neighbours_that_is_none(
        self, arriving: tuple[Arriving, list[Frame]], neighbours: int, words: int
    ) -> None:
        body = struct.pack(f"<{words}Q", *range(1, words + 1))
        with pytest.raises(Damaged):
            arriving[0].arrived(Frame(Kind.ANNOUNCE, 1, neighbours), body)
