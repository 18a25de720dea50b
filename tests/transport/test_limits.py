"""What happens at the limits: detours, shares of peers, messages in parts, a small /dev/shm."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import transport
from transport.backends.frames import FramesOutbound
from transport.conformance import WAIT, Pumped, digest, joined, noise, same, serving
from transport.sources import Source

MIB = 1 << 20


def small(backend: str = "auto", **changes: Any) -> transport.TransportConfig:
    fields = {"ring_bytes": 8 * MIB, "detour_bytes": 4 * MIB, "timeout": WAIT, "admission_timeout": WAIT}
    return transport.TransportConfig(backend=backend, **{**fields, **changes})


# ------------------------------------------------------------------------------------ detours


def test_a_full_ring_is_passed_by_and_counted_until_the_budget_is_used_up(address: str) -> None:
    config = small(detour_after=0.01)
    with transport.listen(address, config=config) as front, joined(front, "near", config) as near:
        pumped = Pumped(near)
        held = []
        for seed in range(3):
            front.send({"x": noise(MIB, seed)})
            held.append(pumped.next())  # 3 of the 4 MiB that one peer may hold
        assert front.statistics()["backend"]["detours"] == {}
        assert "shm: the peer proved" in front.peers[0].backend
        for seed in range(3, 6):
            front.send({"x": noise(2 * MIB, seed)})
            held.append(pumped.next())
        detours = front.statistics()["backend"]["detours"]
        assert detours == {"ring full (share)": {"messages": 3, "nbytes": 6 * MIB}}
        pumped.stop()
        front.send({"x": noise(2 * MIB)})  # nobody takes these
        front.send({"x": noise(2 * MIB - 5)})
        with pytest.raises(
            transport.Full, match="near has 4194299 bytes unacknowledged; .* detour_bytes"
        ) as caught:
            front.send({"x": noise(2 * MIB)}, timeout=0.1)
        assert list(caught.value.failed) == ["near"]
        for seed, message in enumerate(held):
            assert same(message.body["x"], noise(MIB if seed < 3 else 2 * MIB, seed))
        del held, message
        for _ in range(2):
            near.receive()
        near.try_receive()
        before = front.statistics()["backend"]["nbytes"]["shm"]
        front.send({"x": noise(MIB)})
        assert front.statistics()["backend"]["nbytes"]["shm"] == before + MIB  # room again, and no detour


def test_a_message_that_no_detour_can_carry_waits_for_the_ring(address: str) -> None:
    config = small(detour_bytes=MIB, peer_share=1.0, detour_after=0.0)
    with transport.listen(address, config=config) as front, joined(front, "near", config) as near:
        pumped = Pumped(near)
        front.send({"x": noise(5 * MIB)})
        held = pumped.next()
        with pytest.raises(transport.Full, match="the ring of 8 MiB"):  # and not: TooLarge
            front.send({"x": noise(5 * MIB)}, timeout=0.1)
        with ThreadPoolExecutor(1) as pool:
            sending = pool.submit(front.send, {"x": noise(5 * MIB, 2)})
            del held
            sending.result(WAIT)
        assert same(pumped.next().body["x"], noise(5 * MIB, 2))
        pumped.stop()


def test_a_stopped_peer_holds_its_share_and_no_more(address: str) -> None:
    config = small()
    options = {"backend": "auto", "ring_bytes": 8 * MIB, "timeout": WAIT}
    with transport.listen(address, config=config) as front, serving(front, "stopped", options) as process:
        front.send({"do": "sum", "value": noise(MIB)}, to="stopped")
        assert front.receive().body == digest(noise(MIB))
        with joined(front, "near", config) as near:
            pumped = Pumped(near)
            front.send({"x": noise(MIB)}, to="near")
            pumped.next()
            assert process.pid is not None
            os.kill(process.pid, signal.SIGSTOP)
            sent = 0
            while True:
                try:
                    front.try_send({"do": "sum", "value": noise(MIB)}, to="stopped")
                    sent += 1
                except transport.Full:
                    break
            before = front.statistics()["backend"]["nbytes"]["shm"]
            for turn in range(10):
                front.send({"x": noise(MIB, turn)}, to="near", timeout=5)
                assert same(pumped.next().body["x"], noise(MIB, turn))
            assert (
                front.statistics()["backend"]["nbytes"]["shm"] == before + 10 * MIB
            )  # all of it by the ring
            os.kill(process.pid, signal.SIGCONT)
            assert [front.receive().body for _ in range(sent)] == [digest(noise(MIB))] * sent
            pumped.stop()


# ------------------------------------------------------------------------------------ parts


@pytest.mark.parametrize("backend", ["shm", "frames"])
def test_parts_need_no_more_than_the_limits(address: str, backend: str) -> None:
    config = small(backend)
    with transport.listen(address, config=config) as front, joined(front, "near", config) as near:
        pumped = Pumped(near)
        sent = [noise(11 * MIB, 1), noise(6 * MIB, 2).view(2, -1).T]
        front.send({"x": sent, "n": 1})
        body = pumped.next().body
        assert body["n"] == 1
        assert all(same(one, other) for one, other in zip(body["x"], sent, strict=True))
        if backend == "shm":
            assert front.statistics()["backend"]["ring"].high_water <= 8 * MIB
        assert front.statistics()["sent"]["messages in parts"] == 1
        pumped.stop()


def test_other_messages_may_pass_between_parts(address: str) -> None:
    config = small("frames")
    with transport.listen(address, config=config) as front, joined(front, "near", config) as near:
        pumped = Pumped(near)
        stop = threading.Event()

        def chat() -> int:
            count = 0
            while not stop.is_set():
                front.send({"n": count, "x": noise(10)})
                count += 1
            return count

        with ThreadPoolExecutor(1) as pool:
            chatting = pool.submit(chat)
            for seed in range(3):
                front.send({"large": noise(9 * MIB, seed)})
            stop.set()
            count = chatting.result(WAIT)
        bodies = [pumped.next().body for _ in range(count + 3)]
        pumped.stop()
        assert [body["n"] for body in bodies if "n" in body] == list(range(count))
        large = [body["large"] for body in bodies if "large" in body]
        assert all(same(tensor, noise(9 * MIB, seed)) for seed, tensor in enumerate(large))
        assert len(large) == 3


def test_several_threads_send_in_parts(address: str) -> None:
    config = small("frames")
    with transport.listen(address, config=config) as front, joined(front, "near", config) as near:
        pumped = Pumped(near)
        with ThreadPoolExecutor(2) as pool:
            futures = [pool.submit(front.send, {"seed": n, "x": noise(5 * MIB, n)}) for n in range(4)]
            for future in futures:
                future.result(WAIT)
        for _ in range(4):
            body = pumped.next().body
            assert same(body["x"], noise(5 * MIB, body["seed"]))
        pumped.stop()


class Fails(Exception):
    pass


def test_a_part_that_fails_abandons_the_message(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small("frames")
    with transport.listen(address, config=config) as front, joined(front, "near", config) as near:
        pumped = Pumped(near)
        put, count = FramesOutbound.put, [0]

        def third_fails(self: FramesOutbound, *arguments: Any, **options: Any) -> Any:
            count[0] += 1
            if count[0] == 3:
                raise Fails
            return put(self, *arguments, **options)

        monkeypatch.setattr(FramesOutbound, "put", third_fails)
        with pytest.raises(Fails):
            front.send({"x": noise(9 * MIB)})
        front.send({"n": 1})
        assert pumped.next().body == {"n": 1}
        assert (
            near._exchange.receiver._assemblies == {}
        )  # the half that came is given up, not kept for a next one
        front.send({"x": noise(9 * MIB, 2)})
        assert same(pumped.next().body["x"], noise(9 * MIB, 2))
        pumped.stop()
        assert near.statistics()["received"].get("refused", 0) == 0


def test_a_part_that_is_too_late_is_full_and_the_next_message_goes(address: str) -> None:
    config = small("frames")
    with transport.listen(address, config=config) as front, joined(front, "near", config) as near:
        with pytest.raises(transport.Full, match="near has .* bytes unacknowledged"):
            front.send({"x": noise(9 * MIB)}, timeout=0.1)  # nobody takes the parts
        pumped = Pumped(near)
        front.send({"x": noise(9 * MIB, 2)})
        assert same(pumped.next().body["x"], noise(9 * MIB, 2))
        pumped.stop()


def test_a_failing_source_takes_nothing(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small("frames")
    with transport.listen(address, config=config) as front, joined(front, "near", config) as near:

        def fail(self: Source, *arguments: Any, **options: Any) -> None:
            raise Fails

        with monkeypatch.context() as patch:
            patch.setattr(Source, "fill", fail)
            for _ in range(20):
                with pytest.raises(Fails):
                    front.send({"x": noise(MIB)})
        front.try_send({"x": noise(2 * MIB)})
        assert same(near.receive().body["x"], noise(2 * MIB))


# ------------------------------------------------------------------------------------ no answer


def test_who_does_not_answer_an_offer_delays_one_message_and_gets_one_offer(address: str) -> None:
    config = small(admission_timeout=0.3)
    with transport.listen(address, config=config) as front, joined(front, "near", config) as near:
        told: list[str] = []
        link = front._exchange.roster.named("near")
        assert link is not None
        tell = link.tell

        def noted(message: Any) -> bool:
            told.append(type(message).__name__)
            return tell(message)

        link.tell = noted  # type: ignore[method-assign]  # counts what really goes out
        for _ in range(12):
            front.send({"x": noise(100_000)})
        assert told.count("Offered") == 1
        detours = front.statistics()["backend"]["detours"]
        assert detours == {
            "not shm yet: the peer has not answered the offer": {"messages": 12, "nbytes": 1_200_000}
        }
        for _ in range(12):
            assert same(near.receive().body["x"], noise(100_000))
        while "proved" not in front.peers[0].backend:  # the suite's timeout is the limit
            near.try_receive()  # answers
        front.send({"x": noise(100_000)})
        assert front.statistics()["backend"]["nbytes"]["shm"] == 100_000
        near.receive()


def test_a_peer_without_that_backend_is_told_apart(address: str) -> None:
    shm_only = small("shm")
    with transport.listen(address, config=shm_only) as front, joined(front, "near", small("frames")) as near:
        link = front._exchange.roster.named("near")
        assert link is not None
        link.accepts = frozenset({"inline", "frames"})
        with pytest.raises(transport.Full, match="not shm: the peer does not read shm"):
            front.send({"x": noise(100_000)})
        front.send({"n": 1})
        assert near.receive().body == {"n": 1}


# ------------------------------------------------------------------------------------ a small /dev/shm

_IN_SMALL = """
import logging, sys, transport
logging.basicConfig(format="LOG %(message)s")
from transport.conformance import joined, noise, same, Pumped, WAIT
backend, address = sys.argv[1:]
config = transport.TransportConfig(backend=backend, ring_bytes=256 << 20, timeout=WAIT)
with transport.listen(address, config=config) as front, joined(front, "near", config) as near:
    pumped = Pumped(near)
    for seed in range(3):
        try:
            front.send({"x": noise(1 << 20, seed)}, timeout=5)
        except transport.TransportError as error:
            print(type(error).__name__, error)
        else:
            print(same(pumped.next().body["x"], noise(1 << 20, seed)), front.peers[0].backend)
    pumped.stop()
