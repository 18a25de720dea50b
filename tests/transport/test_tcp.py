"""Links over TCP with bulk connections: bad networks, slow readers, full rings, strangers, other hosts."""

from __future__ import annotations

import dataclasses
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import numpy as np
import pytest

import shm
import transport
from tests import leaks
from tests.crash.harness import left_by
from tests.transport.proxy import Proxy
from transport import Full, PeerGone, Timeout, TransportConfig
from transport.backends.base import Bytes, Peer, Refusal
from transport.backends.tcp import TcpInbound, TcpOutbound
from transport.bulk.handshake import MAGIC
from transport.bulk.hub import Hub
from transport.conformance import (
    WAIT,
    Pumped,
    acknowledged,
    joined,
    noise,
    repeated,
    running,
    same,
    serve,
    serving,
    warm_up,
)
from transport.message import Data
from transport.sources import Progress, Source
from transport.specs import TensorSpec

MIB = 1 << 20
ADDRESS = "tcp://127.0.0.1:0"


def config(**changes: Any) -> TransportConfig:
    fields = {"backend": "tcp", "ring_bytes": 8 * MIB, "detour_bytes": MIB, "timeout": WAIT}
    return TransportConfig(**{**fields, "admission_timeout": WAIT, **changes})


def outbound_of(endpoint: transport.Endpoint) -> TcpOutbound:
    part = endpoint._exchange.sender.outbound.part("tcp")
    assert isinstance(part, TcpOutbound)
    return part


def hub_of(endpoint: transport.Endpoint) -> Hub:
    return outbound_of(endpoint).hub


@contextmanager
def proxied(front: transport.Endpoint) -> Iterator[Proxy]:
    """A proxy that the peers of `front` are told to dial instead."""
    hub = hub_of(front)
    expect = hub.expect
    with Proxy() as proxy:

        def behind(peer: Peer, host: str) -> tuple[int, bytes]:
            proxy.to, token = expect(peer, host)
            return proxy.port, token

        hub.expect = behind  # type: ignore[method-assign]
        yield proxy


@contextmanager
def pair(**changes: Any) -> Iterator[tuple[transport.Endpoint, Pumped, Proxy]]:
    """Two endpoints of this process, the second pumped, with a proxy between them, and warm."""
    with ExitStack() as stack:
        front = stack.enter_context(transport.listen(ADDRESS, config=config(**changes)))
        proxy = stack.enter_context(proxied(front))
        near = stack.enter_context(joined(front, "near", config(**changes)))
        pumped = Pumped(near)
        stack.callback(pumped.stop)
        warm_up(front, pumped)
        acknowledged(front)
        yield front, pumped, proxy


