"""Whatever comes in at a socket: dropped and counted, or the link ends with a reason; the endpoint lives."""

from __future__ import annotations

import dataclasses
import os
import random
import re
import resource
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import msgspec
import numpy as np
import pytest
import zmq

import shm
import transport
from shm import layout as at
from shm import memory
from tests.crash.harness import is_stuffed
from transport import message as wire_types
from transport.conformance import WAIT, joined, mutated, noise, same
from transport.tensors import TensorSpec
from transport.wire import FRAME_BYTES, Arrived, Route

CONFIG = transport.TransportConfig(
    backend="frames",
    timeout=WAIT,
    max_control_bytes=100_000,
    detour_bytes=1 << 20,
    max_queued_messages=50,
    max_queued_bytes=500_000,
)


@pytest.fixture
def front(address: str) -> Iterator[transport.Endpoint]:
    with transport.listen(address, config=CONFIG) as endpoint:
        yield endpoint


class Raw:
    """A socket that says what no endpoint would."""

    def __init__(self, front: transport.Endpoint, socket: zmq.Socket[bytes]) -> None:
        self._front = front
        self._socket = socket
        self.link = 0

    def say(self, *frames: bytes | wire_types.Control) -> None:
        self._socket.send_multipart(
            [frame if isinstance(frame, bytes) else wire_types.encode(frame) for frame in frames]
        )

    def refused(self, offer: shm.Offer) -> str:
        """Why a ring that is offered so is not read."""
        self.say(wire_types.Offered(self.link, "shm", msgspec.msgpack.encode(list(offer))))
        answer = self.hear()
        assert isinstance(answer, wire_types.Answered)
        assert answer.proof is None
        return answer.reason

    def hear(self) -> wire_types.Control:
        """The next control message from the endpoint, which is pumped meanwhile."""
        deadline = time.monotonic() + WAIT
        while not self._socket.poll(2):
            assert time.monotonic() < deadline, "no answer"
            pump(self._front)
        return wire_types.decode(self._socket.recv_multipart()[0])

    def hello(self, name: str = "raw") -> wire_types.Control:
        accepts = ["inline", "frames"]
        self.say(
            wire_types.Hello(
                version=wire_types.VERSION, nonce=7, name=name, pid=1, window=99, patience=0, accepts=accepts
            )
        )
        answer = self.hear()
        if isinstance(answer, wire_types.Welcome):
            self.link = answer.link
        return answer

    def data(self, number: int, body: object = None, *references: wire_types.Reference) -> wire_types.Data:
        return wire_types.Data(self.link, number, 0, msgspec.msgpack.encode(body), list(references))


@contextmanager
def stranger(front: transport.Endpoint) -> Iterator[Raw]:
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(front.addresses[0])
        yield Raw(front, socket)


def pump(endpoint: transport.Endpoint) -> None:
    endpoint.statistics()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.001)


def lives(front: transport.Endpoint) -> None:
    """It still serves who behaves."""
    with joined(front, "good", CONFIG) as near:
        front.send({"x": noise(70_000)}, to="good")
        assert same(near.receive().body["x"], noise(70_000))


def reference(
    backend: str, handle: object, nbytes: int = 3, dtype: str = "torch.uint8"
) -> wire_types.Reference:
    return wire_types.Reference(
        TensorSpec(dtype, (nbytes,)), backend, msgspec.Raw(msgspec.msgpack.encode(handle))
    )


# ------------------------------------------------------------------------------------ outside of links


def test_junk_is_dropped_and_counted(front: transport.Endpoint) -> None:
    chance = random.Random(3)
    with stranger(front) as raw:
        for size in (0, 1, 5, 1000, 100_001):
            raw.say(chance.randbytes(size))
        raw.say(b"", b"", b"")
        raw.say(msgspec.msgpack.encode([99, 1, 2]), b"a frame")
        raw.say(msgspec.msgpack.encode({"tag": 1}))
        raw.say(b"\x91" * 100_000)  # as deep as it is long
        until(lambda: sum(front.statistics()["dropped"].values()) == 9)
    assert front.statistics()["dropped"] == {"not a message": 8, "too large": 1}
    lives(front)


