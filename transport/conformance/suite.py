"""The suite itself: what every backend must do."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from multiprocessing.process import BaseProcess
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from transport.backends.base import Parcel, Peer, Proof, Refusal
from transport.config import TransportConfig
from transport.conformance.pair import Both, Broken, repeated
from transport.conformance.peers import WAIT, Pumped, acknowledged, joined, left, serving, warm_up
from transport.conformance.samples import (
    Note,
    Request,
    digest,
    mutated,
    noise,
    raw,
    raw_tensor,
    same,
    tensors,
)
from transport.endpoint import Endpoint, listen
from transport.errors import Full, PeerGone, ProtocolError
from transport.received import Message
from transport.tensors import concat, stack


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
        sent = tensors()
        came = self.echoed(front, sent)
        assert came.keys() == sent.keys()
        wrong = [name for name, tensor in sent.items() if not same(tensor, came[name])]
        assert not wrong

    @pytest.mark.usefixtures("peer")
    def test_one_at_a_time_as_well(self, front: Endpoint) -> None:
        for name in ("0-d", "empty", "transposed", "torch.bfloat16", "numpy >i8", "1 MiB and a bit, strided"):
            tensor = tensors()[name]
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
        front = listen(self.address(folder, "short"), config=self.config(linger=WAIT))
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

    def test_what_a_peer_sent_before_close_still_arrives(self, front: Endpoint) -> None:
        with joined(front, "near", self.config(linger=WAIT)) as near:
            answering = Pumped(front)
            near.send({"value": noise(300_000)})
            view = answering.next().body["value"]
            answering.stop()
            near.try_send({"value": noise(300_000, 2)})
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
        with pytest.raises(Full):
            both.put(piece, timeout=0.05)

        def stop() -> None:  # it is called, however long the wait would last
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            both.put(piece, timeout=WAIT, poll=stop)
        for parcel in parcels:
            parcel.release(both.peer)
        again = [both.put(piece, timeout=WAIT) for _ in range(len(parcels))]  # nothing was lost meanwhile
        for parcel in again:
            parcel.release(both.peer)

    def test_a_source_that_fails_leaves_nothing_taken(self, both: Both) -> None:
        broken = Broken(both.outbound.limit(both.peer) // 4)
        for _ in range(50):
            with pytest.raises(RuntimeError, match="broken source"):
                both.outbound.put([broken], [both.peer], timeout=WAIT, poll=lambda: None).fill()

    def test_hostile_handles(self, both: Both) -> None:
        chance = random.Random(7)
        parcel = both.put([noise(100_000), noise(80)], timeout=WAIT)
        load = both.loaded(parcel)
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
