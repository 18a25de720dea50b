"""The parts of bulk connections by themselves: frames and checksums, transfers, where bytes land."""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transport import TransportConfig
from transport.backends.base import Bytes, Peer
from transport.backends.shm import ShmOutbound
from transport.bulk.cargo import Cargo
from transport.bulk.channel import Channel
from transport.bulk.connection import Connection
from transport.bulk.crossing import Crossing
from transport.bulk.frames import CHUNK_BYTES, Checksum, Damaged, Frame, Kind, checksum, decode, encode
from transport.bulk.landing import Landing
from transport.bulk.lodging import Guest, Host
from transport.bulk.neighbours import Neighbours
from transport.bulk.transfer import Incoming, Outgoing
from transport.errors import Full, TooLarge
from transport.sources import Progress, Source
from transport.specs import TensorSpec

FRAMES = st.builds(
    Frame,
    st.sampled_from(Kind),
    st.integers(0, (1 << 64) - 1),
    st.integers(0, (1 << 32) - 1),
    st.integers(0, (1 << 64) - 1),
    st.integers(0, (1 << 64) - 1),
    st.integers(0, (1 << 32) - 1),
)


@given(FRAMES)
def test_a_frame_comes_back_as_it_was(frame: Frame) -> None:
    assert decode(encode(frame)) == frame


@given(FRAMES, st.integers(0, 39), st.integers(1, 255))
def test_a_changed_byte_of_a_header_shows(frame: Frame, place: int, change: int) -> None:
    header = bytearray(encode(frame))
    header[place] ^= change
    with pytest.raises(Damaged):
        decode(header)


@pytest.mark.parametrize("nbytes", [1, 7, 4095, 4096, 4097, 70_001, CHUNK_BYTES])
def test_a_changed_byte_of_a_chunk_shows(nbytes: int) -> None:
    draw = random.Random(nbytes)
    data = np.random.default_rng(nbytes).integers(0, 256, nbytes, np.uint8)
    right = checksum(data)
    for place in {0, nbytes - 1, *(draw.randrange(nbytes) for _ in range(50))}:
        before = data[place]
        data[place] ^= 1 << draw.randrange(8)
        assert checksum(data) != right
        data[place] = before
    assert checksum(data) == right


def test_swapped_words_of_a_chunk_show() -> None:
    data = np.random.default_rng(1).integers(0, 256, CHUNK_BYTES, np.uint8)
    right = checksum(data)
    data[:16] = np.roll(data[:16], 8)
    assert checksum(data) != right


@settings(max_examples=30)
@given(st.lists(st.integers(1, 2 * CHUNK_BYTES + 9), min_size=1, max_size=4), st.randoms())
def test_a_transfer_arrives_whole_however_often_it_is_interrupted(
    sizes: list[int], draw: random.Random
) -> None:
    pieces = [np.full(size, number + 1, np.uint8) for number, size in enumerate(sizes)]
    outgoing = Outgoing(1, Cargo(pieces))
    incoming = Incoming(1, outgoing.sizes(), most=8)
    assert list(incoming.sizes) == sizes
    incoming.arrays = [np.zeros(size, np.uint8) for size in sizes]
    while not incoming.whole:
        outgoing.go_on_at(*incoming.place)
        for _ in range(draw.randint(1, 5)):
            if not outgoing.sent:
                header, body = outgoing.next_chunk()
                frame = decode(header)
                assert frame.checksum == checksum(body)
                incoming.body_of(frame)[:] = body.data
                incoming.arrived(frame)
    assert outgoing.sent
    for came, piece in zip(incoming.finished(), pieces, strict=True):
        assert np.array_equal(came, piece)
        assert not came.flags.writeable


@pytest.mark.parametrize(
    ("index", "start", "nbytes"),
    [(0, 1, 10), (1, 0, 10), (0, 0, 101), (0, 0, 0), (5, 0, 1), (0, 1 << 40, 1)],
)
def test_a_chunk_that_does_not_follow_is_refused(index: int, start: int, nbytes: int) -> None:
    incoming = Incoming(1, Outgoing(1, Cargo([np.zeros(100, np.uint8)] * 2)).sizes(), most=2)
    incoming.arrays = [np.zeros(100, np.uint8)] * 2
    with pytest.raises(Damaged):
        incoming.body_of(Frame(Kind.CHUNK, 1, index, start, nbytes))


@pytest.mark.parametrize("body", [b"1234567", bytes(8), b"12345678" * 3])
def test_an_announcement_that_is_none(body: bytes) -> None:
    with pytest.raises(Damaged):
        Incoming(1, body, most=2)


def test_credit_for_the_middle_of_a_chunk() -> None:
    with pytest.raises(Damaged):
        Outgoing(1, Cargo([np.zeros(2 * CHUNK_BYTES, np.uint8)])).go_on_at(0, 4096)


