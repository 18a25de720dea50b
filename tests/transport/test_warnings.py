"""Whoever keeps a send waiting is named in the log: what it holds, since when, and not too often."""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch

import transport
from tests.crash.harness import is_stuffed, until
from transport.conformance import (
    WAIT,
    Pumped,
    acknowledged,
    digest,
    joined,
    left,
    noise,
    running,
    serve,
    serving,
)
from transport.message import Abandon
from transport.waiting import RateLimit, Wait

MIB = 1 << 20
LOGGER = "tensorferry.transport"


def quick(backend: str = "shm", **changes: Any) -> transport.TransportConfig:
    """A small ring, and warnings after 50 ms."""
    fields = {"ring_bytes": 8 * MIB, "detour_bytes": 4 * MIB, "timeout": WAIT, "admission_timeout": WAIT}
    return transport.TransportConfig(backend=backend, warn_after=0.05, **{**fields, **changes})


class Said(logging.Handler):
    """The warnings of the transport, and an event that is set when there is one."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []
        self.came = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
        self.came.set()

    def one(self) -> str:
        """The next warning; fails after `WAIT`."""
        assert self.came.wait(WAIT), "nothing was said"
        return self.lines[-1]


@pytest.fixture
def said() -> Iterator[Said]:
    handler, logger = Said(), logging.getLogger(LOGGER)
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


@contextmanager
def in_thread(call: Callable[[], object]) -> Iterator[None]:
    """Runs a call that must come back in the end without an error."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(call)
        yield
        future.result(WAIT)


def test_a_stopped_peer_is_named_with_what_it_has_not_acknowledged(address: str, said: Said) -> None:
    options = {"backend": "shm", "ring_bytes": 8 * MIB, "timeout": WAIT}
    with transport.listen(address, config=quick()) as front, serving(front, "tp0", options) as process:
        front.send({"do": "sum", "value": noise(MIB)}, to="tp0")
        assert front.receive().body == digest(noise(MIB))
        until(lambda: front.peers[0].held == transport.Held(0, 0, 0.0), "it has let go of what it read")
        assert process.pid is not None
        os.kill(process.pid, signal.SIGSTOP)
        for _ in range(3):
            front.send({"do": "sum", "value": noise(MIB)}, to="tp0")
        assert said.lines == []
        with in_thread(lambda: front.send({"do": "sum", "value": noise(2 * MIB)}, to="tp0")):
            line = said.one()
            (info,) = front.peers
            slow = front.statistics()["slow"]
            os.kill(process.pid, signal.SIGCONT)
        pattern = (
            rf"a send of {2 * MIB} bytes has waited \d+\.\d s for room: 'tp0' \(pid {process.pid}\) at ipc://.*"
            rf" has not acknowledged \d messages \({3 * MIB} bytes\), the oldest \d+\.\d s old;"
            rf" it holds 3 records \({3 * MIB} bytes\)"
        )
        assert re.fullmatch(pattern, line), line
        assert info.slow
        assert info.oldest >= 0.05
        assert info.held == transport.Held(3, 3 * MIB, 0.0)
        assert list(slow) == ["tp0"]
        assert slow["tp0"] >= info.oldest
        assert [front.receive().body for _ in range(4)][-1] == digest(noise(2 * MIB))
        front.send({"do": "sum", "value": noise(5)}, to="tp0")
        front.receive()
        assert not front.peers[0].slow
        assert front.peers[0].oldest == 0.0
        assert front.statistics()["slow"] == {}


def test_a_peer_that_keeps_views_is_named_though_it_acknowledges(address: str, said: Said) -> None:
    """Another peer is sent to; the one that has the ring is told of."""
    config = quick(peer_share=1.0)
    with (
        transport.listen(address, config=config) as front,
        joined(front, "hoarder", config) as hoarder,
        joined(front, "eager", config) as eager,
    ):
        keeping, taking = Pumped(hoarder), Pumped(eager)
        front.send({"x": noise(6 * MIB)}, to="hoarder")
        held = [keeping.next()]
        with in_thread(lambda: front.send({"x": noise(4 * MIB)}, to="eager")):
            line = said.one()
            held.clear()
        assert line.startswith(f"a send of {4 * MIB} bytes has waited")
        assert f"for room: 'hoarder' (pid {os.getpid()})" in line
        assert re.search(rf"holds 1 records \({6 * MIB} bytes\), the oldest open for \d+\.\d s", line)
        assert len(said.lines) == 1
        taking.next()
        keeping.stop()
        taking.stop()