def test_mutated_greetings(front: transport.Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(4)
    hello = wire_types.encode(
        wire_types.Hello(version=1, nonce=7, name="raw", pid=1, window=9, patience=0, accepts=["frames"])
    )
    handle, handled = front._exchange._handle, [0]

    def counting(arrived: Arrived) -> None:
        handle(arrived)
        handled[0] += 1

    monkeypatch.setattr(front._exchange, "_handle", counting)
    for turn in range(10):
        with stranger(front) as raw:
            for _ in range(40):
                raw.say(mutated(hello, chance))
            while handled[0] < 40 * (turn + 1):
                front.try_receive()
    assert front.statistics()["dropped"]["not a message"] > 100
    lives(front)


_NEXT = wire_types.VERSION + 1
_GREETING = [1, _NEXT, 7, "raw", 1, 9, 0, ["frames"], 1 << 20, 0, b""]


@pytest.mark.parametrize(
    "greeting",
    [
        _GREETING,
        [*_GREETING, {"more": [1.5]}],
        _GREETING[:3],
        _GREETING[:5],
        [1, _NEXT, 7, b"raw", "x", None],
    ],
    ids=["the same", "one more", "none", "some", "others"],
)
def test_a_greeting_of_another_version_is_refused_whatever_its_fields(
    front: transport.Endpoint, greeting: list[object]
) -> None:
    with stranger(front) as raw:
        raw.say(msgspec.msgpack.encode(greeting))
        reason = f"this endpoint speaks version {wire_types.VERSION}, not {_NEXT}"
        assert raw.hear() == wire_types.Refused(7, reason)
        assert isinstance(raw.hello(), wire_types.Welcome)
        raw.say(msgspec.msgpack.encode(greeting))
        until(lambda: front.statistics()["dropped"] == {"refused": 1, "a second greeting": 1})
        raw.say(raw.data(1, {"n": 1}))
        assert front.receive().body == {"n": 1}


def test_what_is_no_greeting_of_another_version_gets_no_answer(front: transport.Endpoint) -> None:
    encode = msgspec.msgpack.encode
    junk = [
        [1, _NEXT],
        [1, wire_types.VERSION, 7],  # this version, and not its fields
        [2, _NEXT, 7],
        [99, _NEXT, 7],
        [1, str(_NEXT), 7],
        [1, _NEXT, -7],
        [1, _NEXT, 1 << 63],
        {1: _NEXT},
    ]
    whole = encode(_GREETING)
    frames = [*map(encode, junk), whole[:-1], whole + b"\0", encode(_GREETING[:3])[:3]]
    frames.append(b"\x94" + encode(_GREETING[:3])[1:] + b"\x91" * 90_000)
    with stranger(front) as raw:
        for frame in frames:
            raw.say(frame)
        assert isinstance(raw.hello(), wire_types.Welcome)  # the first thing that it hears
    assert front.statistics()["dropped"] == {"not a message": len(frames)}


def test_a_greeting_of_another_version_takes_no_memory_beside_its_frame() -> None:
    most = 1 << 20
    frame = b"\xdd" + most.to_bytes(4, "big") + bytes((1, _NEXT, 7)) + b"\xc0" * (most - 3)
    tracemalloc.start()
    try:
        greeting = wire_types.decode_greeting(frame)
        assert tracemalloc.get_traced_memory()[1] < 10_000
    finally:
        tracemalloc.stop()
    assert greeting == wire_types.Greeting(_NEXT, 7)


def test_messages_without_a_link(front: transport.Endpoint) -> None:
    with stranger(front) as raw:
        for message in (
            wire_types.Ping(5, 1, 0),
            wire_types.Goodbye(5, "x"),
            wire_types.Acknowledgement(5, 3),
            wire_types.Attached(5, [1]),
            wire_types.Offered(5, "shm", b"x"),
        ):
            raw.say(message)
        raw.say(wire_types.Welcome(nonce=7, link=5, name="x", pid=1, window=9, patience=0, accepts=[]))
        raw.say(wire_types.Refused(7, "no"))
        until(lambda: front.statistics()["dropped"] == {"of another link": 7})
    assert front.peers == []
    lives(front)


def test_one_greeting_for_each_connection(front: transport.Endpoint) -> None:
    with stranger(front) as raw:
        assert isinstance(raw.hello("one"), wire_types.Welcome)
        for name in ("one", "two", "three"):
            raw.say(
                wire_types.Hello(
                    version=1, nonce=8, name=name, pid=1, window=9, patience=0, accepts=["frames"]
                )
            )
        until(lambda: front.statistics()["dropped"] == {"a second greeting": 3})
        assert [info.name for info in front.peers] == ["one"]
        raw.say(raw.data(1, {"n": 1}))
        assert front.receive().body == {"n": 1}


def heard(front: transport.Endpoint, told: Counter[str], number: int) -> bool:
    """Whether that many were linked or refused."""
    return bool(front.statistics()["dropped"].get("refused", 0) + told["link.begun"] == number)


def test_thousands_that_say_hello_and_die(address: str) -> None:
    """So many as may be are linked at a time, the others are refused; nothing stays of either."""
    told: Counter[str] = Counter()
    config = dataclasses.replace(CONFIG, max_peers=8, trace=lambda event, _now, _fields: told.update([event]))
    waves, each = 4, 500
    with transport.listen(address, config=config) as front:
        for wave in range(waves):
            with zmq.Context() as context, ExitStack() as sockets:
                for number in range(each):
                    socket = sockets.enter_context(context.socket(zmq.DEALER))
                    socket.setsockopt(zmq.LINGER, 0)
                    socket.connect(address)
                    hello = wire_types.Hello(1, 7, f"{wave}.{number}", 1, 9, 0, ["frames"])
                    socket.send(wire_types.encode(hello))
                until(partial(heard, front, told, (wave + 1) * each))
                assert len(front.peers) == config.max_peers
            until(lambda: not front.peers)
        assert told["link.begun"] == told["link.ended"] == waves * config.max_peers
        assert set(front.statistics()["dropped"]) == {"refused"}
        lives(front)


def waiting(front: transport.Endpoint, number: int) -> bool:
    """Whether that many messages wait to be received."""
    pump(front)
    return len(front._exchange.receiver.queue) == number


def test_who_comes_and_goes_again_and_again_leaves_no_more_than_its_limits(address: str) -> None:
    """What an ended link left counts as a link until it is received; else a goodbye would be a new start."""
    config = dataclasses.replace(CONFIG, max_peers=3)
    each = 8
    with transport.listen(address, config=config) as front, stranger(front) as raw:
        for _ in range(config.max_peers):
            assert isinstance(raw.hello(), wire_types.Welcome)
            for number in range(each):
                raw.say(raw.data(number + 1, bytes(60_000)))
            raw.say(wire_types.Goodbye(raw.link))
        for _ in range(20):
            refused = raw.hello()
            assert isinstance(refused, wire_types.Refused)
            assert refused.reason == (
                "there are 0 peers, and 3 links ended with messages that wait to be received"
                " (max_peers is 3); try again when they are received, or raise it"
            )
        assert len(front._exchange.receiver.queue) == config.max_peers * each
        for _ in range(each):
            front.receive()
        assert isinstance(raw.hello(), wire_types.Welcome)
        raw.say(raw.data(1, "more"))
        for _ in range((config.max_peers - 1) * each):
            assert front.receive().body == bytes(60_000)
        assert front.receive().body == "more"


def test_who_comes_back_while_its_old_messages_wait_counts_as_one_more(address: str) -> None:
    config = dataclasses.replace(CONFIG, max_peers=2)
    with transport.listen(address, config=config) as front:
        for number in range(config.max_peers):
            with stranger(front) as raw:  # which ends without a goodbye, as who is killed does
                assert isinstance(raw.hello("rank0"), wire_types.Welcome)
                raw.say(raw.data(1, number))
                until(partial(waiting, front, number + 1))
        with stranger(front) as raw:
            refused = raw.hello("rank0")
            assert isinstance(refused, wire_types.Refused)
            assert "2 links ended with messages that wait to be received (max_peers is 2)" in refused.reason
            assert front.receive().body == 0
            assert isinstance(raw.hello("rank0"), wire_types.Welcome)
            assert front.receive().body == 1


_FEW = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (200, 4096))  # what is left by the shell, and what may be had
import transport
config = transport.TransportConfig(backend="frames", max_peers=1000)
with transport.listen(sys.argv[1], config=config) as front:
    print(*front.addresses, flush=True)
    front.wait_for_peers({"good"}, timeout=60)
    front.send({"n": 1}, to="good")
