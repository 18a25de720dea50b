"""What an endpoint promises beyond its backend: to whom, threads, event loops, forks, closing, texts."""

from __future__ import annotations

import asyncio
import os
import re
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import transport
from tests.crash.harness import running
from transport.conformance import WAIT, Pumped, acknowledged, digest, joined, left, noise, same, serving

FRAMES = transport.TransportConfig(backend="frames", timeout=WAIT)


@pytest.fixture
def front(address: str) -> Iterator[transport.Endpoint]:
    with transport.listen(address, config=FRAMES) as endpoint:
        yield endpoint


@pytest.fixture
def near(front: transport.Endpoint) -> Iterator[transport.Endpoint]:
    with joined(front, "near", FRAMES) as endpoint:
        yield endpoint


# ------------------------------------------------------------------------------------ to whom


def test_to_may_be_left_out_for_one_peer_only(front: transport.Endpoint) -> None:
    with pytest.raises(transport.PeerGone, match="nobody is linked with 'front'"):
        front.send({})
    with joined(front, "a", FRAMES) as a:
        front.send({"n": 1})
        assert a.receive().body == {"n": 1}
        with joined(front, "b", FRAMES) as b:
            with pytest.raises(ValueError, match="say to whom: 'front' is linked with a, b"):
                front.send({})
            front.send({"n": 2}, to=["b", "a", "b"])
            assert (a.receive().body, b.receive().body) == ({"n": 2}, {"n": 2})
            assert b.try_receive() is None
    with pytest.raises(ValueError, match="names nobody"):
        front.send({}, to=[])


def test_what_cannot_be_sent_is_named_and_nothing_is(
    front: transport.Endpoint, near: transport.Endpoint
) -> None:
    with pytest.raises(TypeError, match=r"body\['images'\]\[1\]: cannot send an object of type object"):
        front.send({"images": [noise(3), object()]})
    front.send({"n": 1})
    assert near.receive().body == {"n": 1}


def test_the_window_of_messages(address: str) -> None:
    config = transport.TransportConfig(backend="frames", max_queued_messages=5)
    with transport.listen(address, config=config) as front, joined(front, "near", config) as near:
        for number in range(5):
            front.try_send({"n": number})
        with pytest.raises(
            transport.Full, match=r"'near' \(pid \d+\) .* has not acknowledged 5 messages"
        ) as caught:
            front.try_send({"n": 5})
        assert (caught.value.delivered, list(caught.value.failed)) == ((), ["near"])
        assert [near.receive().body["n"] for _ in range(5)] == list(range(5))
        assert near.try_receive() is None
        front.send({"n": 6})
        assert near.receive().body == {"n": 6}


def test_the_window_of_bytes(address: str) -> None:
    config = transport.TransportConfig(backend="frames", max_queued_bytes=10_000)
    with transport.listen(address, config=config) as front, joined(front, "near", config) as near:
        front.try_send({"n": 0, "text": "x" * 20_000})  # alone, a message may be larger
        with pytest.raises(transport.Full, match=r"max_queued_bytes; 'near' \(pid \d+\) .* 1 messages"):
            front.try_send({"n": 1})
        assert near.receive().body["n"] == 0
        assert near.try_receive() is None
        for number in (1, 2):
            front.send({"n": number, "text": "x" * 4_000})
        with pytest.raises(transport.Full, match="max_queued_bytes"):
            front.try_send({"n": 3, "text": "x" * 4_000})
        assert [near.receive().body["n"] for _ in range(2)] == [1, 2]


def test_full_for_some_of_several(address: str) -> None:
    config = transport.TransportConfig(backend="frames", max_queued_messages=3)
    with (
        transport.listen(address, config=config) as front,
        joined(front, "a", config),
        joined(front, "b", config) as b,
    ):
        for number in range(3):
            front.send({"n": number}, to="a")
        with pytest.raises(transport.Full, match="1 of 2 peers have the message; a: ") as caught:
            front.try_send({"n": 3}, to=["a", "b"])
        assert caught.value.delivered == ("b",)
        assert list(caught.value.failed) == ["a"]
        assert b.receive().body == {"n": 3}