def test_who_holds_something_and_is_not_waited_for_is_not_named(address: str, said: Said) -> None:
    config = quick()
    with (
        transport.listen(address, config=config) as front,
        joined(front, "near", config) as near,
        joined(front, "other", config) as other,
    ):
        here, there = Pumped(near), Pumped(other)
        for name in ("near", "other"):
            front.send({"x": noise(3 * MIB)}, to=name)
        held = [here.next(), there.next()]
        with in_thread(lambda: front.send({"x": noise(2 * MIB)}, to="near")):  # its share is 4 MiB
            line = said.one()
            held.clear()
        assert "for room: 'near'" in line
        assert len(said.lines) == 1
        here.stop()
        there.stop()


def test_a_loan_that_waits_says_who_has_the_ring(address: str, said: Said) -> None:
    config = quick(peer_share=1.0)
    with transport.listen(address, config=config) as front, joined(front, "near", config) as near:
        pumped = Pumped(near)
        front.send({"x": noise(6 * MIB)})
        held = [pumped.next()]

        def borrow() -> None:
            with front.loan((4 * MIB,), torch.uint8):
                pass

        with in_thread(borrow):
            line = said.one()
            held.clear()
        assert "for room for a loan: 'near'" in line
        pumped.stop()


@pytest.mark.parametrize("backend", ["inline", "frames"])
def test_a_budget_that_is_used_up_names_who_used_it(address: str, said: Said, backend: str) -> None:
    config = quick(backend, detour_bytes=MIB)
    with transport.listen(address, config=config) as front, joined(front, "near", config) as near:
        front.send({"x": noise(MIB // 2)})
        front.send({"x": noise(MIB // 2)})
        with in_thread(lambda: front.send({"x": noise(MIB // 2)})):
            line = said.one()
            pumped = Pumped(near)
            for _ in range(3):
                pumped.next()
        assert re.search(rf"for room: 'near' .* has not acknowledged \d messages \({MIB} bytes\)", line)
        assert "holds" not in line
        pumped.stop()


def test_a_full_window_names_who_does_not_read(address: str, said: Said) -> None:
    config = quick("inline", max_queued_messages=2)
    with transport.listen(address, config=config) as front, joined(front, "near", config) as near:
        for number in range(2):
            front.send({"n": number})
        with in_thread(lambda: front.send({"n": 2})):
            line = said.one()
            pumped = Pumped(near)
            assert [pumped.next().body["n"] for _ in range(3)] == [0, 1, 2]
        assert re.search(r"for a place in the queue: 'near' .* has not acknowledged 2 messages", line)
        pumped.stop()


def test_a_peer_that_does_not_answer_the_offer_is_named_once(address: str, said: Said) -> None:
    config = quick("auto", admission_timeout=0.05)
    with transport.listen(address, config=config) as front, joined(front, "near", config):
        for _ in range(3):  # nobody pumps the other side
            front.send({"x": noise(MIB)})
        assert len(said.lines) == 1
        expected = (
            "a send waited 0.05 s, and goes on without, for the answer to the offer of the ring: 'near'"
        )
        assert said.lines[0].startswith(expected)
        detours = front.statistics()["backend"]["detours"]
        assert detours == {
            "not shm yet: the peer has not answered the offer": {"messages": 3, "nbytes": 3 * MIB}
        }


def test_a_receive_that_times_out_names_whom_it_waited_for(address: str) -> None:
    config = quick("inline")
    with transport.listen(address, config=config) as front:
        with pytest.raises(transport.Timeout, match="it waited for somebody to connect"):
            front.receive(timeout=0.01)
        with (
            joined(front, "near", config),
            pytest.raises(transport.Timeout, match=rf"'near' \(pid {os.getpid()}\) at .* linked for \d"),
        ):
            front.receive(timeout=0.01)


def test_who_waits_is_told_who_was_there_and_died(address: str) -> None:
    config = quick("inline")
    died = r"left: 'r' is gone: the connection ended \d+\.\d s ago"
    with transport.listen(address, config=config) as front:
        with running(serve, address, "r", {"backend": "inline"}):
            front.wait_for_peers("r", timeout=WAIT)
        left(front)  # killed by now
        with pytest.raises(transport.Timeout, match=f"it waited for somebody to connect; {died}$"):
            front.receive(timeout=0.01)
        for peers in (1, "r", {"r"}):
            with pytest.raises(
                transport.Timeout, match=f"waited 0.01 s for (r|1 peers); linked: nobody; {died}$"
            ):
                front.wait_for_peers(peers, timeout=0.01)
        with joined(front, "near", config):
            with pytest.raises(transport.Timeout, match=rf"waited for 'near' .* linked for \S+ s; {died}$"):
                front.receive(timeout=0.01)
            with pytest.raises(transport.Timeout, match="waited 0.01 s for other; linked: 'near'") as caught:
                front.wait_for_peers({"near", "other"}, timeout=0.01)
            assert "left" not in str(caught.value)  # nobody of that name
    with pytest.raises(transport.Closed, match="endpoint 'front' is closed"):
        front.account("near")


def test_of_many_who_left_the_last_are_named(address: str) -> None:
    config = quick("inline")
    with transport.listen(address, config=config) as front:
        for number in range(12):
            with joined(front, f"r{number}", config):
                pass
        left(front)
        with pytest.raises(transport.Timeout) as caught:
            front.receive(timeout=0.01)
    text = str(caught.value)
    assert re.findall(r"'(r\d+)' said goodbye", text) == [f"r{number}" for number in range(11, 3, -1)]
    assert text.endswith("; and 4 more")


def account(name: str, messages: int, records: int) -> str:
    """What is told of a peer of this process that has neither acknowledged nor let go of so many MiB."""
    return (
        rf"'{name}' \(pid {os.getpid()}\) at ipc://\S+ has not acknowledged {messages} messages"
        rf" \({messages * MIB} bytes\), the oldest \d+\.\d s old;"
        rf" it holds {records} records \({records * MIB} bytes\), the oldest open for \d+\.\d s"
    )


@contextmanager
def keeping(address: str, **changes: Any) -> Iterator[transport.Endpoint]:
    """A front whose peer `near` has one record open and another on its way, of a MiB each."""
    config = quick(**changes)
    with transport.listen(address, config=config) as front, joined(front, "near", config) as near:
        pumped = Pumped(near)
        front.send({"x": noise(MIB)})
        held = [pumped.next()]
        acknowledged(front)
        pumped.stop()
        front.send({"x": noise(MIB)})
        yield front
        held.clear()


def test_a_receive_that_times_out_says_what_who_is_linked_holds(address: str) -> None:
    with keeping(address) as front, pytest.raises(transport.Timeout) as caught:
        front.receive(timeout=0.01)
    pattern = (
        rf"'front' received nothing in 0.01 s; it waited for {account('near', 1, 2)}; linked for \d+\.\d s"
    )
    assert re.fullmatch(pattern, str(caught.value))


def test_who_waits_for_peers_is_told_what_those_that_came_hold(address: str) -> None:
    with keeping(address) as front, pytest.raises(transport.Timeout) as caught:
        front.wait_for_peers({"near", "far"}, timeout=0.01)
    assert re.fullmatch(
        rf"waited 0.01 s for far; linked: {account('near', 1, 2)}; linked for \d+\.\d s", str(caught.value)
    )


def test_a_loan_for_which_there_is_no_room_says_who_has_it(address: str) -> None:
    with (
        keeping(address) as front,
        pytest.raises(transport.Full) as caught,
        front.loan((7 * MIB,), torch.uint8, timeout=0.01),
    ):
        pass
    holder = rf"near \(pid {os.getpid()}\) holds 2 records \(2 MiB\), the oldest open for \d+\.\d s"
    assert re.search(rf"; {holder}; 'near' .* has not acknowledged 1 messages", str(caught.value))


def test_a_send_for_which_there_is_no_room_says_who_has_it(address: str) -> None:
    with keeping(address) as front:
        for room in (3 * MIB, 4 * MIB):  # of its share, which is 4 MiB
            with pytest.raises(transport.Full, match=account("near", 1, 2)):
                front.send({"x": noise(room)}, timeout=0.01)


def test_a_window_that_is_used_up_says_what_the_peer_holds(address: str) -> None:
    with keeping(address, max_queued_messages=1) as front, pytest.raises(transport.Full) as caught:
        front.send({"small": 1}, timeout=0.01)
    assert re.fullmatch(rf"max_queued_messages \(1\) is used up; {account('near', 1, 2)}", str(caught.value))


def test_a_queue_that_is_full_says_what_the_peer_holds(address: str) -> None:
    with keeping(address) as front:
        (link,) = front._exchange.roster.links()
        until(partial(is_stuffed, partial(link.tell, Abandon(link.peer.link, 1, 0))), "nobody reads these")
        with pytest.raises(transport.Full) as caught:
            front.send({"small": 1}, timeout=0.01)
    assert re.fullmatch(rf"the queue to 'near' is full; {account('near', 1, 2)}", str(caught.value))


def test_a_hundred_of_a_kind_are_one_line_and_the_next_says_so() -> None:
    limit, lines = RateLimit(seconds=1e9), list[str]()
    for number in range(100):
        limit.tell(lines.append, f"something {number}", "kind")
    limit.tell(lines.append, "something else", "other kind")
    limit._seconds = 0
    limit.tell(lines.append, "again", "kind")
    assert lines == ["something 0", "something else", "again (99 more such warnings left out)"]


def test_one_of_a_kind_passes_and_the_rest_are_counted() -> None:
    limit = RateLimit(seconds=1e9)
    assert limit.left_out("near", "room") == 0
    assert limit.left_out("near", "room") is None
    assert limit.left_out("near", "queue") == 0
    assert limit.left_out("far", "room") == 0
    always = RateLimit(seconds=0)
    assert [always.left_out("near", "room") for _ in range(3)] == [0, 0, 0]
    limit._seconds = 0
    assert limit.left_out("near", "room") == 1
    assert limit.left_out("near", "room") == 0


def test_what_passed_long_ago_is_forgotten_before_memory_grows() -> None:
    limit = RateLimit(seconds=1e9)
    for number in range(3000):
        assert limit.left_out(f"peer {number}", "room") == 0
    assert len(limit._passed) == 1024
    assert limit.left_out("peer 2999", "room") is None


def test_a_wait_tells_once_it_is_long_and_polls_each_time() -> None:
    polled: list[int] = []
    told: list[float] = []
    short = Wait(lambda: polled.append(1), 1e9, told.append)
    short()
    assert (len(polled), told) == (1, [])
    long = Wait(lambda: polled.append(1), 0.0, told.append)
    long()
    long()
    assert len(polled) == 3
    assert len(told) == 1
    assert told[0] >= 0


def test_who_is_waited_for_is_asked_once(address: str) -> None:
    """A second asking would tell a stopped peer nothing, and take a place in the queue."""
    config = transport.TransportConfig(backend="inline", timeout=WAIT)
    with transport.listen(address, config=config) as front, joined(front, "silent", config) as silent:
        link = front._exchange.roster.named("silent")
        assert link is not None
        link.ping()
        assert link.unacknowledged == 0  # nothing to ask for
        for number in (1, 2):
            front.send({"x": noise(10)})
            for _ in range(3):
                link.ping()
            assert link.unacknowledged == 2 * number
            assert f"has not acknowledged {number} messages ({10 * number} bytes)" in link.overdue()
        for _ in range(2):
            silent.receive()
        silent.try_receive()  # takes what is behind the messages, and says so
        deadline = time.monotonic() + WAIT
        while link.unacknowledged:
            assert time.monotonic() < deadline, link.overdue()
            front.try_receive()
