"""The conformance suite: what every backend must do, for our own and for those of third parties.

Derive a class in a test file of your own and run pytest (`pip install tensorferry[test]`):

    from transport.conformance import BackendConformance

    class TestMine(BackendConformance):
        backend = "mine"

The peers are real: processes of their own, started by a fork server that has imported tensorferry and
nothing else, so that each costs milliseconds. Nothing of the package itself imports this module.
"""

from __future__ import annotations

import asyncio
import dataclasses
import multiprocessing
import os
import random
import select
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.forkserver import ensure_running
from multiprocessing.process import BaseProcess
from typing import Any, ClassVar

import msgspec
import numpy as np
import pytest
import torch

from transport import registry
from transport.backends.base import Bytes, Inbound, Outbound, Parcel, Peer, Proof, Refusal
from transport.config import TransportConfig
from transport.endpoint import Endpoint, connect, listen
from transport.errors import Full, PeerGone, ProtocolError, Timeout
from transport.received import Message
from transport.tensors import Source, concat, source_of, stack

WAIT = 30.0  # seconds; a test never takes as long, except where it fails
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["transport.conformance"])

_TORCH = "bool uint8 int8 int16 int32 int64 uint16 uint32 uint64 float16 bfloat16 float32 float64 complex32"
_TORCH += " complex64 complex128 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu"
TORCH_DTYPES = [getattr(torch, name) for name in _TORCH.split() if hasattr(torch, name)]
NUMPY_DTYPES = [
    "|b1",
    "|i1",
    "<u2",
    ">u2",
    "<i4",
    ">i8",
    "<f2",
    "<f4",
    ">f8",
    "<c8",
    "<c16",
    "<M8[ns]",
    "<U3",
    "|S5",
]


class Request(msgspec.Struct):
    """A typed body."""

    id: str
    pixels: torch.Tensor
    grid: list[int]


@dataclasses.dataclass
class Note:
    """A body that is a dataclass, to be sent."""

    mask: Any
    text: str


# ------------------------------------------------------------------------------------ peers


def prepare() -> None:
    """Start the fork server now, so that no single test is charged for it."""
    ensure_running()


@contextmanager
def running(function: Callable[..., None], *arguments: object) -> Iterator[BaseProcess]:
    """A process that calls a module-level function; killed at the end if it has not ended by then."""
    process = _PROCESSES.Process(target=function, args=arguments, daemon=True)
    process.start()
    try:
        yield process
    finally:
        if process.is_alive():
            process.kill()
        process.join()
        process.close()


def serve(address: str, name: str, options: Mapping[str, Any], own: Sequence[str] = ()) -> None:
    """The life of a peer: do what each message says until the other side is gone."""
    config = TransportConfig(**options)
    held: list[Message] = []
    with connect(address, name=name, config=config, listen=own, timeout=WAIT) as endpoint:
        while True:
            try:
                message = endpoint.receive(timeout=WAIT)
            except PeerGone:
                return
            body = message.body
            match body["do"]:
                case "echo":
                    endpoint.send({"value": body["value"]}, to=message.sender, timeout=WAIT)
                case "sum":
                    endpoint.send(digest(body["value"]), to=message.sender, timeout=WAIT)
                case "hold":
                    held.append(message)
                case "drop":
                    held.clear()
                case "held":
                    values = [digest(other.body["value"]) for other in held]
                    endpoint.send(values, to=message.sender, timeout=WAIT)
                case "stop":
                    return
                case "forward":
                    endpoint.forward(message, to=body["to"], timeout=WAIT)
            del message, body


@contextmanager
def serving(front: Endpoint, name: str, options: Mapping[str, Any], *own: str) -> Iterator[BaseProcess]:
    """A process that serves `front` under this name; at the end it is asked to go, if it is there still."""
    with running(serve, front.addresses[-1], name, options, own) as process:
        front.wait_for_peers({name}, timeout=WAIT)
        yield process
        with suppress(PeerGone):
            front.send({"do": "stop"}, to=name)
        process.join(WAIT)