@given(st.integers(1, CHUNK_BYTES), st.lists(st.integers(1, CHUNK_BYTES), max_size=8))
def test_the_checksum_of_what_comes_bit_by_bit_is_the_same(nbytes: int, marks: list[int]) -> None:
    data = np.random.default_rng(nbytes).integers(0, 256, nbytes, np.uint8)
    running = Checksum(data)
    for mark in sorted(marks):
        running.upto(min(mark, nbytes))
    assert running.value() == checksum(data)


@settings(max_examples=30)
@given(st.lists(st.integers(1, 2 * CHUNK_BYTES + 9), min_size=1, max_size=2), st.data())
def test_a_chunk_leaves_only_when_it_is_written(sizes: list[int], data: st.DataObject) -> None:
    pieces = [np.zeros(size, np.uint8) for size in sizes]
    woken: list[None] = []
    cargo = Cargo(pieces, range(len(pieces)), partial(woken.append, None))
    outgoing, chunks, asked = Outgoing(1, cargo), list[int](), [0]
    assert not outgoing.ready

    class Slow(Source):
        """Written a bit at a time; between two bits everything that is ready leaves."""

        def fill(self, destination: Bytes, *, progress: Progress | None = None, **_: Any) -> None:
            done = 0
            while done < destination.nbytes:
                step = data.draw(
                    st.integers(min(300_000, destination.nbytes - done), destination.nbytes - done)
                )
                destination[done : done + step] = 7
                done += step
                assert progress is not None
                progress(done)
                before = len(chunks)
                while not outgoing.sent and outgoing.ready:
                    assert len(woken) > asked[0]
                    header, body = outgoing.next_chunk()
                    assert np.all(body == 7)
                    assert decode(header).checksum == checksum(body)
                    chunks.append(body.nbytes)
                if len(chunks) > before:
                    asked[0] = len(woken)

    for index, piece in enumerate(pieces):
        cargo.write(index, Slow(TensorSpec("|u1", piece.shape), piece.nbytes, piece))
    assert outgoing.sent
    assert sum(chunks) == sum(sizes)


@pytest.mark.parametrize(("index", "start"), [(2, 0), (0, 100), (1, 1)])
def test_credit_for_a_place_that_is_none(index: int, start: int) -> None:
    with pytest.raises(Damaged):
        Outgoing(1, Cargo([np.zeros(100, np.uint8)])).go_on_at(index, start)