class TestBadNetworks:
    def test_a_connection_cut_in_the_middle_goes_on_and_all_arrive_once(self) -> None:
        with pair() as (front, near, proxy):
            proxy.cuts = [proxy.forwarded + place for place in (100, 400_000, 700_000, 2_500_000)]
            for seed in range(4):
                front.send({"n": seed, "value": noise(2 * MIB, seed)}, to="near")
            for seed in range(4):
                body = near.next().body
                assert body["n"] == seed
                assert same(body["value"], noise(2 * MIB, seed))
            assert hub_of(front).statistics()["connections"] == 5
            assert not near.messages

    @pytest.mark.parametrize("place", [3, 39, 300_123, 1_200_000])
    def test_a_flipped_byte_is_seen_and_its_chunk_sent_again(self, place: int) -> None:
        with pair() as (front, near, proxy):
            proxy.flips = [proxy.forwarded + place]
            front.send({"value": noise(2 * MIB, place)}, to="near")
            assert same(near.next().body["value"], noise(2 * MIB, place))
            assert not proxy.flips
            assert hub_of(front).statistics()["connections"] == 2

    def test_a_network_that_only_damages_ends_the_link_by_name(self) -> None:
        with pair() as (front, _, proxy):
            proxy.flips = list(range(proxy.forwarded + 1000, proxy.forwarded + (64 << 20), 70_000))
            with suppress(PeerGone):
                front.send({"value": noise(2 * MIB)}, to="near")
            with pytest.raises(PeerGone, match="near.*nothing but damage"):
                until_it_fails(partial(pump_and_send, front, {}))

    def test_a_network_that_stands_still_is_slow_and_loses_nothing(self) -> None:
        with pair() as (front, near, proxy):
            proxy.stall()
            with pytest.raises(Full, match="near"):
                repeated(partial(front.send, {"value": noise(MIB, 1)}, to="near", timeout=0.2))
            count = front.statistics()["sent"]["messages"] - 1  # without the one that warmed it up
            front.send({"small": True}, to="near", timeout=1.0)  # has a way of its own
            assert near.next().body == {"small": True}
            proxy.stalled.clear()
            assert all(same(near.next().body["value"], noise(MIB, 1)) for _ in range(count - 1))

    def test_bytes_that_are_still_to_come_are_counted_and_their_sender_named(self) -> None:
        with pair() as (front, near, proxy):
            near.stop()
            proxy.stall()
            front.send({"value": noise(MIB)}, to="near")
            who, what = rf"'front' \(pid {os.getpid()}\)", "nothing was announced"
            queue = near.endpoint._exchange.receiver.queue
            until(lambda: bool(near.endpoint.peers and queue))
            with pytest.raises(
                Timeout,
                match=rf"message 2 from {who} at \S+, the first of 1 there, waits for its bytes: {what}",
            ):
                near.endpoint.receive(timeout=0.1)
            waiting = queue[0]
            assert isinstance(waiting.message, Data)
            handle = bytes(waiting.message.tensors[0].handle)
            inbound = near.endpoint._exchange.receiver.inbounds["tcp"]
            with pytest.raises(Timeout, match=rf"a tensor of {who} are still to come: {what}"):
                inbound.open(waiting.link.peer, handle, MIB, ())
            proxy.stalled.clear()
            assert same(near.endpoint.receive().body["value"], noise(MIB))

    def test_a_connection_that_fails_again_and_again_is_one_line(
        self, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with pair() as (front, near, _):
            (link,) = near.endpoint._exchange.roster.links()
            channel = hub_of(near.endpoint).channel(link.peer)
            assert channel is not None
            monkeypatch.setattr(channel.arriving, "arrived", None)
            with suppress(PeerGone):
                front.send({"value": noise(MIB)}, to="near")
            until(lambda: "nothing but damage" in channel.fault)
        (line,) = [record for record in caplog.records if "the bulk connection with" in record.message]
        assert line.message == f"the bulk connection with 'front' (pid {os.getpid()}) failed"
        assert line.exc_info is not None

    def test_a_connection_that_cannot_be_made_again_ends_the_link_in_time(self) -> None:
        with pair(tcp_timeout=1.0) as (front, near, proxy):
            proxy.closed.set()
            proxy.cut()
            with pytest.raises(PeerGone, match="near.*the bulk connection is lost for 1 s"):
                until_it_fails(partial(pump_and_send, front, {"value": noise(100_000)}))
            near.stop()
            until(lambda: "the bulk connection is lost" in why_gone(near.endpoint))
            # Nothing has to be started again: the next link has a connection of its own.
            proxy.closed.clear()
            thread = threading.Thread(target=near.endpoint.connect, args=(front.addresses[0],))
            thread.start()
            front.wait_for_peers({"near"}, timeout=WAIT)
            thread.join()
            again = Pumped(near.endpoint)
            front.send({"value": noise(MIB)}, to="near")
            assert same(again.next().body["value"], noise(MIB))
            again.stop()

    def test_auto_goes_by_frames_where_no_bulk_connection_can_be_made(self) -> None:
        options = {"backend": "auto", "handshake_timeout": 1.0}
        with transport.listen(ADDRESS, config=config(**options)) as front, proxied(front) as proxy:
            proxy.closed.set()
            with elsewhere(front, "far", options):
                front.send({"do": "echo", "value": noise(300_000)}, to="far")
                assert same(front.receive().body["value"], noise(300_000))
                (far,) = front.peers
                assert far.backend.startswith("frames; not shm: ")
                assert "not tcp" in far.backend

    def test_a_peer_that_does_not_come_is_given_up_in_time_whoever_else_there_was(self) -> None:
        with transport.listen(ADDRESS, config=config(handshake_timeout=0.3)) as front:
            hub = hub_of(front)
            for link in (1, 2):  # the second one meets a thread that sleeps
                hub.expect(Peer(link, f"peer {link}", 1, ADDRESS), "127.0.0.1")
                channel = hub._ways[link].channel
                until(partial(getattr, channel, "fault"))
                assert channel.fault == "the peer did not connect in 0.3 s: no answer"


class InSteps(Source):
    """Writes one half, waits until it may go on, then writes the other half or fails."""

    def __init__(self, nbytes: int, *, fails: bool) -> None:
        super().__init__(TensorSpec("|u1", (nbytes,)), nbytes, None)
        self.go_on = threading.Event()
        self._fails = fails

    def fill(self, destination: Bytes, *, progress: Progress | None = None, **_: int) -> None:
        half = self.nbytes // 2
        destination[:half] = 1
        assert progress is not None
        progress(half)
        assert self.go_on.wait(WAIT)
        if self._fails:
            raise RuntimeError("the second half cannot be read")
        destination[half:] = 2
        progress(self.nbytes)


class TestCutThrough:
    @pytest.mark.parametrize("fails", [False, True])
    def test_what_is_written_leaves_while_the_rest_is_copied(self, fails: bool) -> None:
        with pair(ring_bytes=16 * MIB) as (front, near, proxy), ThreadPoolExecutor(1) as pool:
            outbound, source = outbound_of(front), InSteps(4 * MIB, fails=fails)
            (link,) = front._exchange.roster.links()
            before = proxy.forwarded
            putting = pool.submit(outbound.put, [source], [link.peer], timeout=WAIT, poll=lambda: None)
            until(lambda: proxy.forwarded > before + 2 * MIB)
            assert not putting.done()
            source.go_on.set()
            if fails:
                with pytest.raises(RuntimeError, match="the second half"):
                    putting.result(WAIT)
            else:
                parcel = putting.result(WAIT)
                until(lambda: outbound.flush(0.0))
                parcel.release(link.peer)
                del parcel
                assert proxy.forwarded > before + 4 * MIB
            del putting
            front.send({"value": noise(3 * MIB)}, to="near")
            assert same(near.next().body["value"], noise(3 * MIB))
            until(lambda: bool(front.peers) and used(front) == used(near.endpoint) == 0)


def held_up(endpoint: transport.Endpoint) -> str:
    """What an endpoint's only peer says that its transfers wait for."""
    (way,) = hub_of(endpoint)._ways.values()
    return way.channel.held


def used(endpoint: transport.Endpoint) -> int:
    """The bytes of an endpoint's ring that are taken."""
    figures = outbound_of(endpoint).ring.statistics()["ring"]
    assert isinstance(figures, shm.RingStatistics)
    return figures.used


def until(condition: Callable[[], bool]) -> None:
    """Wait for what must come true before long."""
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def until_full(call: Callable[[], object], said: str) -> Full:
    """Call until it is `Full` with these words: what the other side says is on its way for a while."""
    deadline = time.monotonic() + WAIT
    while True:
        with pytest.raises(Full) as caught:
            repeated(call)
        if re.search(said, str(caught.value)):
            return caught.value
        assert time.monotonic() < deadline, caught.value


def until_it_fails(call: Callable[[], object]) -> None:
    """Call until it raises, which it must before long."""
    deadline = time.monotonic() + WAIT
    while time.monotonic() < deadline:
        call()
        time.sleep(0.01)


def why_gone(endpoint: transport.Endpoint) -> str:
    """What the next message that cannot come any more says, and when there is none the link."""
    with pytest.raises(PeerGone) as caught:
        endpoint.receive(timeout=WAIT)
    return str(caught.value)


def pump_and_send(endpoint: transport.Endpoint, body: Any) -> None:
    with suppress(Full):
        endpoint.send(body, to="near", timeout=0.1)


@contextmanager
def elsewhere(front: transport.Endpoint, name: str, options: dict[str, Any]) -> Iterator[None]:
    """A peer with another /dev/shm, as on another host."""
    fields = dataclasses.asdict(config(**options))
    with running(serve_elsewhere, front.addresses[-1], name, fields) as process:
        front.wait_for_peers({name}, timeout=WAIT)
        yield
        front.send({"do": "stop"}, to=name)
        process.join(WAIT)


def serve_elsewhere(address: str, name: str, fields: dict[str, Any]) -> None:
    assert leaks.own_shared_memory()
    serve(address, name, fields)


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="another /dev/shm needs root")


