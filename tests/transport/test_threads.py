"""What one thread of an endpoint does at the worst moment of another: each such moment by itself."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

import shm
import transport
from shm.words import fence
from tests.crash.harness import segments_of
from tests.transport.test_tcp import hub_of
from transport.backends.base import Bytes, Peer, Proof
from transport.backends.shm import ShmInbound, ShmOutbound
from transport.backends.tcp import TcpOutbound
from transport.conformance import WAIT, Pumped, acknowledged, joined, left, noise, warm_up
from transport.tensors import source_of
from transport.wire import Wire

SHM = transport.TransportConfig(backend="shm", ring_bytes=16 << 20, inline_below=1, timeout=WAIT)
TCP = transport.TransportConfig(
    backend="tcp", ring_bytes=16 << 20, inline_below=1, timeout=WAIT, admission_timeout=WAIT
)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """The other thread."""
    with ThreadPoolExecutor(1) as pool:
        yield pool


# ------------------------------------------------------------------------------------ readers of a ring


class Relinked:
    """A reader with a handle of a writer's record, as the link between them is made a second time."""

    def __init__(self) -> None:
        self.outbound, self.inbound = ShmOutbound(SHM), ShmInbound(SHM)
        self.old, self.new = Peer(1, "writer", os.getpid()), Peer(2, "writer", os.getpid())
        self.admit(self.old)
        self.inbound.settle(self.old, "")
        self.data = noise(5 << 20)
        source = source_of(self.data)
        assert source is not None
        self.parcel = self.outbound.put([source], [self.old], timeout=WAIT, poll=lambda: None)
        self.parcel.fill()
        ((_, self.handle),) = self.parcel.load(self.old).handles
        self.admit(self.new)

    def admit(self, peer: Peer) -> None:
        proof = self.inbound.accept(peer, self.outbound.offer(peer), "reader")
        assert isinstance(proof, Proof)
        assert not self.outbound.admit(peer, proof)

    @property
    def reader(self) -> shm.RingReader:
        """Of the link that is known."""
        (reader,) = self.inbound._readers.values()
        return reader

    def open(self) -> Bytes:
        return self.inbound.open(self.old, self.handle, self.data.nbytes, ())

    def open_early(self) -> Bytes:
        return self.inbound.open_early(self.old, self.handle, self.data.nbytes, ())[0]

    def follow(self) -> Bytes:
        pieces = self.inbound.follow(self.old, self.handle, self.data.nbytes, ())
        return np.concatenate([piece for _, piece in pieces])


@pytest.fixture
def relinked() -> Iterator[Relinked]:
    relinked = Relinked()
    yield relinked
    relinked.parcel.release(relinked.old)
    relinked.inbound.close()
    relinked.outbound.close()