# ------------------------------------------------------------------------------------ limits of one message


def test_too_large_says_which_limit(address: str) -> None:
    config = transport.TransportConfig(
        backend="frames", max_message_bytes=1000, max_tensors=3, max_control_bytes=8192
    )
    with transport.listen(address, config=config) as front, joined(front, "near", config) as near:
        with pytest.raises(
            transport.TooLarge, match=r"1001 bytes of tensors exceed max_message_bytes \(1000\)"
        ):
            front.send({"x": noise(1001)})
        with pytest.raises(transport.TooLarge, match=r"4 tensors exceed max_tensors \(3\)"):
            front.send([noise(n + 1) for n in range(4)])
        with pytest.raises(transport.TooLarge, match="a body of 5003 bytes without its tensors exceeds half"):
            front.send(b"x" * 5000)
        front.send({"x": noise(1000)})
        assert same(near.receive().body["x"], noise(1000))


def test_a_control_message_that_is_too_large_never_reaches_the_wire(address: str) -> None:
    config = transport.TransportConfig(backend="frames", max_control_bytes=8192)
    with transport.listen(address, config=config) as front, joined(front, "near", config) as near:
        with pytest.raises(
            transport.TooLarge, match=r"exceeds max_control_bytes \(8192\); send fewer tensors"
        ):
            front.send([noise(n % 5 + 1, n) for n in range(500)])
        front.send({"n": 1})  # the connection is as it was
        assert near.receive().body == {"n": 1}


# ------------------------------------------------------------------------------------ telling


def test_peers_statistics_and_repr(front: transport.Endpoint, address: str) -> None:
    assert repr(front) == f"<Endpoint 'front' at {address}, frames, linked with nobody>"
    with joined(front, "near", FRAMES) as near:
        front.send({"x": noise(100_000)})
        (info,) = front.peers
        assert (info.name, info.pid, info.address, info.backend) == ("near", os.getpid(), address, "frames")
        assert info.unacknowledged == 1
        assert info.connected >= 0
        message = near.receive()
        assert repr(message) == "<Message 1 from 'front' with 1 tensors>"
        assert near.try_receive() is None
        acknowledged(front)
        assert front.statistics()["sent"] == {"messages": 1}
        received = near.statistics()["received"]
        assert (received["messages"], received["bytes frames"]) == (1, 100_000)
        assert repr(front) == f"<Endpoint 'front' at {address}, frames, linked with near>"
    front.close()
    assert repr(front) == "<Endpoint 'front' closed>"


def test_a_timeout_says_who_was_waited_for(front: transport.Endpoint, near: transport.Endpoint) -> None:
    with pytest.raises(
        transport.Timeout, match=r"'front' received nothing in 0.01 s; it waited for 'near' \(pid \d+\)"
    ):
        front.receive(timeout=0.01)
    assert issubclass(transport.Timeout, TimeoutError)