def digest(tensor: Any) -> int:
    """A number that tells wrong, moved and missing bytes, of a tensor's bytes in C order."""
    data = raw(tensor)
    weights = np.arange(1, data.size + 1, dtype=np.uint64)
    return int((data * weights).sum(dtype=np.uint64)) ^ data.size


def raw(tensor: Any) -> Bytes:
    """The bytes of a tensor or array in C order, uint8 [nbytes]."""
    source = source_of(tensor)
    assert source is not None
    buffer = np.empty(source.nbytes, np.uint8)
    source.fill(buffer)
    return buffer


def same(one: Any, other: Any) -> bool:
    """Whether two tensors have the same library, dtype, shape and bytes."""
    return (
        isinstance(one, torch.Tensor) == isinstance(other, torch.Tensor)
        and one.dtype == other.dtype
        and tuple(one.shape) == tuple(other.shape)
        and bool(np.array_equal(raw(one), raw(other)))
    )


def noise(nbytes: int, seed: int = 1) -> torch.Tensor:
    """Random bytes, torch.uint8 [nbytes]."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8))


@contextmanager
def joined(front: Endpoint, name: str, config: TransportConfig, *others: str) -> Iterator[Endpoint]:
    """An endpoint of this process that is linked with `front`, and with who listens at the other addresses.

    An endpoint does nothing between calls: `front` has to wait for the peer while the peer connects.
    """
    with ThreadPoolExecutor(1) as pool:
        addresses = [*others, front.addresses[-1]]
        connecting = pool.submit(connect, addresses, name=name, config=config, timeout=WAIT)
        front.wait_for_peers({name}, timeout=WAIT)
        endpoint = connecting.result(WAIT)
    with endpoint:
        yield endpoint


class Pumped:
    """An endpoint of this process whose messages a thread takes, into a list."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.messages: list[Message] = []
        self._more = threading.Condition()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                message = self.endpoint.receive(timeout=0.02)
            except Timeout:
                continue
            except PeerGone:
                self._stop.wait(0.02)
                continue
            with self._more:
                self.messages.append(message)
                self._more.notify_all()
            del message

    def next(self) -> Message:
        """The oldest message, waited for."""
        with self._more:
            assert self._more.wait_for(lambda: self.messages, WAIT), "nothing came"
            return self.messages.pop(0)

    def stop(self) -> None:
        """Take no more."""
        self._stop.set()
        self._thread.join()
        self.messages.clear()


def _tensors() -> dict[str, Any]:
    """Tensors of every dtype and every layout, by what is special about them."""
    bits = noise(240)
    found: dict[str, Any] = {
        str(dtype): bits.view(dtype).view(3, -1) for dtype in TORCH_DTYPES if dtype != torch.bool
    }
    found["torch.bool"] = bits > 127
    for dtype in NUMPY_DTYPES:
        plain = np.arange(60).astype(np.int64)
        found[f"numpy {dtype}"] = (plain.view("<M8[ns]") if "M8" in dtype else plain.astype(dtype)).reshape(
            4, 15
        )
    matrix = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    found |= {
        "0-d": torch.tensor(3.5, dtype=torch.float64),
        "numpy 0-d": np.array(7, np.int16),
        "empty": torch.empty(0, 5, dtype=torch.bfloat16),
        "numpy empty": np.empty((3, 0), np.float32),
        "transposed": matrix.T,
        "stepped": matrix[::2, ::3],
        "expanded": matrix[:1].expand(5, 6),
        "backwards": np.arange(20)[::-2],
        "fortran": np.asfortranarray(np.arange(12.0).reshape(3, 4)),
        "conjugate": torch.randn(5, dtype=torch.complex64, generator=torch.Generator().manual_seed(1)).conj(),
        "negated": torch.randn(5, dtype=torch.complex64, generator=torch.Generator().manual_seed(2))
        .conj()
        .imag,
        "with gradient": torch.ones(3, requires_grad=True),
        "parameter": torch.nn.Parameter(torch.arange(4.0)),
        "1 MiB and a bit, strided": noise((1 << 20) + 6).view(2, -1).T,
    }
    return found