def test_a_record_is_opened_while_the_reader_of_its_ring_is_replaced(
    relinked: Relinked, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    close = relinked.reader.close

    def closes() -> None:
        close()
        opened.append(pool.submit(relinked.open).result(WAIT))

    monkeypatch.setattr(relinked.reader, "close", closes)
    relinked.inbound.settle(relinked.new, "")
    assert np.array_equal(opened.pop(), relinked.data.numpy())


@pytest.mark.parametrize("way", ["open", "open_early", "follow"])
@pytest.mark.parametrize("step", ["open", "is_whole"])
def test_a_record_is_opened_though_its_reader_was_just_replaced(
    relinked: Relinked, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch, way: str, step: str
) -> None:
    went = getattr(relinked.reader, step)

    def late(*arguments: Any, **options: Any) -> Any:
        pool.submit(relinked.inbound.settle, relinked.new, "").result(WAIT)
        return went(*arguments, **options)

    monkeypatch.setattr(relinked.reader, step, late)
    view = getattr(relinked, way)()
    assert np.array_equal(view, relinked.data.numpy())


def test_the_end_of_a_link_takes_no_reader_of_the_next_along(
    relinked: Relinked, pool: ThreadPoolExecutor
) -> None:
    """Who took its last message forgets a link that ended, while who handles what comes settles the next."""

    class Settling(dict[Peer, int]):
        def pop(self, *arguments: Any) -> Any:
            identity = super().pop(*arguments)
            with suppress(NotYet):  # now, or after the link was forgotten
                settling.append(pool.submit(relinked.inbound.settle, relinked.new, ""))
                settling[0].result(1)
            return identity

    settling: list[Any] = []
    relinked.inbound._identities = Settling(relinked.inbound._identities)
    relinked.inbound.drop(relinked.old)
    settling[0].result(WAIT)
    assert np.array_equal(relinked.open(), relinked.data.numpy())


# ------------------------------------------------------------------------------------ admission


@pytest.mark.parametrize("moment", ["admit", "values"])
def test_a_ring_is_not_closed_while_a_peer_is_admitted_to_it(
    pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Its name is gone: who sends to another peer makes a new one, and closes what nobody maps."""
    outbound, inbound = ShmOutbound(SHM), ShmInbound(SHM)
    near, far = Peer(1, "near", os.getpid()), Peer(2, "far", os.getpid())
    proof = inbound.accept(near, outbound.offer(near), "reader")
    ring = outbound.ring()
    shm.DIRECTORY.joinpath(ring.name).unlink()
    if moment == "admit":
        admit = ring.admit

        def late(*arguments: Any) -> None:
            pool.submit(outbound.offer, far).result(WAIT)
            admit(*arguments)

        monkeypatch.setattr(ring, "admit", late)
        assert not outbound.admit(near, proof)
    else:

        class Places(dict[Peer, Any]):
            def values(self) -> Any:
                places = list(super().values())
                if not self:
                    assert not pool.submit(outbound.admit, near, proof).result(WAIT)
                return places

        outbound._places = Places()
        outbound.offer(far)
    try:
        assert outbound.alive(near)
        source = source_of(noise(1000))
        assert source is not None
        outbound.put([source], [near], timeout=WAIT, poll=lambda: None).release(near)
    finally:
        inbound.close()
        outbound.close()


def test_who_sends_waits_for_a_bulk_connection_while_its_terms_are_taken(
    pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    with transport.listen("tcp://127.0.0.1:0", config=TCP) as front, joined(front, "near", TCP) as near:
        outbound: Any = near._exchange.sender.outbound
        (link,) = near._exchange.roster.links()
        source = source_of(noise(1000))
        assert source is not None
        agree, waits = outbound.agree, threading.Event()
        sending: list[Any] = []

        def late(*arguments: Any, **options: Any) -> Any:
            if not sending:
                sending.append(pool.submit(outbound.put, [source], [link.peer], timeout=WAIT, poll=waits.set))
                while not (waits.wait(0.01) or sending[0].done()):
                    pass
            return agree(*arguments, **options)

        monkeypatch.setattr(outbound, "agree", late)
        pumped = Pumped(front)
        near.send({"x": noise(1000)})
        pumped.next()
        sending[0].result(WAIT).release(link.peer)
        pumped.stop()


# ------------------------------------------------------------------------------------ closing


def with_ring(address: str, config: transport.TransportConfig = SHM) -> tuple[transport.Endpoint, str]:
    """An endpoint that listens, and the name of its ring."""
    front = transport.listen(address, config=config)
    with front.loan((1000,), np.uint8):
        pass
    outbound: Any = front._exchange.sender.outbound
    ring = outbound if config.backend == "shm" else outbound.ring
    return front, ring.ring().name


def test_who_closes_second_comes_back_when_everything_is_given_back(
    address: str, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    front, ring = with_ring(address)

    def flush(_: float) -> bool:
        second.append(pool.submit(front.close))
        with suppress(NotYet):  # it does not come back
            second[0].result(0.5)
            there.append(shm.DIRECTORY.joinpath(ring).exists())
        return True

    second: list[Any] = []
    there: list[bool] = []
    monkeypatch.setattr(front._exchange.sender.outbound, "flush", flush)
    front.close()
    second[0].result(WAIT)
    assert not any(there)
    assert not shm.DIRECTORY.joinpath(ring).exists()


def test_who_closes_while_it_closes_does_not_wait_for_itself(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a finalizer does that runs in the middle of it, in the same thread."""
    front, ring = with_ring(address)

    def flush(_: float) -> bool:
        front.close()
        return True

    monkeypatch.setattr(front._exchange.sender.outbound, "flush", flush)
    front.close()
    assert not shm.DIRECTORY.joinpath(ring).exists()


def _ends_while_a_thread_closes(address: str) -> None:
    front, _ = with_ring(address)
    closing = threading.Event()

    def flush(_: float) -> bool:
        closing.set()
        return threading.Event().wait(WAIT)

    front._exchange.sender.outbound.flush = flush  # type: ignore[assignment, method-assign]
    threading.Thread(target=front.close, daemon=True).start()
    assert closing.wait(WAIT)


def test_a_process_that_ends_while_a_thread_closes_leaves_nothing(address: str, short_path: Path) -> None:
    code = f"from tests.transport.test_threads import _ends_while_a_thread_closes as f; f({address!r})"
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        assert process.wait(WAIT) == 0
    assert not segments_of({process.pid})
    assert list(short_path.iterdir()) == []


def test_a_receive_whose_peers_another_thread_left_is_closed(
    address: str, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = transport.TransportConfig(backend="inline", timeout=WAIT)
    with transport.listen(address, config=config) as front, joined(front, "near", config) as near:
        tries = near._try_receive

        def late(*arguments: Any, **options: Any) -> Any:
            message = tries(*arguments, **options)
            pool.submit(near.close).result(WAIT)
            return message

        monkeypatch.setattr(near, "_try_receive", late)
        with pytest.raises(transport.Closed):
            near.receive()


# ------------------------------------------------------------------------------------ sockets


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_wire_that_closes_as_it_is_drained_brings_nothing(
    address: str, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    wire = Wire(SHM)
    wire.bind(address)
    epoll = wire._epoll

    class Late:
        """Another thread closes as this one gives the interpreter's lock back, or just after the poll."""

        def poll(self, *arguments: Any) -> Any:
            came = epoll.poll(*arguments)
            pool.submit(wire.close).result(WAIT)
            if moment == "before":
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            return came

        def __getattr__(self, name: str) -> Any:
            return getattr(epoll, name)

    monkeypatch.setattr(wire, "_epoll", Late())
    wire.wake()
    assert wire.drain(1) == []


def test_the_descriptor_of_what_another_thread_closed_is_none(
    address: str, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    front, _ = with_ring(address)
    check = front._exchange.check

    def late() -> None:
        check()
        pool.submit(front.close).result(WAIT)

    monkeypatch.setattr(front._exchange, "check", late)
    with pytest.raises(transport.Closed):
        front.fileno()


# ------------------------------------------------------------------------------------ interrupts


OURS = (str(Path(transport.__file__).parent), str(Path(shm.__file__).parent), contextlib.__file__)


def is_finalizer(frame: FrameType | None) -> bool:
    """Whether Python would only report what is raised here."""
    while frame is not None and frame.f_code is not weakref.finalize.__call__.__code__:
        frame = frame.f_back
    return frame is not None


def interrupted(call: Callable[[], object]) -> Iterator[None]:
    """Ctrl-C in a call as soon as the first, second, … function of C has returned to it, until it meets none.

    That is where Python looks for signals, beside loops and the beginnings of its own functions.
    """
    for step in count():
        left = step

        def profile(frame: FrameType, event: str, _: object) -> None:
            nonlocal left
            if event == "c_return" and frame.f_code.co_filename.startswith(OURS) and not is_finalizer(frame):
                left -= 1
                if left < 0:
                    raise KeyboardInterrupt

        sys.setprofile(profile)
        try:
            call()
            sys.setprofile(None)
            return
        except KeyboardInterrupt:
            pass
        finally:
            sys.setprofile(None)
        yield


def test_an_interrupt_of_who_handles_what_came_keeps_nobody_from_it() -> None:
    with transport.Endpoint("alone", transport.TransportConfig(backend="inline")) as alone:
        for _ in interrupted(alone._exchange.pump):
            assert not alone._exchange._pumping.locked()


def test_an_interrupted_send_in_parts_keeps_nobody_from_the_next(address: str) -> None:
    config = transport.TransportConfig(backend="inline", timeout=WAIT)
    with transport.listen(address, config=config) as front, joined(front, "near", config):
        sender, links = front._exchange.sender, front._exchange.roster.links()

        def parts() -> None:
            with sender._one_at_a_time(links, time.monotonic() + WAIT):
                pass

        for _ in interrupted(parts):
            assert not any(lock.locked() for lock in sender._parting.values())


@pytest.mark.parametrize("backend", ["shm", "tcp"])
def test_an_interrupted_close_is_ended_by_the_next(short_path: Path, backend: str) -> None:
    def opened() -> tuple[transport.Endpoint, str]:
        front, ring = with_ring(
            f"ipc://{short_path}/{len(fronts)}", dataclasses.replace(SHM, backend=backend)
        )
        if backend == "tcp":
            hub_of(front).expect(Peer(1, "near"), "127.0.0.1")
        return front, ring

    fronts: list[tuple[transport.Endpoint, str]] = []
    fronts.append(opened())

    def closes() -> None:
        fronts[-1][0].close()

    for _ in interrupted(closes):
        front, ring = fronts[-1]
        front.close()
        assert not shm.DIRECTORY.joinpath(ring).exists()
        assert list(short_path.iterdir()) == []
        fronts.append(opened())


def test_an_interrupted_fence_is_followed_by_others() -> None:
    for _ in interrupted(fence):
        fence()


# ------------------------------------------------------------------------------------ bulk connections


def test_what_closed_bulk_connections_are_asked_for_is_not_made() -> None:
    """A thread that began to offer one goes on after another thread has closed."""
    outbound = TcpOutbound(TCP)
    outbound.close()
    for peer in (Peer(1, "near", address="tcp://127.0.0.1:1"), Peer(2, "far", address="tcp://127.0.0.1:1")):
        with pytest.raises(transport.Closed):
            outbound.offer(peer)  # it took descriptors and a thread that nobody gives back


def test_closed_bulk_connections_write_into_nobody_elses_descriptor() -> None:
    outbound = TcpOutbound(TCP)
    near, far = (Peer(link, "x", address="tcp://127.0.0.1:1") for link in (1, 2))
    outbound.offer(near)
    number = outbound.hub._poller._event
    outbound.close()
    ours, other = os.pipe()
    try:
        if other != number:
            os.dup2(other, number)
        with suppress(transport.Closed):
            outbound.offer(far)
        os.set_blocking(ours, False)
        with pytest.raises(BlockingIOError):
            os.read(ours, 8)
    finally:
        for descriptor in {ours, other, number}:
            os.close(descriptor)


def test_what_is_given_up_while_bulk_connections_close_is_left_to_their_thread(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As who sends does when it finds the endpoint closed: the thread may just be reading it."""
    armed, hit = threading.Event(), threading.Event()

    def trace(event: str, *_: Any) -> None:
        if event == "bulk.sending" and armed.is_set():
            armed.clear()
            outbound: Any = front._exchange.sender.outbound
            hub = outbound.hub
            ((channel, _),) = hub._connected.values()
            closing.append(pool.submit(hub.close))
            while not hub._closed:
                pass
            pool.submit(hub.tell, partial(channel.cancel, channel._on_its_way)).result(WAIT)
            hit.set()

    closing: list[Any] = []
    config = dataclasses.replace(TCP, trace=trace)
    with (
        ThreadPoolExecutor(2) as pool,
        transport.listen("tcp://127.0.0.1:0", config=config) as front,
        joined(front, "near", TCP) as near,
    ):
        pumped = Pumped(near)
        warm_up(front, pumped)
        armed.set()
        front.send({"x": noise(3 << 20)})
        assert hit.wait(WAIT)
        closing[0].result(WAIT)
        pumped.stop()
    assert [record.getMessage() for record in caplog.records if record.exc_info] == []


def test_a_peer_that_leaves_while_another_thread_offers_it_a_bulk_connection_leaves_nothing(
    pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    with transport.listen("tcp://127.0.0.1:0", config=TCP) as front, joined(front, "near", TCP) as near:
        outbound: Any = front._exchange.sender.outbound
        terms = outbound.terms

        def late(*arguments: Any, **options: Any) -> Any:
            near.close()
            pool.submit(left, front).result(WAIT)
            return terms(*arguments, **options)

        monkeypatch.setattr(outbound, "terms", late)
        with pytest.raises(transport.PeerGone):
            front.send({"x": noise(1000)}, to="near")
        assert not outbound.hub._ways


# ------------------------------------------------------------------------------------ in the middle of a send


@pytest.mark.parametrize("fails", ["first", "second", "trace"])
def test_a_send_that_fails_in_the_middle_lets_go_for_each_peer_once(
    address: str, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    """By what is no error of the transport's: a trace of the user's, an interrupt."""
    failing = threading.Event()

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("it fails")

    def trace(event: str, *_: Any) -> None:
        if failing.is_set() and event == "send.posted" and fails == "trace":
            fail()

    config = dataclasses.replace(SHM, trace=trace)
    with (
        transport.listen(address, config=config) as front,
        joined(front, "first", SHM) as first,
        joined(front, "second", SHM) as second,
    ):
        peers = [Pumped(first), Pumped(second)]
        both = ["first", "second"]
        front.send({"x": noise(1000)}, to=both)
        for peer in peers:
            peer.next()
        if fails != "trace":
            link = front._exchange.roster.named(fails)
            monkeypatch.setattr(link, "send", fail)
        failing.set()
        with pytest.raises(RuntimeError, match="it fails"):
            front.send({"x": noise(1000)}, to=both)
        failing.clear()
        monkeypatch.undo()
        if fails != "first":
            peers[0].next()
        front.send({"n": 1}, to=both)
        for peer in peers:
            assert peer.next().body == {"n": 1}
        acknowledged(front)
        peers[0].stop()
        peers[1].stop()
        assert front.statistics()["backend"]["ring"].live == 0