"""


@pytest.mark.parametrize("scheme", ["ipc", "tcp"])
def test_more_connections_than_descriptors_at_first(scheme: str, address: str) -> None:
    """zmq's ipc listener aborts the process when none is left, so a listener takes all that it may have."""
    asked = address if scheme == "ipc" else "tcp://127.0.0.1:0"
    with subprocess.Popen([sys.executable, "-c", _FEW, asked], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            where = process.stdout.readline().strip()
            assert where
            with zmq.Context() as context, ExitStack() as sockets:
                for number in range(500):
                    socket = sockets.enter_context(context.socket(zmq.DEALER))
                    socket.setsockopt(zmq.LINGER, 0)
                    socket.connect(where)
                    hello = wire_types.Hello(1, 7, f"many.{number}", 1, 9, 0, ["frames"])
                    socket.send(wire_types.encode(hello))
                until(lambda: connections(process.pid) > 400)
            with transport.connect(where, name="good", config=CONFIG, timeout=WAIT) as near:
                assert near.receive().body == {"n": 1}
            assert process.wait(WAIT) == 0
        finally:
            process.kill()


def connections(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


# ------------------------------------------------------------------------------------ inside of a link


def test_frames_without_end_are_not_kept(front: transport.Endpoint) -> None:
    """A message has at most as many as it may have tensors; each counts, however small it is."""
    many = [b""] * (CONFIG.max_tensors + 1)
    with stranger(front) as raw:
        raw.say(b"", *many)
        until(lambda: front.statistics()["dropped"] == {"too many frames": 1})
        raw.hello("crowd")
        raw.say(raw.data(1), *many)
        answer = raw.hear()
        assert isinstance(answer, wire_types.Goodbye)
        assert "1 frames more than max_tensors" in answer.reason
        assert not front.peers
    with stranger(front) as raw:
        raw.hello("heap")
        few = [b""] * (CONFIG.max_queued_bytes // FRAME_BYTES // 4)
        for number in range(1, 6):
            raw.say(raw.data(number), *few)
        while isinstance(answer := raw.hear(), wire_types.Acknowledgement):
            pass
        assert isinstance(answer, wire_types.Goodbye)
        assert "max_queued_bytes" in answer.reason
    lives(front)


@pytest.mark.parametrize("numbers", [[2], [0], [1, 1], [1, 3]])
def test_a_gap_in_the_numbers_ends_the_link(front: transport.Endpoint, numbers: list[int]) -> None:
    with stranger(front) as raw:
        raw.hello()
        for number in numbers:
            raw.say(raw.data(number))
        until(lambda: not front.peers)
        goodbye = raw.hear()
        assert isinstance(goodbye, wire_types.Goodbye)
        reason = f"message {numbers[-1]} follows message {len(numbers) - 1}"
        assert goodbye.reason == reason
        assert front.statistics()["left"] == {"raw": f"broke the protocol: {reason}"}
        for _ in numbers[:-1]:
            front.receive()  # what was right before still counts
        raw.say(raw.data(1))
        until(lambda: front.statistics()["dropped"].get("of another link") == 1)
    lives(front)


def test_another_links_number(front: transport.Endpoint) -> None:
    with stranger(front) as raw:
        raw.hello()
        raw.link += 1
        raw.say(raw.data(1))
        until(lambda: front.statistics()["dropped"] == {"of another link": 1})
        assert front.try_receive() is None


def test_more_bytes_than_the_window(front: transport.Endpoint) -> None:
    with stranger(front) as raw:
        raw.hello()
        for number in range(1, 9):
            raw.say(raw.data(number, {"text": "x" * 90_000}))
        until(lambda: not front.peers)
        assert "max_queued_bytes" in front.statistics()["left"]["raw"]
        for _ in range(5):
            front.receive()
        assert front.try_receive() is None
    lives(front)


def test_more_messages_than_the_window(front: transport.Endpoint) -> None:
    with stranger(front) as raw:
        raw.hello()
        for number in range(1, 60):
            raw.say(raw.data(number))
        until(lambda: not front.peers)
        assert "max_queued_messages" in front.statistics()["left"]["raw"]
        for _ in range(50):
            front.receive()
        assert front.try_receive() is None
    lives(front)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (reference("warp", b""), "does not read the backend 'warp'"),
        (reference("inline", 5), "an inline handle is not bytes"),
        (reference("inline", b"four"), "4 bytes where 3 should be"),
        (reference("frames", 0), "frame 0 of 0"),
        (reference("frames", -1), "frame -1 of 0"),
        (reference("frames", b"x"), "a frame handle is no number"),
        (reference("parts", 0), "its parts did not all come"),
        (reference("shm", [1, 2]), "a ring handle is not one"),
        (reference("shm", [1, 2, 3, 4, 5, 0, 3]), "the ring of raw's tensor is not mapped here"),
        (reference("inline", b"abc", dtype="object"), "unknown dtype"),
        (reference("inline", b"abc", dtype="|O8"), "unknown dtype"),
        (reference("inline", b"", nbytes=-3), "a dimension of -3"),
        (reference("frames", 0, nbytes=1 << 58, dtype="torch.float64"), "max_message_bytes"),
        (reference("frames", 0, nbytes=1 << 61, dtype="torch.float64"), "a shape of more than"),
    ],
)
def test_a_bad_tensor_costs_its_message_and_nothing_else(
    front: transport.Endpoint, bad: wire_types.Reference, words: str
) -> None:
    with stranger(front) as raw:
        raw.hello()
        raw.say(raw.data(1, None, bad))
        raw.say(raw.data(2, {"n": 2}))
        with pytest.raises((transport.ProtocolError, transport.PeerGone), match=words) as caught:
            front.receive()
        assert "message 1 from 'raw'" in str(caught.value)
        assert front.receive().body == {"n": 2}
        assert front.statistics()["received"]["refused"] == 1


def test_a_shape_of_a_million_dimensions_costs_no_minutes(address: str) -> None:
    """Its size, a product of as many numbers, is not asked for before it is refused."""
    config = dataclasses.replace(CONFIG, max_control_bytes=16 << 20, max_queued_bytes=32 << 20)
    with transport.listen(address, config=config) as front, stranger(front) as raw:
        raw.hello()
        shape = TensorSpec("|u1", (1 << 62,) * 1_500_000)
        raw.say(raw.data(1, None, wire_types.Reference(shape, "inline", msgspec.Raw(b"\xc4\x00"))))
        raw.say(raw.data(2, {"n": 2}))
        with pytest.raises(transport.ProtocolError, match="1500000 dimensions"):
            front.receive()
        assert front.receive().body == {"n": 2}


def test_parts_that_do_not_fit(front: transport.Endpoint) -> None:
    piece = wire_types.Piece(0, 0, 3, "inline", msgspec.Raw(msgspec.msgpack.encode(b"abc")))
    late = msgspec.structs.replace(piece, start=5)
    elsewhere = msgspec.structs.replace(piece, index=4)
    wrong = [
        ([], [piece]),  # of no message
        ([2], [piece]),  # longer than announced
        ([9], [late]),  # a hole before it
        ([9], [elsewhere]),
        ([1 << 50], [piece]),  # beyond every limit
        ([0] * 20_000, [piece]),
    ]
    with stranger(front) as raw:
        raw.hello()
        number = 0
        for sizes, pieces in wrong:
            number += 2
            raw.say(wire_types.Part(raw.link, number - 1, 0, sizes, pieces))
            raw.say(raw.data(number, None, reference("parts", 0)))
            with pytest.raises(transport.ProtocolError, match="its parts did not all come"):
                front.receive()
        raw.say(wire_types.Part(raw.link, number + 1, 0, [3], [piece]))
        raw.say(raw.data(number + 2, [msgspec.msgpack.Ext(1, bytes(4))], reference("parts", 0)))
        assert front.receive().body[0].tolist() == list(b"abc")


def test_mutated_messages_in_a_link(front: transport.Endpoint) -> None:
    chance = random.Random(5)
    refused = 0
    for _ in range(60):
        with stranger(front) as raw:
            raw.hello()
            good = raw.data(1, [msgspec.msgpack.Ext(1, bytes(4))], reference("inline", b"abc"))
            raw.say(mutated(wire_types.encode(good), chance))
            raw.say(wire_types.Goodbye(raw.link))
            until(lambda: not front.peers)
            try:
                front.try_receive()
            except transport.TransportError:
                refused += 1
    assert refused
    lives(front)


def test_offers_of_what_is_not_there(front: transport.Endpoint) -> None:
    chance = random.Random(6)
    with stranger(front) as raw:
        raw.hello()
        for offer in (
            b"",
            msgspec.msgpack.encode(["/etc/passwd", 0, 1]),
            msgspec.msgpack.encode(["tensorferry.0.x", -1, -5]),
        ):
            raw.say(wire_types.Offered(raw.link, "shm", offer))
            answer = raw.hear()
            assert isinstance(answer, wire_types.Answered)
            assert answer.proof is None
            assert answer.reason
            assert "passwd" not in answer.reason
        assert front.statistics()["dropped"] == {"offer refused": 3}
        raw.say(wire_types.Offered(raw.link, "warp", b""))
        answer = raw.hear()
        assert isinstance(answer, wire_types.Answered)
        assert answer.reason == "this endpoint does not read warp"
        for _ in range(100):
            raw.say(wire_types.Answered(raw.link, "shm", chance.randbytes(8)))
            raw.say(wire_types.Settled(raw.link, "shm"))
        raw.say(raw.data(1, {"n": 1}))
        assert front.receive().body == {"n": 1}


def test_a_refusal_tells_nothing_of_what_stands_in_a_segment(front: transport.Endpoint) -> None:
    """Whoever names a segment of this user, ring or not, hears only that it is none, or is not there."""
    missing = f"tensorferry.{os.getuid()}.{'0' * 32}"
    with stranger(front) as raw, own_ring() as writer:
        raw.hello()
        offer = writer.offer()
        header = np.memmap(shm.DIRECTORY / writer.name, np.uint64, "r+", shape=512)
        for word in (at.H_VERSION, at.H_CAPACITY, at.H_MAGIC):
            before, header[word] = header[word], 7654321
            assert raw.refused(offer) == "the segment is no ring of this version and this user"
            header[word] = before
        reason = raw.refused(offer._replace(name=missing))
        assert reason == "there is no such segment where it would be read (another host or container?)"


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, partial(os.symlink, "/etc/passwd")])
def test_an_offer_of_what_anybody_can_plant_is_refused(
    make: Callable[[str], None], front: transport.Endpoint
) -> None:
    """What is no file at all costs nothing but the offer, whoever put it under a segment's name."""
    name = f"tensorferry.{os.getuid()}.{os.urandom(16).hex()}"
    path = shm.DIRECTORY / name
    make(str(path))
    try:
        with stranger(front) as raw:
            raw.hello()
            reason = raw.refused(shm.Offer(name, 0, 1))
            assert reason == "the segment is no ring of this version and this user"
            raw.say(raw.data(1, {"n": 1}))
            assert front.receive().body == {"n": 1}
    finally:
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