def test_an_unknown_backend_is_named_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="there is no backend 'warp'; there are auto, inline, frames, shm"):
        transport.Endpoint("x", transport.TransportConfig(backend="warp"))


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("timeout", float("nan"), "a finite number"),
        ("linger", float("inf"), "a finite number"),
        ("peer_share", "0.5", "a finite number"),
        ("ring_bytes", 1.5e9, "a whole number"),
        ("max_peers", True, "a whole number"),
        ("tcp_port", None, "a whole number"),
        ("cut_through", "no", "True or False"),
        ("curve_key", None, "text"),
        ("trace", 3, "a callable or None"),
    ],
)
def test_an_option_of_the_wrong_kind_is_refused_by_name(name: str, value: object, what: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be {what}, not {re.escape(repr(value))}$"):
        transport.TransportConfig(**{name: value})  # type: ignore[arg-type]


def test_a_timeout_that_never_ends_is_refused(front: transport.Endpoint, near: transport.Endpoint) -> None:
    never = float("nan")
    calls: list[Callable[[], object]] = [
        lambda: near.receive(timeout=never),
        lambda: near.send({}, timeout=never),
        lambda: near.loan((1,), np.uint8, timeout=never).__enter__(),
        lambda: near.wait_for_peers(2, timeout=never),
        lambda: near.connect(front.addresses[0], timeout=never),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="timeout must be a number of seconds, not nan"):
            call()


# ------------------------------------------------------------------------------------ closing


def test_closing_twice_and_using_what_is_closed(front: transport.Endpoint) -> None:
    front.close()
    front.close()
    calls: list[Any] = [
        lambda: front.send({}),
        lambda: front.try_send({}),
        front.receive,
        front.try_receive,
        front.fileno,
        front.statistics,
        lambda: front.peers,
        lambda: front.wait_for_peers(1),
        lambda: front.listen("ipc:///tmp/x"),
        lambda: front.connect("ipc:///tmp/x"),
        lambda: front.loan((3,), int).__enter__(),
    ]
    for call in calls:
        with pytest.raises(transport.Closed, match="'front' is closed"):
            call()


def test_close_in_another_thread_ends_waiting(front: transport.Endpoint, near: transport.Endpoint) -> None:
    with ThreadPoolExecutor(3) as pool:
        receiving = [pool.submit(front.receive, timeout=WAIT) for _ in range(2)]
        waiting = pool.submit(front.wait_for_peers, 9, timeout=WAIT)
        front.close()
        for future in receiving:
            with pytest.raises(transport.Closed):
                future.result(WAIT)
        with pytest.raises(transport.Closed):
            waiting.result(WAIT)


@pytest.mark.parametrize("backend", ["frames", "shm"])
def test_close_in_another_thread_ends_a_send_that_waits_for_room(address: str, backend: str) -> None:
    config = transport.TransportConfig(
        backend=backend, ring_bytes=4 << 20, detour_bytes=2 << 20, timeout=WAIT
    )
    front = transport.listen(address, config=config)
    with front, joined(front, "near", config) as near:
        pumped = Pumped(near)
        front.send({"x": noise(300_000)})
        pumped.next()
        pumped.stop()
        polled = threading.Event()
        poll = front._exchange.sender._pump

        def observed() -> None:
            polled.set()
            poll()

        front._exchange.sender._pump = observed

        def fill() -> None:
            while True:
                front.send({"x": noise(300_000)}, to="near", timeout=WAIT)

        with ThreadPoolExecutor(1) as pool:
            filling = pool.submit(fill)
            assert polled.wait(WAIT)
            front.close()
            with pytest.raises(transport.Closed):
                filling.result(WAIT)


# ------------------------------------------------------------------------------------ threads


@pytest.mark.parametrize("backend", ["frames", "auto", "tcp"])
def test_several_threads_send_and_receive_at_once(address: str, backend: str) -> None:
    threads, each = 3, 40
    options: dict[str, Any] = {
        "backend": backend,
        "ring_bytes": 16 << 20,
        "detour_bytes": 8 << 20,
        "timeout": WAIT,
    }
    config = transport.TransportConfig(**options)
    with transport.listen(address, config=config) as front, joined(front, "near", config) as near:
        came: list[tuple[int, int]] = []

        def send(thread: int) -> None:
            for number in range(each):
                tensor = noise(1000 + 7919 * ((thread + number) % 37), thread * each + number)
                front.send({"id": (thread, number), "sum": digest(tensor), "x": tensor})

        def receive() -> None:
            while len(came) < threads * each:
                try:
                    body = near.receive(timeout=0.2).body
                except transport.Timeout:
                    continue
                assert digest(body["x"]) == body["sum"]
                came.append(tuple(body["id"]))
                del body

        with ThreadPoolExecutor(2 * threads) as pool:
            futures = [pool.submit(receive) for _ in range(threads)]
            futures += [pool.submit(send, thread) for thread in range(threads)]
            for future in futures:
                future.result(2 * WAIT)
        assert sorted(came) == [(thread, number) for thread in range(threads) for number in range(each)]


def test_both_directions_at_once(front: transport.Endpoint) -> None:
    with serving(front, "peer", {"backend": "frames", "timeout": WAIT}), ThreadPoolExecutor(2) as pool:
        tensors = [noise(50_000 + n, n) for n in range(60)]

        def ask() -> None:
            for tensor in tensors:
                front.send({"do": "echo", "value": tensor}, to="peer")

        asking = pool.submit(ask)
        for tensor in tensors:
            assert same(front.receive().body["value"], tensor)
        asking.result(WAIT)


def test_nobody_sends_in_a_link_before_its_welcome(
    front: transport.Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a thread does that looks for new peers while another handles their greeting."""
    post = front._exchange._post

    def late(route: Any, message: Any) -> None:
        with pytest.raises(transport.PeerGone, match="no peer named 'near'"):
            pool.submit(front.try_send, {"n": 0}, to="near").result(WAIT)
        post(route, message)

    with ThreadPoolExecutor() as pool:
        monkeypatch.setattr(front._exchange, "_post", late)
        with joined(front, "near", FRAMES) as near:
            front.send({"n": 1})
            assert near.receive().body == {"n": 1}
            assert not near.statistics()["dropped"]


@pytest.mark.parametrize("call", ["connect", "listen"])
def test_an_address_is_not_used_any_more_once_another_thread_has_closed(
    address: str, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """A socket made after `close` took away the others is one that `close` waits for, without an end."""
    endpoint = transport.Endpoint("near", FRAMES)
    wire = endpoint._exchange.wire
    located = wire._located

    def late(*asked: Any, **how: Any) -> str:
        where = located(*asked, **how)  # which may take as long as the system's resolver
        pool.submit(endpoint.close).result(WAIT)
        return where

    with ThreadPoolExecutor() as pool:
        monkeypatch.setattr(wire, "_located", late)
        with pytest.raises(transport.Closed):
            getattr(endpoint, call)(address)


def test_who_dials_hears_of_an_answer_that_another_thread_handled(
    front: transport.Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where one thread receives and another connects: nothing is left then that would wake the latter."""
    near = transport.Endpoint("near", FRAMES)
    wait = near._exchange.wire.wait

    def handle() -> None:
        while not near.peers:
            front.statistics()
        near.statistics()  # also what woke whoever was asleep

    def late(left: float) -> None:
        pool.submit(handle).result(WAIT)
        wait(left)

    with ThreadPoolExecutor() as pool, near:
        monkeypatch.setattr(near._exchange.wire, "wait", late)
        connecting = pool.submit(near.connect, front.addresses[0], timeout=10 * WAIT)
        assert connecting.result(WAIT) == "front"


def test_a_link_whose_connection_ends_at_once_is_not_kept(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread handles the welcome and hears of the end just after who dials looked for an answer."""
    front, near = transport.listen(address, config=FRAMES), transport.Endpoint("near", FRAMES)
    departures = near._exchange.departures
    has_failed = departures.has_failed
    monkeypatch.setattr(front._exchange, "_say_goodbye", lambda: None)  # as who is killed

    def handle() -> None:
        while not front.peers:
            pass
        front.close()
        while not near.peers or not departures._suspects:
            near.statistics()

    def late(socket: int) -> bool:
        pool.submit(handle).result(WAIT)
        return has_failed(socket)

    with ThreadPoolExecutor() as pool, near, front:
        monkeypatch.setattr(departures, "has_failed", late)
        near.connect(address)
        left(near)


@pytest.mark.parametrize("moment", ["reads", "wants_offer"])
def test_a_peer_that_leaves_while_another_thread_offers_it_the_ring(
    address: str, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    config = transport.TransportConfig(backend="shm", ring_bytes=4 << 20, inline_below=1, timeout=WAIT)
    with transport.listen(address, config=config) as front, joined(front, "near", config) as near:
        sender = front._exchange.sender
        asked = getattr(sender.outbound, moment)
        calls = []

        def late(*arguments: Any) -> Any:
            answer = asked(*arguments)
            calls.append(arguments)
            if len(calls) == (1 if moment == "reads" else 3):  # it is offered, or its answer is waited for
                near.close()
                pool.submit(left, front).result(WAIT)
            return answer

        with ThreadPoolExecutor() as pool:
            monkeypatch.setattr(sender.outbound, moment, late)
            with pytest.raises(transport.PeerGone):
                front.send({"x": noise(300_000)}, to="near")
        outbound: Any = sender.outbound
        assert (sender.introductions._offers, outbound._offered) == ({}, {})


@pytest.mark.parametrize("backend", ["shm", "tcp"])
def test_two_threads_that_send_first_make_one_offer(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second one is refused, and with that a peer gave up the bulk connection that the first one made."""
    config = transport.TransportConfig(backend=backend, inline_below=1, timeout=WAIT)
    with transport.listen("tcp://127.0.0.1:0", config=config) as front, joined(front, "near", config) as near:
        sender = front._exchange.sender
        wants, tell = sender.introductions._wants_first, front._exchange.roster.links()[0].tell
        both = threading.Barrier(2)
        told = []

        def late(*arguments: Any) -> bool:
            wanted = wants(*arguments)
            if wanted:
                both.wait(WAIT)
            return wanted

        def counted(message: Any) -> bool:
            told.append(type(message).__name__)
            return tell(message)

        pumped = Pumped(near)
        with ThreadPoolExecutor() as pool:
            monkeypatch.setattr(sender.introductions, "_wants_first", late)
            monkeypatch.setattr(front._exchange.roster.links()[0], "tell", counted)
            sending = [pool.submit(front.send, {"x": noise(300_000)}, to="near") for _ in range(2)]
            for future in sending:
                future.result(WAIT)
        assert told.count("Offered") == 1
        for _ in range(2):
            pumped.next()
        pumped.stop()


# ------------------------------------------------------------------------------------ event loops


def is_readable(endpoint: transport.Endpoint, timeout: float = 0.0) -> bool:
    return bool(select.select([endpoint], [], [], timeout)[0])


def settle(endpoint: transport.Endpoint) -> None:
    """Handle whatever came, until the descriptor is quiet."""
    while is_readable(endpoint):
        assert endpoint.try_receive() is None


def test_the_descriptor_stays_readable_while_messages_are_left(
    front: transport.Endpoint, near: transport.Endpoint
) -> None:
    settle(near)
    front.send({"n": 1})
    front.send({"n": 2})
    assert is_readable(near, WAIT)
    deadline = time.monotonic() + WAIT
    while near.statistics()["received"].get("messages", 0) == 0:  # both have come by now, or come soon
        message = near.try_receive()
        assert message is not None or time.monotonic() < deadline
    for _ in range(3):
        assert is_readable(near, WAIT)  # one message is left, however often one looks
    assert near.receive().body == {"n": 2}
    settle(near)


def test_a_send_does_not_swallow_what_came(front: transport.Endpoint, near: transport.Endpoint) -> None:
    """Any operation on a zmq socket may swallow the edge of its descriptor."""
    link = near._exchange.roster.named("front")
    assert link is not None
    for number in range(10):
        settle(near)
        front.send({"n": number})
        assert is_readable(near, WAIT)
        for _ in range(3):
            assert link.reachable()  # sends, and looks at nothing that came
            time.sleep(0.002)  # zmq looks at its mailbox once in a millisecond when it sends
        assert is_readable(near, WAIT)  # for good, if it was swallowed, it is not
        assert near.receive().body == {"n": number}


def send_numbers(endpoint: transport.Endpoint, count: int) -> None:
    for number in range(count):
        endpoint.send({"n": number})


def test_in_an_epoll_loop(front: transport.Endpoint, near: transport.Endpoint) -> None:
    came: list[int] = []
    with select.epoll() as epoll, ThreadPoolExecutor(1) as pool:
        epoll.register(near, select.EPOLLIN)
        sending = pool.submit(send_numbers, front, 300)
        while len(came) < 300:
            assert epoll.poll(WAIT), "nothing came"
            message = near.try_receive()  # one at a time
            if message is not None:
                came.append(message.body["n"])
        sending.result(WAIT)
    assert came == list(range(300))


def test_several_waiters_of_an_event_loop(front: transport.Endpoint, near: transport.Endpoint) -> None:
    async def run() -> list[int]:
        waiters = [asyncio.create_task(near.receive_async(timeout=WAIT)) for _ in range(5)]
        await asyncio.sleep(0)
        for number in range(5):
            await front.send_async({"n": number})
        return sorted([(await waiter).body["n"] for waiter in waiters])

    assert asyncio.run(run()) == list(range(5))


def test_cancelling_loses_no_message(front: transport.Endpoint, near: transport.Endpoint) -> None:
    async def run() -> list[int]:
        came: list[int] = []
        sent = 0
        while len(came) < 60:
            waiter = asyncio.create_task(near.receive_async(timeout=WAIT))
            await asyncio.sleep(0)
            if sent < 60:
                front.send({"n": sent})
                sent += 1
            for _ in range(sent % 4):
                await asyncio.sleep(0)
            waiter.cancel()
            try:
                came.append((await waiter).body["n"])
            except asyncio.CancelledError:
                if sent == 60:
                    came.append((await near.receive_async(timeout=WAIT)).body["n"])
        return came

    assert asyncio.run(run()) == list(range(60))


def test_a_timeout_in_an_event_loop(near: transport.Endpoint) -> None:
    with pytest.raises(transport.Timeout, match=r"received nothing in \S+ s; "):
        asyncio.run(near.receive_async(timeout=0.05))


def test_the_loop_goes_on_and_hears_of_the_end(front: transport.Endpoint, near: transport.Endpoint) -> None:
    async def run() -> int:
        waiter = asyncio.create_task(near.receive_async(timeout=WAIT))
        turns = 0
        for _ in range(5):
            await asyncio.sleep(0.001)
            turns += 1
        front.close()
        with pytest.raises(transport.PeerGone, match="'front' said goodbye"):
            await waiter
        return turns

    assert asyncio.run(run()) == 5


# ------------------------------------------------------------------------------------ fork


def test_in_a_forked_child_every_call_is_closed(front: transport.Endpoint, near: transport.Endpoint) -> None:
    calls: list[Any] = [
        lambda: front.send({}),
        lambda: front.receive(timeout=1),
        front.try_receive,
        front.statistics,
        front.fileno,
    ]
    pid = os.fork()
    if not pid:
        failures = len(calls)
        try:
            for call in calls:
                try:
                    call()
                except transport.Closed as error:
                    failures -= f"made in process {os.getppid()}" in str(error)
            front.close()  # does nothing here
        finally:
            os._exit(failures)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    front.send({"n": 1})
    assert near.receive().body == {"n": 1}


# ------------------------------------------------------------------------------------ leaving in order


def _sends_and_leaves(address: str, messages: int, linger: float) -> None:
    config = transport.TransportConfig(backend="inline", max_queued_messages=messages, linger=linger)
    with transport.connect(address, name="near", config=config, timeout=WAIT) as near:
        for number in range(messages):
            near.send({"number": number})


@pytest.mark.parametrize("scheme", ["ipc", "tcp"])
def test_who_closes_waits_until_what_it_sent_can_be_read(address: str, scheme: str) -> None:
    """zmq at the other end reads 128 messages ahead, and nothing more once the connection has ended."""
    messages = 400
    config = transport.TransportConfig(backend="inline", max_queued_messages=messages, timeout=WAIT)
    with transport.listen(address if scheme == "ipc" else "tcp://127.0.0.1:0", config=config) as front:
        with ThreadPoolExecutor(1) as pool:
            leaving = pool.submit(_sends_and_leaves, front.addresses[0], messages, WAIT)
            front.wait_for_peers({"near"}, timeout=WAIT)
            time.sleep(0.5)  # this endpoint is busy
            came = [front.receive().body["number"] for _ in range(messages)]
            leaving.result(WAIT)
        assert came == list(range(messages))
        assert front.try_receive() is None
        left(front)
        assert front.statistics()["left"] == {"near": "said goodbye"}


def test_who_closes_does_not_wait_for_ever_and_says_what_was_not_read(
    address: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = transport.TransportConfig(backend="inline", max_queued_messages=200, timeout=WAIT)
    with transport.listen(address, config=config) as front, ThreadPoolExecutor(1) as pool:
        leaving = pool.submit(_sends_and_leaves, front.addresses[0], 200, 0.2)
        front.wait_for_peers({"near"}, timeout=WAIT)
        leaving.result(WAIT)
    assert re.search(r"closed before it was read .* 'front' \(pid \d+\) .* 200 messages", caplog.text)


def _answers_and_leaves(address: str, messages: list[int]) -> None:
    config = transport.TransportConfig(backend="frames", max_queued_messages=200, linger=WAIT, timeout=WAIT)
    with transport.connect(address, name="near", config=config, timeout=WAIT) as near:
        for answers in messages:
            near.receive()
            time.sleep(0.5)  # until all has been sent, and the other side does nothing more
            for _ in range(answers):
                near.send({"n": near.receive(copy=True).body["n"]})


@pytest.mark.parametrize("before", [20, 36, 52])
def test_acknowledgements_count_among_what_the_other_side_reads_ahead(address: str, before: int) -> None:
    """Each large message is acknowledged at once, so that the reader has two messages to read for each."""
    config = transport.TransportConfig(backend="frames", max_queued_messages=200, timeout=WAIT)
    with transport.listen(address, config=config) as front, ThreadPoolExecutor(1) as pool:
        leaving = pool.submit(_answers_and_leaves, address, [before, 60])
        front.wait_for_peers({"near"}, timeout=WAIT)
        front.send({"go": "on"})
        for number in range(before):  # zmq counts what it reads ahead from here
            front.send({"n": number, "x": noise(300_000)})
            assert front.receive().body == {"n": number}
        front.send({"go": "on"})
        for number in range(60):
            front.send({"n": number, "x": noise(300_000)})
        time.sleep(1.5)  # this endpoint is busy
        assert [front.receive().body["n"] for _ in range(60)] == list(range(60))
        leaving.result(WAIT)


def _takes_one(address: str) -> None:
    with transport.connect(address, name="near", config=FRAMES, timeout=WAIT) as near:
        near.receive()
        time.sleep(WAIT)


def test_who_closes_does_not_wait_for_the_dead(address: str, caplog: pytest.LogCaptureFixture) -> None:
    config = transport.TransportConfig(backend="inline", max_queued_messages=200, timeout=WAIT, linger=WAIT)
    with running(_takes_one, address) as near, transport.listen(address, config=config) as front:
        front.wait_for_peers({"near"}, timeout=WAIT)
        for number in range(200):
            front.send({"number": number})
        near.kill()
    assert "closed before it was read" not in caplog.text


def test_an_interrupted_close_gives_everything_back(address: str, short_path: Path) -> None:
    config = transport.TransportConfig(backend="shm", max_queued_messages=200, timeout=WAIT, linger=WAIT)
    front = transport.listen(address, config=config)
    with running(_takes_one, address):
        front.wait_for_peers({"near"}, timeout=WAIT)
        for _ in range(200):
            front.send({"x": noise(100_000)})
        wait = front._exchange.wire.wait

        def interrupted(timeout: float) -> None:
            signal.setitimer(signal.ITIMER_REAL, 0.05)  # not before it waits: else nothing would be closed
            wait(timeout)

        front._exchange.wire.wait = interrupted  # type: ignore[method-assign]
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        try:
            with pytest.raises(KeyboardInterrupt):
                front.close()
        finally:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
    assert list(short_path.iterdir()) == []