class TestAuto:
    @needs_root
    def test_tcp_where_memory_is_not_shared_and_shm_where_it_is(self) -> None:
        options = {"backend": "auto"}
        fields = dataclasses.asdict(config(**options))
        with (
            transport.listen(ADDRESS, config=config(**options)) as front,
            elsewhere(front, "far", options),
            serving(front, "here", fields),
        ):
            front.send({"do": "sum", "value": noise(MIB)}, to=["far", "here"])
            assert {front.receive().sender for _ in range(2)} == {"far", "here"}
            backends = {peer.name: peer.backend for peer in front.peers}
            assert backends["here"] == "shm: the peer proved that it maps the ring"
            assert backends["far"].startswith("tcp: a bulk connection at 127.0.0.1; not shm: ")
            sent = front.statistics()["backend"]["nbytes"]
            assert (sent["tcp"], sent["shm"]) == (MIB, MIB)
            # The bytes are in the ring once, for both.
            assert front.statistics()["backend"]["shm"]["ring"].records == 1
            for value in (noise(100), noise(3 * MIB)):
                front.send({"do": "echo", "value": value}, to="far")
                assert same(front.receive().body["value"], value)

    @needs_root
    def test_what_has_landed_is_handed_on_out_of_the_ring_without_a_copy(self) -> None:
        options = {"backend": "auto"}
        fields = dataclasses.asdict(config(**options))
        with (
            transport.listen(ADDRESS, config=config(**options)) as front,
            elsewhere(front, "far", options),
            serving(front, "here", fields),
        ):
            front.send({"do": "echo", "value": noise(MIB)}, to="far")
            message = front.receive()
            records = front.statistics()["backend"]["shm"]["ring"].records
            message.body["do"] = "sum"
            front.send(message.body, to="here")
            front.receive()
            assert front.statistics()["backend"]["shm"]["ring"].records == records
            assert front.statistics()["backend"]["nbytes"]["shm"] == MIB