def test_a_refusal_for_want_of_memory_tells_no_path_and_no_size(
    front: transport.Endpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They are in the log of the side that is short, once."""
    with stranger(front) as raw, own_ring() as writer:
        raw.hello()
        offer = writer.offer()
        nothing = shm.Space(total=1 << 20, free=0, cgroup=None, machine=1 << 40)
        monkeypatch.setattr(memory, "space", lambda: nothing)
        assert {raw.refused(offer) for _ in range(3)} == {
            "memory is short where it would be read; the log there says which and how to get more"
        }
        (logged,) = caplog.messages
        assert "/dev/shm has 0 B of 1 MiB free" in logged


@pytest.mark.parametrize("spare", [0, 1, 2])
def test_a_refusal_for_want_of_descriptors_holds_no_path_and_no_name(spare: int, address: str) -> None:
    """With so many left, mapping another's ring fails at one step or another; later it can be had."""
    with transport.listen(address, config=CONFIG) as front, stranger(front) as raw, own_ring() as writer:
        raw.hello()
        offer = wire_types.Offered(raw.link, "shm", msgspec.msgpack.encode(list(writer.offer())))
        raw.say(offer)
        with descriptors_left(spare):
            refused = raw.hear()
        assert isinstance(refused, wire_types.Answered)
        assert re.search(r"too many open files|number of files open", refused.reason, re.IGNORECASE)
        assert "/" not in refused.reason
        assert writer.name.split(".")[2] not in refused.reason
        raw.say(offer)
        accepted = raw.hear()
        assert isinstance(accepted, wire_types.Answered)
        assert accepted.proof is not None


@contextmanager
def own_ring() -> Iterator[shm.RingWriter]:
    writer = shm.RingWriter(1 << 16, slots=8, columns=1)
    try:
        yield writer
    finally:
        writer.close()


@contextmanager
def descriptors_left(number: int) -> Iterator[None]:
    """This process can open so many files more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = [os.open(os.devnull, os.O_RDONLY) for _ in range(number + 1)]  # the lowest that are free
    resource.setrlimit(resource.RLIMIT_NOFILE, (taken[-1], hard))
    for descriptor in taken:
        os.close(descriptor)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(
    ("error", "words"),
    [(FileNotFoundError("no /dev/shm"), set()), (shm.ShmError("no locks"), {"stay in /dev/shm: no locks"})],
)
def test_a_sweep_that_fails_stops_no_endpoint(
    error: Exception,
    words: set[str],
    address: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fails() -> list[str]:
        raise error

    monkeypatch.setattr(shm, "sweep", fails)
    with transport.listen(address, config=CONFIG) as front:
        assert {message.partition("processes ")[2] for message in caplog.messages} == words
        lives(front)


def test_one_frame_beyond_the_limit_ends_the_connection(front: transport.Endpoint) -> None:
    """zmq itself hangs up, before the frame takes memory."""
    with stranger(front) as raw:
        raw.hello()
        raw.say(raw.data(1, None, reference("frames", 0, (1 << 20) + 1)), bytes((1 << 20) + 1))
        until(lambda: not front.peers)
        assert front.try_receive() is None
        assert front.statistics()["left"] == {"raw": "is gone: the connection ended"}
    lives(front)


def test_who_asks_and_never_reads_is_not_answered_without_end(front: transport.Endpoint) -> None:
    with stranger(front) as raw:
        raw.hello()
        link = front._exchange.roster.named("raw")
        assert link is not None
        offer = wire_types.Answered(link.peer.link, "shm", None, "x" * 400)
        assert link.tell(offer)
        until(partial(is_stuffed, partial(link.tell, offer)))
    lives(front)


# ------------------------------------------------------------------------------------ a hostile listener


def test_a_listener_that_greets_twice_or_is_somebody_else(address: str) -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.setsockopt(zmq.LINGER, 0)
        router.bind(address)
        endpoint = transport.Endpoint("r", CONFIG)
        with endpoint:
            number = endpoint._exchange.wire.dial(address)
            endpoint._exchange._dialling[number] = 5, None
            endpoint._exchange.wire.post(Route(number), b"x")
            identity = router.recv_multipart()[0]
            welcome = wire_types.Welcome(nonce=5, link=9, name="f", pid=1, window=9, patience=0, accepts=[])
            stale = msgspec.structs.replace(welcome, nonce=6)
            other = msgspec.structs.replace(welcome, link=10, name="g")
            hello = wire_types.Hello(version=1, nonce=8, name="h", pid=1, window=9, patience=0, accepts=[])
            for message in (stale, welcome, other, hello):
                router.send_multipart([identity, wire_types.encode(message)])
            until(lambda: sum(endpoint.statistics()["dropped"].values()) == 3)
            assert endpoint.statistics()["dropped"] == {"of another link": 2, "a second greeting": 1}
            assert [info.name for info in endpoint.peers] == ["f"]
            del endpoint._exchange._dialling[number]
