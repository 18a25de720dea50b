"""Loans: produced in place, sent any number of times, given back; and messages that are passed on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import shm
import transport
from tests.crash.harness import until
from transport.backends.shm import ShmOutbound
from transport.conformance import WAIT, Pumped, digest, joined, noise, same, serving

MIB = 1 << 20
CONFIG = transport.TransportConfig(backend="auto", ring_bytes=8 * MIB, peer_share=1.0, timeout=WAIT)
OPTIONS = {"backend": "auto", "ring_bytes": 8 * MIB, "timeout": WAIT}


@pytest.fixture
def front(address: str) -> Iterator[transport.Endpoint]:
    with transport.listen(address, config=CONFIG) as endpoint:
        yield endpoint


@pytest.fixture
def near(front: transport.Endpoint) -> Iterator[Pumped]:
    with joined(front, "near", CONFIG) as endpoint:
        pumped = Pumped(endpoint)
        front.send({"x": noise(MIB)}, to="near")
        pumped.next()
        yield pumped
        pumped.stop()


def ring(front: transport.Endpoint) -> shm.RingStatistics:
    statistics = front.statistics()["backend"]["shm"]["ring"]
    assert isinstance(statistics, shm.RingStatistics)
    return statistics


def comes_back(front: transport.Endpoint) -> None:
    """Nothing in the ring is held any more: what peers took they acknowledge, each in its own time."""
    until(lambda: ring(front).live == 0, "all space comes back")


def test_a_loan_is_not_copied(front: transport.Endpoint, near: Pumped) -> None:
    records = ring(front).records
    with front.loan((MIB,), torch.uint8) as out:
        assert ring(front).used >= MIB
        out[:] = noise(MIB)
        front.send({"x": out}, to="near")
        assert ring(front).records == records + 1  # the loan's own, and no second one for the message
    del out
    body = near.next().body
    assert same(body["x"], noise(MIB))
    del body
    comes_back(front)


def test_slices_and_several_in_one_message(front: transport.Endpoint, near: Pumped) -> None:
    with (
        front.loan((512, 1024), torch.float32) as one,
        front.loan((512, 1024), np.dtype(np.float32)) as other,
    ):
        one[:] = torch.arange(512.0)[:, None]
        other[:] = -1
        records = ring(front).records
        front.send(
            {"rows": one[100:300], "last": one[511], "other": other[5:], "strided": one[:, ::2]}, to="near"
        )
        assert ring(front).records == records + 1  # only what is not contiguous is copied
    del one, other
    body = near.next().body
    assert same(body["rows"], torch.arange(100.0, 300.0)[:, None].expand(200, 1024))
    assert same(body["last"], torch.full((1024,), 511.0))
    assert same(body["other"], np.full((507, 1024), -1, np.float32))
    assert same(body["strided"], torch.arange(512.0)[:, None].expand(512, 512))
    del body
    comes_back(front)


def test_sent_twice_and_to_several(front: transport.Endpoint, near: Pumped) -> None:
    with joined(front, "other", CONFIG) as endpoint:
        other = Pumped(endpoint)
        front.send({"x": noise(MIB)}, to="other")
        other.next()
        with front.loan((MIB,), torch.uint8) as out:
            out[:] = noise(MIB, 3)
            records = ring(front).records
            front.send({"x": out}, to=["near", "other"])
            front.send({"x": out}, to="near")
            front.send({"x": out[: MIB // 2]}, to="other")
            assert ring(front).records == records
        del out
        assert same(near.next().body["x"], noise(MIB, 3))
        assert same(near.next().body["x"], noise(MIB, 3))
        assert same(other.next().body["x"], noise(MIB, 3))
        assert same(other.next().body["x"], noise(MIB, 3)[: MIB // 2])
        other.stop()
    comes_back(front)


@pytest.mark.parametrize("how", ["never sent", "exception", "dropped before it was sent"])
def test_what_is_not_sent_is_given_back(front: transport.Endpoint, near: Pumped, how: str) -> None:
    for _ in range(20):  # 40 MiB through a ring of 8
        if how == "exception":
            with pytest.raises(ZeroDivisionError), front.loan((2 * MIB,), torch.uint8) as out:
                out[:] = 1 // 0
            del out
        else:
            with front.loan((2 * MIB,), torch.uint8) as out:
                assert ring(front).used >= 2 * MIB
                if how == "dropped before it was sent":
                    del out
    if how == "never sent":
        del out
    comes_back(front)
    assert front.statistics()["backend"]["detours"] == {}


@pytest.mark.usefixtures("near")
def test_a_loan_that_was_not_entered_is_refused_with_what_to_do(front: transport.Endpoint) -> None:
    with pytest.raises(TypeError, match=r"body\['x'\]: cannot send .* what `with … as tensor:` gives"):
        front.send({"x": front.loan((4,), torch.uint8)}, to="near")


def test_a_view_keeps_a_loan(front: transport.Endpoint, near: Pumped) -> None:
    with front.loan((2 * MIB,), torch.uint8) as out:
        view = out[5:9]
        out[:] = 7
    del out
    assert ring(front).used >= 2 * MIB
    front.send({"x": noise(MIB)}, to="near")
    near.next()
    assert view.tolist() == [7] * 4
    del view
    comes_back(front)


def test_a_loan_outlives_its_endpoint(front: transport.Endpoint) -> None:
    with front.loan((MIB,), torch.uint8) as out:
        out[:] = 5
        front.close()
        assert int(out.sum(dtype=torch.int64)) == 5 * MIB
        out[:] = 6
    assert int(out[-1]) == 6


def test_nobody_makes_a_ring_that_was_closed_before() -> None:
    """As in a thread that is in the middle of a loan when another one closes the endpoint."""
    outbound = ShmOutbound(CONFIG)
    outbound.close()
    with pytest.raises(transport.TransportError):
        outbound.lend(MIB, 0.0, lambda: None)
    assert not outbound.can_be()
    assert "ring" not in outbound.statistics()


def test_without_room_it_is_a_plain_tensor(front: transport.Endpoint, near: Pumped) -> None:
    with front.loan((6 * MIB,), torch.uint8) as large, front.loan((6 * MIB,), torch.uint8) as plain:
        large[:] = 1
        plain[:] = 2
        assert front.statistics()["backend"]["detours"] == {
            "loan: ring full (bytes)": {"messages": 1, "nbytes": 6 * MIB}
        }
        front.send({"x": large}, to="near")
        del large
        assert same(near.next().body["x"], torch.ones(6 * MIB, dtype=torch.uint8))
    with front.loan((9 * MIB,), torch.uint8) as larger:
        larger[:] = 3
        front.send({"x": larger}, to="near")
    assert same(near.next().body["x"], torch.full((9 * MIB,), 3, dtype=torch.uint8))


def test_shm_alone_has_to_have_room(address: str) -> None:
    config = transport.TransportConfig(backend="shm", ring_bytes=8 * MIB, timeout=WAIT)
    with transport.listen(address, config=config) as front, front.loan((6 * MIB,), torch.uint8):
        with (
            pytest.raises(transport.Full, match="the ring of 8 MiB"),
            front.loan((6 * MIB,), torch.uint8, timeout=0.1),
        ):
            pass
        with pytest.raises(transport.TooLarge), front.loan((9 * MIB,), torch.uint8):
            pass


@pytest.mark.parametrize(
    ("shape", "dtype", "error"), [((-1,), torch.float32, ValueError), ((3,), object, TypeError)]
)
def test_loans_that_cannot_be(
    front: transport.Endpoint, shape: tuple[int, ...], dtype: type, error: type[Exception]
) -> None:
    with pytest.raises(error), front.loan(shape, dtype):
        pass


# ------------------------------------------------------------------------------------ forward


def test_a_peer_that_maps_the_ring_gets_the_handle(
    front: transport.Endpoint, near: Pumped, short_path: Path
) -> None:
    relay_address = f"ipc://{short_path}/relay.sock"
    with joined(front, "far", CONFIG) as far_endpoint:
        relay = near.endpoint
        relay.listen(relay_address)
        far = Pumped(far_endpoint)
        front.send({"x": noise(MIB)}, to="far")
        far.next()
        far.stop()
        far_endpoint.connect(relay_address, timeout=WAIT)  # relay is pumped by its thread
        until(lambda: reads_rings(relay, "far"), "it is known what far maps")
        far = Pumped(far_endpoint)

        front.send({"x": noise(MIB, 2)}, to="near")
        message = near.next()
        assert relay.forward(message, to="far") == 1
        del message  # and its view: the record stays until the next reader has it open
        came = far.next()
        assert came.sender == "near"
        assert same(came.body["x"], noise(MIB, 2))
        sent = relay.statistics()["sent"]
        assert (sent["forwarded"], sent["handed on"]) == (1, 1)
        assert relay.statistics()["backend"]["nbytes"] == {}  # no byte was sent anew
        assert ring(front).used >= MIB
        relay.forward(came_again(front, near), to="far")
        assert same(far.next().body["x"], noise(MIB, 4))
        assert same(came.body["x"], noise(MIB, 2))
        del came
        far.stop()
        comes_back(front)


def reads_rings(endpoint: transport.Endpoint, name: str) -> bool:
    """Whether a peer has said that it maps rings, which it does by itself."""
    link = endpoint._exchange.roster.named(name)
    return link is not None and bool(link.stores)


def came_again(front: transport.Endpoint, near: Pumped) -> transport.Message:
    front.send({"x": noise(MIB, 4)}, to="near")
    return near.next()


def test_others_get_the_bytes(front: transport.Endpoint, near: Pumped, short_path: Path) -> None:
    relay = near.endpoint
    relay.listen(f"ipc://{short_path}/relay.sock")
    with joined(relay, "far", CONFIG) as far_endpoint:  # knows the relay only
        far = Pumped(far_endpoint)
        for seed, size in enumerate((MIB, 100, 0, 20 * MIB)):  # the last in parts, both times
            front.send({"x": [noise(size, seed)]}, to="near")
            message = near.next()
            assert relay.forward(message, to="far") == 0
            del message
            assert same(far.next().body["x"][0], noise(size, seed))
        assert relay.statistics()["sent"]["handed on"] == 0
        far.stop()


def test_a_copy_is_not_handed_on_by_its_handle(
    front: transport.Endpoint, near: Pumped, short_path: Path
) -> None:
    relay_address = f"ipc://{short_path}/relay.sock"
    with joined(front, "far", CONFIG) as far_endpoint:
        near.endpoint.listen(relay_address)
        far = Pumped(far_endpoint)
        front.send({"x": noise(MIB)}, to="far")
        far.next()
        far.stop()
        far_endpoint.connect(relay_address, timeout=WAIT)
        near.endpoint.wait_for_peers({"far"}, timeout=WAIT)
        near.stop()
        far = Pumped(far_endpoint)
        front.send({"x": noise(MIB, 2)}, to="near")
        message = near.endpoint.receive(copy=True)
        near.endpoint.try_receive()
        for seed in range(20):  # the record behind the copy is overwritten by now
            front.send({"x": noise(MIB, seed)}, to="far")
            far.next()
        near.endpoint.forward(message, to="far")
        assert same(far.next().body["x"], noise(MIB, 2))
        far.stop()


def test_a_peer_that_lost_the_ring_gets_the_bytes(
    front: transport.Endpoint, near: Pumped, short_path: Path
) -> None:
    """The forwarder still holds the view when the ring's owner has left; `far` has let go of the ring."""
    with joined(front, "far", CONFIG) as far_endpoint:
        near.endpoint.listen(f"ipc://{short_path}/relay.sock")
        far = Pumped(far_endpoint)
        front.send({"x": noise(MIB)}, to="far")
        far.next()
        far.stop()
        far_endpoint.connect(f"ipc://{short_path}/relay.sock", timeout=WAIT)
        until(lambda: reads_rings(near.endpoint, "far"), "it is known what far maps")
        far = Pumped(far_endpoint)
        front.send({"x": noise(MIB, 2)}, to="near")
        message = near.next()
        front.close()
        until(lambda: not reads_rings(near.endpoint, "far"), "far says that it reads no ring any more")
        near.endpoint.forward(message, to="far")
        assert same(far.next().body["x"], noise(MIB, 2))
        del message
        far.stop()


def test_forwarding_to_nobody(front: transport.Endpoint, near: Pumped) -> None:
    front.send({"x": noise(MIB)}, to="near")
    message = near.next()
    with pytest.raises(transport.PeerGone, match="no peer named 'x' is linked; linked: front"):
        near.endpoint.forward(message, to="x")


def test_a_forwarder_that_dies_costs_no_more_than_its_message(front: transport.Endpoint) -> None:
    with serving(front, "peer", OPTIONS) as process:
        front.send({"do": "hold", "value": noise(MIB)}, to="peer")
        front.send({"do": "sum", "value": noise(MIB)}, to="peer")
        assert front.receive().body == digest(noise(MIB))
        process.kill()
        process.join(WAIT)
        until(lambda: ring(front).live == 0, "its space comes back")