class TestLimits:
    def test_a_peer_that_does_not_receive_bounds_both_sides_and_is_named(self) -> None:
        with pair(tcp_window=2 * MIB, inline_below=0) as (front, near, _):
            near.stop()
            why = r"near has \d+ bytes unacknowledged; 500000 bytes more would exceed tcp_window"
            with pytest.raises(Full, match=why) as caught:
                repeated(partial(front.send, {"value": noise(500_000)}, to="near", timeout=0.3))
            assert list(caught.value.failed) == ["near"]
            assert used(near.endpoint) <= 2 * MIB
            until(lambda: used(front) <= 2 * MIB)  # what was acknowledged is let go of in another thread
            near = Pumped(near.endpoint)  # nothing is lost
            for _ in range(4):
                assert same(near.next().body["value"], noise(500_000))
            near.stop()

    def test_what_is_on_its_way_or_kept_is_seen_from_outside_at_both_ends(self) -> None:
        with pair(tcp_window=2 * MIB) as (front, near, _):
            front.send({"value": noise(MIB)}, to="near")
            kept = near.next()
            acknowledged(front)
            near.stop()
            front.send({"value": noise(MIB, 1)}, to="near")
            until(lambda: used(front) == MIB and used(near.endpoint) == 2 * MIB)
            for endpoint, records in ((front, 1), (near.endpoint, 2)):
                info = shm.describe(outbound_of(endpoint).ring.ring().name)
                assert (info.unpublished, info.unpublished_nbytes) == (records, records * MIB)
                assert info.largest_free == (8 - records) * MIB
            assert same(kept.body["value"], noise(MIB))

    def test_a_window_that_is_smaller_at_the_receiver_is_told(self) -> None:
        with (
            transport.listen(ADDRESS, config=config(inline_below=0)) as front,
            joined(front, "near", config(tcp_window=MIB)) as endpoint,
        ):
            near = Pumped(endpoint)
            warm_up(front, near)
            near.stop()
            send = partial(front.send, {"value": noise(500_000)}, to="near", timeout=0.3)
            until_full(send, "near says: .* were granted and not taken")
            assert used(endpoint) <= MIB

    def test_leases_held_bound_what_lands_and_others_go_on(self) -> None:
        with pair() as (front, near, _), joined(front, "other", config()) as third:
            sent: list[int] = []

            def one_more() -> None:
                front.send({"value": noise(500_000, len(sent))}, to="near", timeout=0.5)
                sent.append(len(sent))

            until_full(one_more, "near says: a peer's share of the ring .* beside it")
            other = Pumped(third)
            front.send({"value": noise(MIB)}, to="other")
            assert same(other.next().body["value"], noise(MIB))
            other.stop()
            for number in sent:
                assert same(near.next().body["value"], noise(500_000, number))
            front.send({"value": noise(MIB)}, to="near")
            assert same(near.next().body["value"], noise(MIB))

    @pytest.mark.parametrize("then", ["room comes", "it leaves", "it is cut off"])
    def test_room_in_the_ring_goes_to_who_waits_longest(self, then: str) -> None:
        options = config(detour_bytes=1 << 16, peer_share=0.9, linger=0.0)
        with (
            transport.listen(ADDRESS, config=options) as front,
            joined(front, "keeper", options) as keeper,
            joined(front, "large", options) as large,
            joined(front, "small", options) as small,
        ):
            here = Pumped(front)
            for peer in (keeper, large, small):
                peer.send({"value": noise(300_000)})  # so that there is a connection
                here.next()
            for _ in range(6):
                keeper.send({"value": noise(MIB)})
            kept = [here.next() for _ in range(6)]
            large.send({"value": noise(5 * MIB)})
            until(lambda: "no room in the ring" in held_up(large))
            small.send({"value": noise(MIB)})
            until(lambda: bool(held_up(small) or here.messages))
            assert "another peer waits for it" in held_up(small)
            match then:
                case "room comes":  # for both: which has landed first is not said
                    kept.clear()
                    assert {here.next().sender, here.next().sender} == {"large", "small"}
                    here.stop()
                    return
                case "it leaves":
                    large.close()
                case "it is cut off":
                    hub = hub_of(front)
                    (channel,) = (
                        way.channel for way in hub._ways.values() if way.channel.peer.name == "large"
                    )
                    hub.tell(partial(channel.detach, "cut"))
            assert here.next().sender == "small"
            if then == "it is cut off":  # it lost its place, and no more
                kept.clear()
                assert here.next().sender == "large"
            here.stop()

    def test_who_closes_before_its_bytes_came_is_gone(self) -> None:
        """And has broken no rule, whichever of its last words is heard first."""
        options = config(detour_bytes=1 << 16, linger=0.0)
        with transport.listen(ADDRESS, config=options) as front:
            with joined(front, "far", options) as far, ThreadPoolExecutor(1) as pool:
                first = pool.submit(far.send, {"value": noise(3 * MIB)})
                kept = front.receive(timeout=WAIT)
                first.result(WAIT)
                far.send({"value": noise(3 * MIB)})
                until(lambda: "share of the ring is used up" in held_up(far))
                until(lambda: bool(front.peers and front._exchange.receiver.queue))
            with pytest.raises(PeerGone, match="far.* (gave its tensor up|tensor did not all come)"):
                front.receive(timeout=WAIT)
            assert same(kept.body["value"], noise(3 * MIB))

    def test_a_peer_that_comes_back_has_no_second_share(self) -> None:
        options = config(linger=0.0)
        with transport.listen(ADDRESS, config=options) as front:
            here = Pumped(front)
            for _ in range(2):
                with transport.connect(front.addresses[0], name="far", config=options, timeout=WAIT) as far:
                    far.send({"value": noise(500_000)})
                    send = partial(far.send, {"value": noise(500_000)}, timeout=0.5)
                    until_full(send, "front says: a peer's share of the ring .* beside it")
            assert sum(message.body["value"].nbytes for message in here.messages) <= (4 + 1) * MIB
            here.stop()

    def test_two_that_only_send_get_full_and_then_everything(self) -> None:
        with pair() as (front, near, _):
            near.stop()
            counts = dict.fromkeys(("front", "near"), 0)

            def fill(sender: transport.Endpoint) -> None:
                with suppress(Full):
                    while True:
                        sender.send({"value": noise(700_000)}, timeout=0.5)
                        counts[sender.name] += 1

            threads = [threading.Thread(target=fill, args=(end,)) for end in (front, near.endpoint)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert min(counts.values()) > 0
            ends = {"near": Pumped(front), "front": Pumped(near.endpoint)}
            for sender, end in ends.items():
                for _ in range(counts[sender]):
                    assert same(end.next().body["value"], noise(700_000))
                end.stop()

    def test_without_a_ring_it_goes_beside_it(self) -> None:
        huge = {"ring_bytes": 1 << 46}
        with (
            transport.listen(ADDRESS, config=config(**huge)) as front,
            joined(front, "near", config(**huge)) as endpoint,
        ):
            near = Pumped(endpoint)
            for seed, nbytes in enumerate((300_000, 3 * MIB)):
                front.send({"value": noise(nbytes, seed)}, to="near")
                assert same(near.next().body["value"], noise(nbytes, seed))
            near.stop()

    def test_small_messages_overtake_and_large_ones_keep_their_order(self) -> None:
        with pair() as (front, near, proxy):
            proxy.stall()
            for number in range(3):
                front.send({"n": number, "value": noise(300_000, number)}, to="near")
                front.send({"small": number}, to="near")
            assert [near.next().body["small"] for _ in range(3)] == [0, 1, 2]
            proxy.stalled.clear()
            for number in range(3):
                body = near.next().body
                assert body["n"] == number
                assert same(body["value"], noise(300_000, number))


class TestNotReached:
    """Control messages come through, bulk connections do not."""

    def test_what_goes_wrong_is_said_while_it_is_still_tried(self) -> None:
        with (
            transport.listen(ADDRESS, config=config(backend="auto")) as front,
            socket.socket() as nobody,
        ):
            nobody.bind(("127.0.0.1", 0))  # and does not listen
            hub, port = hub_of(front), nobody.getsockname()[1]
            expect = hub.expect
            hub.expect = lambda peer, host: (port, expect(peer, host)[1])  # type: ignore[method-assign]
            with joined(front, "near", config(backend="auto")) as near:
                there, here = near._exchange.roster.links()[0].peer, front._exchange.roster.links()[0].peer
                said = outbound_of(near).explain
                assert said(there) == "not tcp yet: no need"
                answer = near._exchange.receiver.inbounds["tcp"].accept(
                    there, outbound_of(front).offer(here), "near"
                )
                assert not isinstance(answer, Refusal)
                assert outbound_of(front).admit(here, answer) == ""
                assert "no bulk connection so far" in outbound_of(front).explain(here)
                deadline = time.monotonic() + WAIT
                while "refused" not in said(there) and time.monotonic() < deadline:
                    time.sleep(0.01)
                assert said(there) == "not tcp yet: no bulk connection so far: Connection refused"

    def test_a_port_that_is_taken_is_named_with_its_option(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            with (
                transport.listen(ADDRESS, config=config(tcp_port=port)) as front,
                joined(front, "near", config()) as near,
            ):
                pumped = Pumped(near)
                why = rf"bulk connections \(tcp_port {port}\): Address already in use; 'near'"
                with pytest.raises(transport.Full, match=why):
                    front.send({"x": np.ones(1 << 20)}, timeout=0.5)
                pumped.stop()


class TestStrangers:
    """Whoever reaches the port of the bulk connections, and does not know the secret."""

    def test_a_stranger_gets_nothing_and_disturbs_nobody(self) -> None:
        with pair() as (front, near, proxy):
            port, meeting = proxy.to, hub_of(front)._meeting
            # The peer has its connection already: only strangers have so little time.
            meeting._config = dataclasses.replace(meeting._config, handshake_timeout=1.0)
            link = next(iter(hub_of(front)._ways))
            hello = MAGIC + link.to_bytes(8, "little")
            for greeting in (
                b"x" * 32,
                hello + secrets.token_bytes(16),
                bytes(32),
                b"GET / HTTP/1.1\r\n" * 9,
            ):
                with socket.create_connection(("127.0.0.1", port), timeout=WAIT) as stranger:
                    stranger.sendall(greeting)
                    assert closed(stranger)
            silent = [socket.create_connection(("127.0.0.1", port), timeout=WAIT) for _ in range(50)]
            front.send({"value": noise(MIB)}, to="near")
            assert same(near.next().body["value"], noise(MIB))
            for stranger in silent:
                assert closed(stranger)  # in time, and those that are too many at once
                stranger.close()

    def test_strangers_that_say_nothing_keep_no_peer_from_its_connection(self) -> None:
        options = config()
        with ExitStack() as stack:
            front = stack.enter_context(transport.listen(ADDRESS, config=options))
            near = Pumped(stack.enter_context(joined(front, "near", options)))
            stack.callback(near.stop)
            warm_up(front, near)
            (listener,) = hub_of(front)._listeners.values()
            port = listener.getsockname()[1]
            for _ in range(40):
                stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=WAIT))
            other = Pumped(stack.enter_context(joined(front, "other", options)))
            stack.callback(other.stop)
            front.send({"value": noise(MIB)}, to="other")
            assert same(other.next().body["value"], noise(MIB))

    def test_terms_that_lead_elsewhere_are_refused(self) -> None:
        inbound = TcpInbound(config())
        accepted = Peer(7, "stranger", 1, "tcp://127.0.0.1:29550")
        offer = TcpOutbound(config())
        try:
            terms = offer.offer(Peer(7, "front", 1, "tcp://127.0.0.1:1"))
            answer = inbound.accept(accepted, terms, "me")
            assert "who made the link" in str(answer)
        finally:
            offer.close()
            inbound.close()