class Room:
    """A ring that has room for so many bytes."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes

    def land(self, sizes: object) -> list[Bytes]:
        assert isinstance(sizes, tuple | list)
        if sum(sizes) > self.nbytes:
            raise Full("it is full")
        return [np.zeros(size, np.uint8) for size in sizes]


def landing(room: Room, **changes: int) -> Landing:
    fields = {"ring_bytes": 1 << 20, "detour_bytes": 1 << 16, "tcp_window": 1 << 20, **changes}
    return Landing(TransportConfig(**fields), room.land)  # type: ignore[arg-type]


FIRST, SECOND, THIRD = (Peer(link, name) for link, name in enumerate(("first", "second", "third"), 1))


class TestLanding:
    def test_a_share_of_the_ring_then_beside_it_then_the_reason(self) -> None:
        where = landing(Room(1 << 20))
        held = [where.place(FIRST, [1 << 18]) for _ in range(2)]
        beside = where.place(FIRST, [1 << 16])
        why = where.place(FIRST, [1 << 16])
        assert isinstance(why, str)
        assert "share of the ring is used up: 524288 of 524288" in why
        assert "detour_bytes" in why
        assert isinstance(where.place(SECOND, [1 << 18]), list)  # another peer has its own share
        assert dict(where.detours) == {"landing: a peer's share of the ring is used up": 1}
        del held[0], beside
        assert isinstance(where.place(FIRST, [1 << 18]), list)

    def test_a_full_ring_sends_no_more_than_the_detour_beside_it(self) -> None:
        where = landing(Room(0))
        kept = [where.place(FIRST, [1 << 15]) for _ in range(3)]
        assert [isinstance(place, list) for place in kept] == [True, True, False]
        assert "no room in the ring: it is full" in str(kept[2])

    def test_the_window_is_what_was_not_taken(self) -> None:
        where = landing(Room(1 << 20), tcp_window=1 << 17)
        first = where.place(FIRST, [1 << 16, 1 << 16])
        assert isinstance(first, list)
        assert "granted and not taken" in str(where.place(FIRST, [1]))
        where.taken(1, 1 << 17)
        assert isinstance(where.place(FIRST, [1]), list)

    def test_what_the_ring_never_holds_passes_alone(self) -> None:
        def never(sizes: object) -> list[Bytes]:
            raise TooLarge("never")

        config = TransportConfig(ring_bytes=1 << 20, detour_bytes=1 << 16, tcp_window=1 << 20)
        where = Landing(config, never)
        first = where.place(FIRST, [1 << 18])
        assert isinstance(first, list)
        assert isinstance(where.place(FIRST, [1]), str)

    def test_the_ring_goes_to_who_waits_longest_and_memory_beside_it_to_anybody(self) -> None:
        room = Room(0)
        where = landing(room)
        assert "it is full" in where.place(FIRST, [1 << 18])
        room.nbytes = 1 << 17
        for younger in (SECOND, THIRD):
            assert "another peer waits for it" in where.place(younger, [1 << 17])
        beside = where.place(SECOND, [1 << 16])
        assert isinstance(beside, list)
        assert "another peer waits for it" in where.place(SECOND, [1 << 17])  # served, and so the last now
        room.nbytes = 1 << 18
        assert isinstance(where.place(FIRST, [1 << 18]), list)
        assert "another peer waits for it" in where.place(SECOND, [1 << 17])
        for served in (THIRD, SECOND):
            assert isinstance(where.place(served, [1 << 17]), list)

    def test_who_cannot_be_served_or_asks_no_more_keeps_nobody_waiting(self) -> None:
        room = Room(1 << 19)
        where = landing(room, tcp_window=3 << 18)
        held = where.place(FIRST, [1 << 19])
        assert "share of the ring" in where.place(FIRST, [1 << 18])
        assert isinstance(where.place(SECOND, [1 << 18]), list)
        del held
        room.nbytes = 1 << 17
        for leave in (where.withdraw, where.forget):
            assert "it is full" in where.place(THIRD, [1 << 18])
            assert "another peer waits" in where.place(SECOND, [1 << 17])
            leave(THIRD.link)
            assert isinstance(where.place(SECOND, [1 << 17]), list)

    def test_a_name_that_comes_back_has_one_share(self) -> None:
        where = landing(Room(1 << 20))
        held = [where.place(FIRST, [1 << 19]), where.place(FIRST, [1 << 16])]
        where.forget(FIRST.link)
        again = Peer(7, FIRST.name)
        why = where.place(again, [1 << 16])
        assert "share of the ring is used up: 524288 of 524288" in why
        assert "beside it 65536 bytes are held" in why
        del held
        assert isinstance(where.place(again, [1 << 19]), list)


class TestStopped:
    """A process that was stopped, and finds that much time has passed, has not looked for as long."""

    @pytest.fixture
    def neighbours(self) -> Iterator[Neighbours]:
        config = TransportConfig(ring_bytes=1 << 20)
        ring, guest = ShmOutbound(config), Guest(config)
        yield Neighbours(Host(ring), guest)
        guest.close()
        ring.close()

    @pytest.fixture
    def channel(self, neighbours: Neighbours) -> Channel:
        """One with a connection on which nothing comes."""
        channel = Channel(FIRST, TransportConfig(), landing(Room(1 << 20)), lambda: None, neighbours)
        silent = SimpleNamespace(sent=0, received=0, sending=False)
        silent.post = silent.close = lambda *_: None
        channel.attach(cast(Connection, silent))
        return channel

    @pytest.mark.parametrize(("seconds", "least"), [(0.1, 10), (0.01, 100), (60.0, 10)])
    def test_what_a_link_that_ended_still_brings_is_waited_for(
        self, channel: Channel, seconds: float, least: int
    ) -> None:
        channel.arriving.arrived(Frame(Kind.ANNOUNCE, 1), struct.pack("<Q", 5000))
        channel.end()
        assert least <= looks(seconds, channel.tick, lambda: channel.over) <= least + 3

    def test_a_lost_connection_has_time_to_be_made_again(self, channel: Channel) -> None:
        channel.detach("cut")
        assert looks(60.0, channel.tick, lambda: channel.over) >= 40  # of half a second, for 20 seconds
        assert channel.fault == "the bulk connection is lost for 20 s"

    def test_a_leader_that_had_no_time_to_take_anything_is_not_slow(
        self, channel: Channel, neighbours: Neighbours
    ) -> None:
        leader, follower = (Outgoing(number, Cargo([np.zeros(9, np.uint8)])) for number in (1, 2))
        crossing = Crossing(channel, leader, [(channel, follower)], lambda *_: None)
        neighbours.begin(crossing)
        assert looks(60.0, neighbours.look, lambda: channel.slow) >= 4
        assert not follower.behind


def looks(seconds: float, look: Callable[[float], object], until: Callable[[], bool]) -> int:
    """How many looks it takes, with so many seconds between two."""
    began = time.monotonic()
    for number in range(1000):
        if until():
            return number
        look(began + number * seconds)
    raise AssertionError("never")