# ------------------------------------------------------------------------------------ the suite


class BackendConformance:
    """Derive, name the backend, and let pytest collect it.

    backend: as in the configuration. options: more fields of `TransportConfig`. scheme: ipc or tcp.
    holds_memory: whether what a reader holds occupies the sender's memory, so that it gets full.
    survives_close: whether what was sent and is not taken yet can be opened after the sender closed.
    """

    backend: ClassVar[str] = ""
    options: ClassVar[Mapping[str, Any]] = {}
    scheme: ClassVar[str] = "ipc"
    holds_memory: ClassVar[bool] = False
    survives_close: ClassVar[bool] = True

    def config(self, **changes: Any) -> TransportConfig:
        """Small limits, so that they are reached; `changes` are fields."""
        return TransportConfig(**self.fields(**changes))

    def fields(self, **changes: Any) -> dict[str, Any]:
        """What `config` is made of."""
        small = {
            "ring_bytes": 8 << 20,
            "detour_bytes": 4 << 20,
            "max_control_bytes": 4 << 20,
            "timeout": WAIT,
        }
        return {**small, "admission_timeout": WAIT, "backend": self.backend, **self.options, **changes}

    # -------------------------------------------------------------- fixtures

    @pytest.fixture
    def folder(self) -> Iterator[str]:
        path = tempfile.mkdtemp(prefix="tf-", dir="/tmp")  # a Unix socket's path has 107 bytes
        yield path
        shutil.rmtree(path)

    @pytest.fixture
    def front(self, folder: str) -> Iterator[Endpoint]:
        with listen(self.address(folder, "front"), config=self.config()) as endpoint:
            yield endpoint

    @pytest.fixture
    def peer(self, front: Endpoint) -> Iterator[BaseProcess]:
        with serving(front, "peer", self.fields()) as process:
            yield process

    @pytest.fixture
    def near(self, front: Endpoint) -> Iterator[Pumped]:
        with joined(front, "near", self.config()) as endpoint:
            pumped = Pumped(endpoint)
            yield pumped
            pumped.stop()

    def address(self, folder: str, name: str) -> str:
        return f"ipc://{folder}/{name}.sock" if self.scheme == "ipc" else "tcp://127.0.0.1:0"

    def echoed(self, front: Endpoint, value: Any) -> Any:
        front.send({"do": "echo", "value": value}, to="peer")
        return front.receive(copy=True).body["value"]

    # -------------------------------------------------------------- two processes

    @pytest.mark.usefixtures("peer")
    def test_every_dtype_and_layout_arrives_bit_for_bit(self, front: Endpoint) -> None:
        sent = _tensors()
        came = self.echoed(front, sent)
        assert came.keys() == sent.keys()
        wrong = [name for name, tensor in sent.items() if not same(tensor, came[name])]
        assert not wrong

    @pytest.mark.usefixtures("peer")
    def test_one_at_a_time_as_well(self, front: Endpoint) -> None:
        for name in ("0-d", "empty", "transposed", "torch.bfloat16", "numpy >i8", "1 MiB and a bit, strided"):
            tensor = _tensors()[name]
            assert same(self.echoed(front, tensor), tensor), name

    @pytest.mark.usefixtures("peer")
    def test_nested_bodies(self, front: Endpoint) -> None:
        pixels = torch.arange(6.0).reshape(2, 3)
        value = {
            "a": [pixels, {"b": (pixels[0], None, "text", b"bytes", 1.5, True)}],
            "n": Note(pixels, "m"),
            "z": {},
        }
        came = self.echoed(front, value)
        assert same(came["a"][0], pixels)
        assert same(came["a"][1]["b"][0], pixels[0])
        assert came["a"][1]["b"][1:] == [None, "text", b"bytes", 1.5, True]
        assert same(came["n"]["mask"], pixels)
        assert (came["n"]["text"], came["z"]) == ("m", {})

    @pytest.mark.usefixtures("peer")
    def test_a_body_without_tensors(self, front: Endpoint) -> None:
        assert self.echoed(front, {"n": [1, 2, 3]}) == {"n": [1, 2, 3]}

    @pytest.mark.usefixtures("peer")
    def test_batches(self, front: Endpoint) -> None:
        parts = [noise(300_000, seed).view(3, -1) for seed in range(3)]
        came = self.echoed(front, [stack(parts), concat(parts, dim=1)])
        assert same(came[0], torch.stack(parts))
        assert same(came[1], torch.cat(parts, dim=1))

    @pytest.mark.usefixtures("peer")
    def test_many_tensors(self, front: Endpoint) -> None:
        sent = [noise(size, size + 1) for size in (0, 1, 63, 64, 65, 4095, 4097)] * 40
        came = self.echoed(front, sent)
        assert len(came) == len(sent)
        assert all(same(one, other) for one, other in zip(came, sent, strict=True))

    @pytest.mark.usefixtures("peer")
    def test_the_caller_may_overwrite_what_it_sent(self, front: Endpoint) -> None:
        sums = []
        tensor = noise(400_000)
        for turn in range(20):
            tensor += turn
            sums.append(digest(tensor))
            front.send({"do": "sum", "value": tensor}, to="peer")
            tensor.zero_() if turn % 2 else tensor.fill_(turn)
        assert [front.receive().body for _ in range(20)] == sums

    @pytest.mark.usefixtures("peer")
    def test_what_a_reader_holds_stays_as_it_is(self, front: Endpoint) -> None:
        kept = [noise(200_000, seed) for seed in range(4)]
        for tensor in kept:
            front.send({"do": "hold", "value": tensor}, to="peer")
        for turn in range(40):  # several times around the memory
            tensor = noise(1 << 20, 100 + turn)
            front.send({"do": "sum", "value": tensor}, to="peer")
            assert front.receive().body == digest(tensor)
        front.send({"do": "held"}, to="peer")
        assert front.receive().body == [digest(tensor) for tensor in kept]

    @pytest.mark.usefixtures("peer")
    def test_a_message_larger_than_every_limit_goes_in_parts(self, front: Endpoint) -> None:
        sent = [noise(3 << 20, 1), torch.ones(3), noise(9 << 20, 2).view(-1, 2).T]
        front.send({"do": "sum", "value": concat([sent[0], raw_tensor(sent[2])])}, to="peer")
        assert front.receive().body == digest(torch.cat([sent[0], raw_tensor(sent[2])]))
        came = self.echoed(front, sent)
        assert all(same(one, other) for one, other in zip(came, sent, strict=True))
        assert front.statistics()["sent"]["parts"] >= 3

    def test_a_killed_peer_is_named_and_its_memory_comes_back(
        self, front: Endpoint, peer: BaseProcess
    ) -> None:
        for seed in range(3):
            front.send({"do": "hold", "value": noise(1 << 20, seed)}, to="peer")
        assert peer.pid is not None
        os.kill(peer.pid, signal.SIGKILL)
        peer.join(WAIT)
        # What is sent before the death is known may still go.
        hold = partial(front.send, {"do": "hold", "value": noise(300_000)}, to="peer", timeout=WAIT)
        with pytest.raises(PeerGone, match="'peer'") as caught:
            repeated(hold)
        assert list(caught.value.failed) == ["peer"]
        with serving(front, "peer", self.fields()):
            for turn in range(12):
                tensor = noise(1 << 20, turn)
                front.send({"do": "sum", "value": tensor}, to="peer")
                assert front.receive().body == digest(tensor)

    def test_a_stopped_peer_makes_full_and_only_for_itself(self, front: Endpoint, peer: BaseProcess) -> None:
        with serving(front, "other", self.fields()):
            for name in ("peer", "other"):
                front.send({"do": "echo", "value": noise(300_000)}, to=name)
                front.receive()
            assert peer.pid is not None
            os.kill(peer.pid, signal.SIGSTOP)
            with pytest.raises(Full, match="'?peer'?") as caught:
                repeated(partial(front.try_send, {"do": "drop", "value": noise(500_000)}, to="peer"))
            assert list(caught.value.failed) == ["peer"]
            for turn in range(8):
                tensor = noise(500_000, turn)
                front.send({"do": "sum", "value": tensor}, to="other")
                assert front.receive().body == digest(tensor)
            os.kill(peer.pid, signal.SIGCONT)
            assert same(self.echoed(front, noise(500_000)), noise(500_000))

    @pytest.mark.usefixtures("peer")
    def test_broadcast(self, front: Endpoint, near: Pumped) -> None:
        for seed in range(6):
            tensor = noise(700_000, seed)
            front.send({"do": "sum", "value": tensor}, to=["peer", "near"])
            assert digest(near.next().body["value"]) == digest(tensor)
            assert front.receive().body == digest(tensor)
        with pytest.raises(PeerGone, match="nobody-here") as caught:
            front.send({"do": "sum", "value": noise(9)}, to=["peer", "nobody-here", "near"])
        assert caught.value.delivered == ("peer", "near")
        assert list(caught.value.failed) == ["nobody-here"]
        assert front.receive().body == digest(noise(9))

    def test_forward(self, folder: str, front: Endpoint) -> None:
        # A peer that listens itself, so that `far` is linked with both.
        relay = f"ipc://{folder}/relay.sock"
        with serving(front, "relay", self.fields(), relay), joined(front, "far", self.config(), relay) as far:
            for seed in range(4):
                tensor = noise(900_000, seed)
                front.send({"do": "forward", "to": "far", "value": tensor}, to="relay")
                message = far.receive()
                assert message.sender == "relay"
                assert same(message.body["value"], tensor)

    # -------------------------------------------------------------- one process, two endpoints

    def test_order_is_kept(self, front: Endpoint, near: Pumped) -> None:
        for first in range(0, 100, 10):
            for number in range(first, first + 10):
                front.send({"n": number, "value": noise(50_000 * (number % 4) + 70_000, number)}, to="near")
            for number in range(first, first + 10):
                body = near.next().body
                assert body["n"] == number
                assert same(body["value"], noise(50_000 * (number % 4) + 70_000, number))
                del body

    def test_copies_are_writable_and_their_own(self, front: Endpoint, near: Pumped) -> None:
        near.stop()
        thread = Pumped(front)  # answers what `front` is asked while `near` sends
        near.endpoint.send({"value": noise(300_000)})
        came = thread.next()
        thread.stop()
        sender = Pumped(near.endpoint)
        front.send({"value": came.body["value"]}, to="near")
        assert same(sender.next().body["value"], noise(300_000))
        sender.stop()
        front.send({"value": noise(300_000)}, to="near")
        copy = near.endpoint.receive(copy=True).body["value"]
        copy += 1
        assert same(copy, noise(300_000) + 1)

    def test_typed(self, front: Endpoint, near: Pumped) -> None:
        warm_up(front, near)
        near.stop()
        front.send(Request("r-1", noise(300_000), [1, 2]), to="near")
        body = near.endpoint.receive(Request).body
        assert isinstance(body, Request)
        assert (body.id, body.grid) == ("r-1", [1, 2])
        assert same(body.pixels, noise(300_000))
        front.send({"id": 5}, to="near")
        with pytest.raises(ProtocolError, match="another type"):
            near.endpoint.receive(Request)
        front.send({"id": 6}, to="near")
        assert near.endpoint.receive().body == {"id": 6}

    def test_never_waiting(self, front: Endpoint, near: Pumped) -> None:
        warm_up(front, near)
        near.stop()
        assert near.endpoint.try_receive() is None
        acknowledged(front)
        front.try_send({"value": noise(300_000)}, to="near")
        message = near.endpoint.receive()
        assert same(message.body["value"], noise(300_000))
        del message
        taken: list[None] = []

        def one_more() -> None:
            front.try_send({"value": noise(300_000)}, to="near")
            taken.append(None)

        with pytest.raises(Full) as caught:
            repeated(one_more)
        assert list(caught.value.failed) == ["near"]
        for _ in taken:
            near.endpoint.receive()
        front.send({"value": noise(300_000)}, to="near")  # takes what was acknowledged by now into account
        assert same(near.endpoint.receive().body["value"], noise(300_000))

    def test_held_views_fill_what_memory_there_is(self, front: Endpoint, near: Pumped) -> None:
        if not self.holds_memory:
            pytest.skip("what a reader of this backend holds is its own memory")
        held: list[Message] = []

        def one_more() -> None:
            front.send({"value": noise(1 << 20, len(held))}, to="near", timeout=0.3)
            held.append(near.next())

        with pytest.raises(Full, match="near"):
            repeated(one_more)
        assert all(same(message.body["value"], noise(1 << 20, n)) for n, message in enumerate(held))
        del held[::2]  # in any order
        for turn in range(10):
            front.send({"value": noise(1 << 20, turn)}, to="near")
            assert same(near.next().body["value"], noise(1 << 20, turn))

    def test_loans(self, front: Endpoint, near: Pumped) -> None:
        warm_up(front, near)
        for turn in range(30):
            with front.loan((500, 300), torch.float32) as out:
                out[:] = float(turn)
                front.send({"all": out, "row": out[7], "again": out}, to="near")
            del out
            body = near.next().body
            assert bool((body["all"] == turn).all())
            assert bool((body["row"] == turn).all())
            assert bool((body["again"] == turn).all())

    def test_loans_of_numpy_and_of_nothing(self, front: Endpoint, near: Pumped) -> None:
        warm_up(front, near)
        with front.loan((3, 40_000), np.int16) as out, front.loan((0, 4), torch.float32) as empty:
            out[:] = np.arange(40_000)
            front.send([out, empty], to="near")
        body = near.next().body
        assert same(body[0], np.tile(np.arange(40_000, dtype=np.int16), (3, 1)))
        assert body[1].shape == (0, 4)

    def test_async_pair(self, front: Endpoint, near: Pumped) -> None:
        warm_up(front, near)
        near.stop()

        async def exchange() -> list[Any]:
            waiters = [asyncio.create_task(near.endpoint.receive_async(timeout=WAIT)) for _ in range(2)]
            await asyncio.sleep(0)  # both wait now
            for seed in range(2):
                await front.send_async({"value": noise(300_000, seed)}, to="near")
            return [(await waiter).body["value"] for waiter in waiters]

        came = asyncio.run(exchange())
        assert sorted(map(digest, came)) == sorted(digest(noise(300_000, seed)) for seed in range(2))

    def test_statistics_and_explanations(self, front: Endpoint, near: Pumped) -> None:
        for _ in range(3):
            front.send({"value": noise(300_000)}, to="near")
            near.next()
        assert front.statistics()["sent"]["messages"] == 3
        counts = near.endpoint.statistics()["received"]
        assert counts["messages"] == 3
        assert sum(n for name, n in counts.items() if name.startswith("bytes ")) == 900_000
        (info,) = front.peers
        assert (info.name, info.pid) == ("near", os.getpid())
        assert info.backend

    def test_what_was_sent_before_close_still_arrives(self, folder: str) -> None:
        front = listen(self.address(folder, "short"), config=self.config())
        with joined(front, "near", self.config()) as endpoint:
            pumped = Pumped(endpoint)
            front.send({"value": noise(300_000)}, to="near")
            view = pumped.next().body["value"]
            pumped.stop()
            front.send({"value": noise(300_000, 2)}, to="near")
            front.close()
            front.close()
            self.check_last(endpoint)
            assert same(view, noise(300_000))
            with pytest.raises(PeerGone, match="goodbye"):
                endpoint.receive(timeout=WAIT)

    def test_what_a_peer_sent_before_close_still_arrives(self, front: Endpoint, near: Pumped) -> None:
        answering = Pumped(front)
        near.endpoint.send({"value": noise(300_000)})
        view = answering.next().body["value"]
        answering.stop()
        near.endpoint.try_send({"value": noise(300_000, 2)})
        near.stop()
        near.endpoint.close()
        self.check_last(front)
        assert same(view, noise(300_000))
        left(front)
        with pytest.raises(PeerGone, match="goodbye"):
            front.send({}, to="near")

    def check_last(self, endpoint: Endpoint) -> None:
        if self.survives_close:
            assert same(endpoint.receive().body["value"], noise(300_000, 2))
        else:
            with pytest.raises(PeerGone, match="message 2 from"):
                endpoint.receive()

    # -------------------------------------------------------------- the two nouns by themselves

    @pytest.fixture
    def both(self) -> Iterator[Both]:
        both = Both(self.config())
        yield both
        both.close()

    def test_put_and_open(self, both: Both) -> None:
        limit = both.outbound.limit(both.peer)
        for sizes in ([1], [70_000], [0, 5, 100_000], [limit // 2, 3]):
            data = [noise(size, size + 1) for size in sizes]
            parcel, views = both.send(data)
            assert [view.tobytes() for view in views] == [raw(tensor).tobytes() for tensor in data]
            assert all(view.dtype == np.uint8 and view.ndim == 1 for view in views)
            parcel.release(both.peer)
            del views

    def test_a_put_waits_polls_and_takes_all_or_nothing(self, both: Both) -> None:
        piece = [noise(both.outbound.limit(both.peer) // 4)]
        parcels: list[Parcel] = []
        with pytest.raises(Full) as caught:
            repeated(lambda: parcels.append(both.put(piece, timeout=0.0)))
        assert both.peer.name in caught.value.failed or not caught.value.failed
        polled: list[int] = []
        with pytest.raises(Full):
            both.put(piece, timeout=0.05, poll=lambda: polled.append(1))
        assert polled

        def stop() -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            both.put(piece, timeout=WAIT, poll=stop)
        for parcel in parcels:
            parcel.release(both.peer)
        again = [both.put(piece, timeout=1.0) for _ in range(len(parcels))]  # nothing was lost meanwhile
        for parcel in again:
            parcel.release(both.peer)

    def test_a_source_that_fails_leaves_nothing_taken(self, both: Both) -> None:
        broken = Broken(both.outbound.limit(both.peer) // 4)
        for _ in range(50):
            with pytest.raises(RuntimeError, match="broken source"):
                both.outbound.put([broken], [both.peer], timeout=1.0, poll=lambda: None).fill()

    def test_hostile_handles(self, both: Both) -> None:
        chance = random.Random(7)
        parcel = both.put([noise(100_000), noise(80)], timeout=1.0)
        load = parcel.load(both.peer)
        for name, handle in load.handles:
            for attempt in range(400):
                bad = mutated(handle, chance) if attempt % 2 else chance.randbytes(chance.randrange(80))
                nbytes = chance.choice([0, 1, 80, 100_000, 1 << 40])
                try:
                    view = both.inbounds[name].open(both.peer, bad, nbytes, load.frames)
                except (ProtocolError, PeerGone):
                    continue
                assert view.nbytes == nbytes
        for (name, handle), nbytes in zip(load.handles, (100_000, 80), strict=True):
            view = both.inbounds[name].open(both.peer, handle, nbytes, load.frames)
            assert view.tobytes() == raw(noise(nbytes)).tobytes()
        parcel.release(both.peer)

    def test_hostile_offers_and_answers(self, both: Both) -> None:
        chance = random.Random(8)
        stranger = Peer(99, "stranger", 1)
        offers = [chance.randbytes(chance.randrange(60)) for _ in range(100)]
        if both.offered:
            offers += [mutated(both.offered, chance) for _ in range(300)]
        for inbound in both.inbounds.values():
            for offer in offers:
                answer = inbound.accept(stranger, offer, "me")
                assert isinstance(answer, Proof | Refusal)
                inbound.settle(stranger, "no")
            inbound.drop(stranger)
        for offer in offers:
            assert isinstance(both.outbound.admit(stranger, Proof(offer)), str)
        both.outbound.drop(stranger)
        _, (view,) = both.send([noise(100_000)])  # and who was admitted still is
        assert view.tobytes() == raw(noise(100_000)).tobytes()

    def test_closing_twice_leaves_views_as_they_are(self, both: Both) -> None:
        _, (view,) = both.send([noise(100_000)])
        both.close()
        both.close()
        assert view.tobytes() == raw(noise(100_000)).tobytes()


class Both:
    """An outbound and the inbounds for it, introduced to each other without endpoints."""

    def __init__(self, config: TransportConfig) -> None:
        self.outbound: Outbound = registry.load(config.backend).outbound(config)
        self.inbounds: dict[str, Inbound] = registry.inbounds(config)
        self.peer = Peer(1, "reader", os.getpid())
        self.offered = b""
        if self.outbound.wants_offer(self.peer, [1 << 20]):
            inbound = self.inbounds[self.outbound.reads(self.peer)]
            self.offered = self.outbound.offer(self.peer)
            reason = self.outbound.admit(self.peer, inbound.accept(self.peer, self.offered, "reader"))
            assert not reason
            inbound.settle(self.peer, reason)
            deadline = time.monotonic() + WAIT
            while not self.outbound.serves(self.peer):  # a connection may still be made
                assert time.monotonic() < deadline, self.outbound.explain(self.peer)
                time.sleep(0.001)
            deadline = time.monotonic() + WAIT
            while not self.outbound.serves(self.peer):  # a connection may still be made
                assert time.monotonic() < deadline, self.outbound.explain(self.peer)
                time.sleep(0.001)

    def put(
        self, tensors: Sequence[Any], *, timeout: float, poll: Callable[[], object] = lambda: None
    ) -> Parcel:
        sources = [source for source in map(source_of, tensors) if source is not None]
        parcel = self.outbound.put(sources, [self.peer], timeout=timeout, poll=poll)
        parcel.fill()
        return parcel

    def send(self, tensors: Sequence[Any]) -> tuple[Parcel, list[Bytes]]:
        parcel = self.put(tensors, timeout=1.0)
        load = parcel.load(self.peer)
        views = [
            self.inbounds[name].open(self.peer, handle, tensor.nbytes, load.frames)
            for (name, handle), tensor in zip(load.handles, tensors, strict=True)
        ]
        return parcel, views

    def close(self) -> None:
        self.outbound.close()
        for inbound in self.inbounds.values():
            inbound.close()


class Broken(Source):
    """A source whose bytes cannot be read."""

    def __init__(self, nbytes: int) -> None:
        whole = source_of(torch.empty(nbytes, dtype=torch.uint8))
        assert whole is not None
        super().__init__(whole.spec, nbytes, whole.tensor)

    def fill(self, destination: Bytes, **options: Any) -> None:
        raise RuntimeError(f"broken source of {destination.nbytes} bytes, {options}")


def warm_up(front: Endpoint, near: Pumped) -> None:
    """Let the first tensor through, so that whoever must prove something has."""
    front.send({"value": noise(300_000)}, to=near.endpoint.name)
    near.next()


def acknowledged(front: Endpoint, timeout: float = 10.0) -> None:
    """Until what peers have said that they took is known here."""
    deadline = time.monotonic() + timeout
    while any(peer.unacknowledged for peer in front.peers):
        assert time.monotonic() < deadline, f"never acknowledged: {front.peers}"
        select.select([front], [], [], 0.01)


def left(front: Endpoint, timeout: float = 10.0) -> None:
    """Until it is known here that every peer has left."""
    deadline = time.monotonic() + timeout
    while front.peers:
        assert time.monotonic() < deadline, f"still there: {front.peers}"
        select.select([front], [], [], 0.01)


def repeated(call: Callable[[], object], times: int = 5000) -> None:
    """Call until it raises, which it must before so many times."""
    for _ in range(times):
        call()


def raw_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor as one, torch.uint8 [nbytes]."""
    return torch.from_numpy(raw(tensor))


def mutated(data: bytes, chance: random.Random) -> bytes:
    """Some bytes changed, cut or added."""
    changed = bytearray(data)
    for _ in range(chance.randrange(1, 4)):
        match chance.randrange(4):
            case 0 if changed:
                del changed[chance.randrange(len(changed)) :]
            case 1:
                changed += chance.randbytes(chance.randrange(1, 9))
            case _ if changed:
                changed[chance.randrange(len(changed))] = chance.randrange(256)
    return bytes(changed)