def closed(stranger: socket.socket) -> bool:
    try:
        return stranger.recv(1) == b""
    except ConnectionResetError:
        return True


class TestProcesses:
    def test_a_forked_child_keeps_no_bulk_connection(self) -> None:
        with pair() as (front, _, _):
            hub = hub_of(front)
            child = os.fork()
            if not child:
                kept = [c.socket.fileno() for _, c in hub._connected.values()]
                os._exit(0 if not hub._poller.opened and set(kept) == {-1} else 1)
            assert os.waitpid(child, 0)[1] == 0

    def test_a_peer_that_comes_back_under_its_name_is_sent_to(self) -> None:
        fields, pids = dataclasses.asdict(config()), set[int]()
        with transport.listen(ADDRESS, config=config()) as front:
            for seed in range(2):
                with running(serve, front.addresses[-1], "peer", fields) as process:
                    pid = process.pid or 0
                    front.wait_for_peers({"peer"}, timeout=WAIT)
                    front.send({"do": "hold", "value": noise(MIB, seed)}, to="peer")
                    front.send({"do": "held"}, to="peer")
                    front.receive()
                    process.kill()
                with pytest.raises(PeerGone, match="peer"):
                    until_it_fails(partial(front.send, {}, to="peer"))
                pids.add(pid)
            until(lambda: used(front) == 0)
        assert left_by(pids) == []


def test_a_view_of_what_landed_is_read_only_and_outlives_the_link() -> None:
    with pair() as (front, near, _):
        front.send({"value": np.arange(100_000)}, to="near")
        value = near.next().body["value"]
    assert np.array_equal(value, np.arange(100_000))
    with pytest.raises(ValueError, match="read-only"):
        value[0] = 1