"""


def in_small_shared_memory(backend: str, address: str) -> subprocess.CompletedProcess[str]:
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("needs root and unshare for a /dev/shm of 16 MiB")
    mount = 'mount -t tmpfs -o size=16m tmpfs /dev/shm && exec "$@"'
    command = [
        "unshare",
        "--mount",
        "sh",
        "-c",
        mount,
        "sh",
        sys.executable,
        "-c",
        _IN_SMALL,
        backend,
        address,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=4 * WAIT, check=False)
    if "unshare failed" in done.stderr or "permission denied" in done.stderr:
        pytest.skip(f"a /dev/shm of one's own is not allowed here: {done.stderr.strip()}")
    assert not done.returncode, done.stderr
    return done


def test_shm_alone_says_how_much_is_there(address: str) -> None:
    done = in_small_shared_memory("shm", address)
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    for line in lines:
        assert line.startswith("Full ")
        assert "256" in line
        assert "16" in line
        assert "/dev/shm" in line
        assert len(line) < 900


def test_auto_goes_on_with_frames_and_says_so_once(address: str) -> None:
    done = in_small_shared_memory("auto", address)
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    for line in lines:
        assert line.startswith("True frames; not shm: ")
        assert "/dev/shm" in line
    said = [
        line for line in done.stderr.splitlines() if line.startswith("LOG going on without shared memory")
    ]
    assert len(said) == 1


def test_nothing_is_said_where_all_is_well(address: str, caplog: pytest.LogCaptureFixture) -> None:
    config = small()
    with (
        caplog.at_level(logging.WARNING),
        transport.listen(address, config=config) as front,
        joined(front, "near", config) as near,
    ):
        pumped = Pumped(near)
        front.send({"x": np.ones(100_000)})
        pumped.next()
        pumped.stop()
    assert not caplog.records
