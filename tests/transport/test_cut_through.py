"""Tensors that are read while they are being written, and what a stage brings elsewhere as it comes."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

import transport
from tests.crash.harness import left_by, until
from transport import codec
from transport.backends.base import Bytes, Parcel
from transport.conformance import WAIT, BackendConformance, Both, joined, noise, running, same
from transport.errors import PeerGone, ProtocolError
from transport.sources import Progress, Source
from transport.tensors import source_of

MIB = 1 << 20
LARGE = 4 * MIB  # enough to be followed


def config(**changes: Any) -> transport.TransportConfig:
    fields = {"backend": "shm", "ring_bytes": 16 * MIB, "timeout": WAIT, "admission_timeout": WAIT}
    return transport.TransportConfig(**{**fields, **changes})


class TestWhole(BackendConformance):
    """All that every backend must do, by peers that are told of no tensor before it is written."""

    backend = "shm"
    options = {"cut_through": False}
    holds_memory = True


class InSteps(Source):
    """Writes one half, waits until it may go on, then writes the other half or fails."""

    def __init__(self, tensor: torch.Tensor, *, fails: bool = False) -> None:
        whole = source_of(tensor)
        assert whole is not None
        super().__init__(whole.spec, whole.nbytes, whole.tensor)
        self.half = threading.Event()  # is written
        self.go_on = threading.Event()
        self._whole = whole
        self._fails = fails

    def fill(
        self, destination: Bytes, *, threads: int = 1, progress: Progress | None = None, step: int = 0
    ) -> None:
        half = self.nbytes // 2
        self._whole.fill_range(destination[:half], 0, half)
        assert progress is not None
        progress(half)
        self.half.set()
        assert self.go_on.wait(WAIT)
        if self._fails:
            raise RuntimeError("the second half cannot be read")
        self._whole.fill_range(destination[half:], half, self.nbytes)
        progress(self.nbytes)


@pytest.fixture
def both() -> Iterator[Both]:
    both = Both(config(cut_through=True))
    yield both
    both.close()


def put(both: Both, *sources: Source) -> Parcel:
    return both.outbound.put(sources, [both.peer], timeout=1.0, poll=lambda: None)


def followed(both: Both, parcel: Parcel, index: int = 0) -> Iterator[tuple[int, Bytes]]:
    name, handle = parcel.load(both.peer).handles[index]
    for start, array in both.inbounds[name].follow(both.peer, handle, LARGE, []):
        assert isinstance(array, np.ndarray)
        yield start, array
        del array


def test_a_reader_sees_the_first_half_while_the_second_is_not_written(both: Both) -> None:
    data = noise(LARGE)
    source = InSteps(data)
    with ThreadPoolExecutor(1) as pool:
        parcel = put(both, source)
        filling = pool.submit(parcel.fill)
        assert source.half.wait(WAIT)  # who follows gives up after a second without a byte
        pieces = followed(both, parcel)
        start, first = next(pieces)
        assert (start, first.nbytes) == (0, LARGE // 2)
        assert np.array_equal(first, data.numpy()[: LARGE // 2])
        assert not filling.done()
        source.go_on.set()
        filling.result(WAIT)
        rest = list(pieces)
    assert [start for start, _ in rest] == [LARGE // 2]
    assert np.array_equal(rest[0][1], data.numpy()[LARGE // 2 :])
    parcel.release(both.peer)
    del first, rest, pieces
    assert both.outbound.statistics()["ring"].live == 0  # type: ignore[attr-defined]


def test_a_copy_that_fails_is_an_error_at_the_reader_and_gives_the_space_back(both: Both) -> None:
    source = InSteps(noise(LARGE), fails=True)
    with ThreadPoolExecutor(1) as pool:
        parcel = put(both, source)
        filling = pool.submit(parcel.fill)
        assert source.half.wait(WAIT)
        pieces = followed(both, parcel)
        _, first = next(pieces)
        source.go_on.set()
        with pytest.raises(RuntimeError, match="the second half cannot be read"):
            filling.result(WAIT)
    with pytest.raises(ProtocolError, match="the writer gave up"):
        next(pieces)
    parcel.release(both.peer)  # the acknowledgement of the message that failed
    assert np.array_equal(first, noise(LARGE).numpy()[: LARGE // 2])  # not used again while it is looked at
    assert both.outbound.statistics()["ring"].live == 1  # type: ignore[attr-defined]
    del first, pieces
    assert both.outbound.statistics()["ring"].live == 0  # type: ignore[attr-defined]


def test_what_nobody_was_told_of_is_not_written(both: Both) -> None:
    parcel = put(both, InSteps(noise(LARGE)))
    parcel.release(both.peer)  # the message could not be sent
    parcel.fill()
    assert both.outbound.statistics()["ring"].live == 0  # type: ignore[attr-defined]


def test_who_does_not_follow_finds_it_whole() -> None:
    both = Both(config(cut_through=False))
    with ThreadPoolExecutor(1) as pool:
        source = InSteps(noise(LARGE))
        source.fill = source._whole.fill  # type: ignore[method-assign] # which asks for no progress
        parcel = pool.submit(put, both, source).result(WAIT)
    ((start, whole),) = followed(both, parcel)
    assert (start, whole.nbytes) == (0, LARGE)
    assert np.array_equal(whole, noise(LARGE).numpy())
    parcel.release(both.peer)
    both.close()


# ------------------------------------------------------------------------------------ with a stage


class Elsewhere:
    """A stage whose elsewhere is memory of this process; what was written when, in order."""

    def __init__(self, wrote: Callable[[int], object] = lambda nbytes: None) -> None:
        self.batches: list[Placed] = []
        self.wrote = wrote

    def batch(self) -> Placed:
        self.batches.append(Placed(self))
        return self.batches[-1]


class Placed:
    def __init__(self, stage: Elsewhere) -> None:
        self.stage = stage
        self.places: list[OnePlace] = []

    def place(self, nbytes: int) -> OnePlace:
        self.places.append(OnePlace(self, nbytes))
        return self.places[-1]


class OnePlace:
    def __init__(self, batch: Placed, nbytes: int) -> None:
        self.tensor = torch.full((nbytes,), 0xEE, dtype=torch.uint8)
        self.writes: list[tuple[int, int]] = []
        self._batch = batch

    def write(self, start: int, array: Bytes | transport.Piece) -> None:
        assert isinstance(array, np.ndarray)
        self.tensor.numpy()[start : start + array.nbytes] = array
        self.writes.append((start, array.nbytes))
        self._batch.stage.wrote(array.nbytes)


Link = tuple[transport.Endpoint, transport.Endpoint]


@pytest.fixture(params=[False, True], ids=["whole", "cut through"])
def link(request: pytest.FixtureRequest, address: str) -> Iterator[Link]:
    settings = config(backend="auto", cut_through=request.param)
    with transport.listen(address, config=settings) as front, joined(front, "near", settings) as near:
        yield front, near


def exchanged(link: Link, body: Any, stage: Elsewhere | None) -> transport.Message:
    front, near = link
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(front.send, body)
        message = near.receive(stage=stage)
        sending.result(WAIT)
    return message


def test_tensors_come_as_they_were_sent(link: Link) -> None:
    body = {
        "large": noise(5 * MIB).view(torch.bfloat16).view(5, -1),
        "small": torch.arange(3.0),
        "empty": torch.empty(0, 4),
        "strided": noise(2 * MIB).view(1024, -1).T,
        "array": np.arange(100_000),
    }
    stage = Elsewhere()
    message = exchanged(link, body, stage)
    for name, value in body.items():
        assert same(message.body[name], value), name
    assert message.staged is stage.batches[-1]
    assert [place.tensor.nbytes for place in stage.batches[-1].places] == [5 * MIB, 12, 0, 2 * MIB]
    assert message.body["large"].untyped_storage().data_ptr() == stage.batches[-1].places[0].tensor.data_ptr()


def test_a_message_larger_than_the_ring_goes_on_part_by_part(link: Link) -> None:
    """No part waits for the last: each has left the ring before the next but one is written."""
    data = [noise(40 * MIB).view(torch.float32), noise(5)]
    stage = Elsewhere()
    message = exchanged(link, {"data": data}, stage)
    assert all(map(same, message.body["data"], data))
    assert message.staged is stage.batches[-1]
    (large, small) = stage.batches[-1].places
    assert len(large.writes) >= 20
    assert large.writes[0][0] == 0
    assert all(a + n == b for (a, n), (b, _) in zip(large.writes, large.writes[1:], strict=False))
    assert small.writes == [(0, 5)]
    assert message.body["data"][0].untyped_storage().data_ptr() == large.tensor.data_ptr()
    assert exchanged(link, {"n": noise(MIB)}, stage).body["n"].equal(noise(MIB))


def test_a_stage_that_has_no_memory_refuses_that_message_alone(link: Link) -> None:
    class NoRoom(Placed):
        def place(self, nbytes: int) -> OnePlace:
            raise torch.OutOfMemoryError("no memory on the device")

    class Full(Elsewhere):
        def batch(self) -> Placed:
            return NoRoom(self)

    front, near = link
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(front.send, {"x": noise(LARGE)})
        with pytest.raises(ProtocolError, match="no memory on the device"):
            near.receive(stage=Full())
        sending.result(WAIT)
    assert exchanged(link, {"x": noise(LARGE)}, Elsewhere()).body["x"].equal(noise(LARGE))


@pytest.fixture(params=[False, True], ids=["plain", "staged"])
def stage(request: pytest.FixtureRequest) -> Elsewhere | None:
    return Elsewhere() if request.param else None


def calling(event: str, call: Callable[[], object]) -> transport.TransportConfig:
    """A configuration by which `call` is called at each event of that name."""
    return config(trace=lambda name, ns, fields: call() if name == event else None)


@pytest.mark.parametrize("opened", [True, False], ids=["opened", "not opened yet"])
def test_a_message_that_its_sender_failed_to_write_reaches_nobody(
    address: str, stage: Elsewhere | None, opened: bool
) -> None:
    source = InSteps(noise(LARGE), fails=True)
    settings = calling("ring.opened", source.go_on.set)
    with (
        transport.listen(address, config=config()) as front,
        joined(front, "near", settings) as near,
        ThreadPoolExecutor(2) as pool,
    ):
        exchanged((front, near), {"x": noise(LARGE)}, stage)
        if opened:
            source.go_on.clear()
        sending = pool.submit(send_source, front, source)
        if not opened:
            with pytest.raises(RuntimeError, match="the second half"):
                sending.result(WAIT)
        receiving = pool.submit(near.receive, stage=stage)
        with pytest.raises(RuntimeError, match="the second half"):
            sending.result(WAIT)
        front.send({"n": 1})
        assert receiving.result(WAIT).body == {"n": 1}
        assert near.statistics()["received"]["given up"] == 1
        near.try_receive()  # acknowledges
        until(lambda: front.statistics()["backend"]["ring"].live == 0, "all space comes back")


def test_a_message_that_is_still_being_written_is_waited_for_and_named(address: str) -> None:
    source = InSteps(noise(LARGE))
    with (
        transport.listen(address, config=config()) as front,
        joined(front, "near", config()) as near,
        ThreadPoolExecutor(2) as pool,
    ):
        exchanged((front, near), {"x": noise(LARGE)}, None)
        sending = pool.submit(send_source, front, source)
        until(lambda: has_come(near), "it is told")
        with pytest.raises(
            transport.Timeout,
            match=rf"message 2 from 'front' \(pid \d+\) at .* its end: {LARGE} bytes, begun \d+\.\d s ago",
        ):
            near.receive(timeout=0.2)
        assert near.try_receive() is None
        with pytest.raises(transport.Timeout, match="message 2 from 'front'"):
            asyncio.run(near.receive_async(timeout=0.1))
        receiving = pool.submit(near.receive, copy=True)
        source.go_on.set()
        sending.result(WAIT)
        assert same(receiving.result(WAIT).body["x"], noise(LARGE))


def test_what_was_sent_is_kept_by_nobody_though_it_is_not_acknowledged(address: str) -> None:
    with transport.listen(address, config=config()) as front, joined(front, "near", config()) as near:
        exchanged((front, near), {"x": noise(LARGE)}, None)
        image = noise(LARGE).numpy()
        gone = weakref.ref(image)
        front.send({"x": image})
        del image
        until(lambda: gone() is None, "the threads that copied it have let go of it")
        assert front.peers[0].unacknowledged
        assert same(near.receive().body["x"], noise(LARGE).numpy())


Three = tuple[transport.Endpoint, transport.Endpoint, transport.Endpoint]


@pytest.fixture
def three(address: str) -> Iterator[Three]:
    """A receiver, and two that send to it."""
    with (
        transport.listen(address, name="near", config=config()) as near,
        joined(near, "front", config()) as front,
        joined(near, "other", config()) as other,
    ):
        yield near, front, other


def test_who_stops_while_it_writes_holds_up_nobody_else(three: Three) -> None:
    source = InSteps(noise(LARGE))
    near, front, other = three
    with ThreadPoolExecutor(1) as pool:
        for sender in (front, other):
            exchanged((sender, near), {"x": noise(LARGE)}, None)
        sending = pool.submit(send_source, front, source)
        until(lambda: has_come(near), "it is told")
        with pytest.raises(transport.Timeout, match="message 2 from 'front'"):
            near.receive(timeout=0.2)
        for turn in range(3):
            message = exchanged((other, near), {"turn": turn, "x": noise(LARGE)}, None)
            assert (message.sender, message.body["turn"]) == ("other", turn)
            assert same(message.body["x"], noise(LARGE))
            del message
        source.go_on.set()
        sending.result(WAIT)
        front.send({"after": 1})
        assert same(near.receive().body["x"], noise(LARGE))
        assert near.receive().body == {"after": 1}


def test_who_stops_while_a_stage_follows_holds_up_nobody_else(three: Three) -> None:
    source = InSteps(noise(LARGE))
    near, front, other = three
    with ThreadPoolExecutor(1) as pool:
        exchanged((front, near), {"x": noise(LARGE)}, Elsewhere())
        sending = pool.submit(send_source, front, source)
        until(lambda: has_come(near), "it is told")
        with pytest.raises(
            transport.Timeout, match=rf"^'front' \(pid \d+\): .* it has \d+ of {LARGE} bytes, no more in 1"
        ):
            near.receive(timeout=0.2, stage=Elsewhere())
        other.send({"n": 1})
        assert near.receive(stage=Elsewhere()).body == {"n": 1}
        source.go_on.set()
        sending.result(WAIT)
        assert same(near.receive(stage=Elsewhere()).body["x"], noise(LARGE))


def test_an_event_loop_goes_on_while_a_message_is_being_written(address: str) -> None:
    source = InSteps(noise(LARGE))

    async def received(near: transport.Endpoint) -> transport.Message:
        receiving = asyncio.create_task(near.receive_async())
        while not near._exchange.receiver.is_being_written:
            await asyncio.sleep(1e-3)
        source.go_on.set()  # by this very loop
        return await receiving

    with (
        transport.listen(address, config=config()) as front,
        joined(front, "near", config()) as near,
        ThreadPoolExecutor(1) as pool,
    ):
        exchanged((front, near), {"x": noise(LARGE)}, None)
        sending = pool.submit(send_source, front, source)
        assert same(asyncio.run(received(near)).body["x"], noise(LARGE))
        sending.result(WAIT)


def has_come(near: transport.Endpoint) -> bool:
    """Whether there is a message to take, complete or not."""
    return bool(near.peers and near._exchange.receiver.queue)


def send_source(front: transport.Endpoint, source: Source) -> None:
    """Send a message whose one tensor is that source."""
    sender = front._exchange.sender
    links = sender._find(["near"], {})
    encoded = codec.Encoded(codec.encode({"x": torch.empty(1)}).body, [source])
    sender._send_to(encoded, links, time.monotonic() + WAIT, {})


def _dies_while_it_sends(address: str) -> None:
    with transport.listen(address, config=config()) as front:
        front.wait_for_peers(1, timeout=WAIT)
        front.send({"x": noise(LARGE)})
        source = InSteps(noise(LARGE))
        send_source(front, source)  # never ends


def test_a_writer_killed_half_way_is_gone_and_nothing_half_is_handed_out(
    address: str, stage: Elsewhere | None
) -> None:
    opened: list[None] = []

    def kill() -> None:
        opened.append(None)
        if len(opened) == 2:
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)

    with (
        running(_dies_while_it_sends, address) as process,
        transport.connect(address, name="near", config=calling("ring.opened", kill), timeout=WAIT) as near,
    ):
        near.receive(stage=stage)
        with pytest.raises(PeerGone, match="the writer"):
            near.receive(stage=stage)
        process.join(WAIT)
        assert left_by({process.pid or 0}) == []
