"""CUDA tensors as input of `send`: from the device into the ring, behind the producer's stream."""

from __future__ import annotations

import pytest
import torch

import transport
from engine.staging import Stager
from tests.gpu.conftest import MIB, Link, busy, staged, until
from transport import devices, sources
from transport.conformance import noise, same
from transport.registration import STEP

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)


def test_device_to_ring_whatever_the_layout(link: Link, stager: Stager) -> None:
    link.registered(stager)
    large = noise(12 * MIB).view(torch.float32)
    body = {
        "large": large,
        "inline": torch.arange(5.0),
        "0-d": torch.tensor(3, dtype=torch.int64),
        "empty": torch.empty(0, 3),
        "transposed": large.view(1024, -1).T,
        "stepped": large[::3],
        "conjugate": torch.view_as_complex(large.nan_to_num().view(-1, 2)).conj(),
        "bool": noise(300_000) > 127,
        "fp8": noise(100_000).view(torch.float8_e4m3fn),
    }
    message = link.exchanged({name: value.to(CUDA) for name, value in body.items()})
    for name, value in body.items():
        assert not message.body[name].is_cuda
        assert same(message.body[name], value), name
    joined = link.exchanged({"x": transport.stack([large.to(CUDA), large.to(CUDA)], dim=1)})
    assert same(joined.body["x"], torch.stack([large, large], dim=1))


def test_across_registered_steps_and_in_parts(link: Link, stager: Stager) -> None:
    link.registered(stager)
    for nbytes in (STEP + 5 * MIB, 300 * MIB):
        data = noise(nbytes, 3)
        message = link.exchanged({"x": data.to(CUDA)}, stager)
        staged(message).wait()
        assert message.body["x"].cpu().equal(data)
        del message
    until(lambda: link.live() == 0, "nothing is held")
    assert transport.registered().refused == ""


@pytest.mark.parametrize("guarded", [True, False])
def test_what_is_sent_is_what_was_queued_before(
    link: Link, stager: Stager, guarded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a stream of the producer's own; without waiting for that the ring gets what was there before."""
    link.registered(stager)
    link.exchanged({"x": torch.zeros(8 * MIB, dtype=torch.uint8, device=CUDA)})
    tensor = torch.zeros(8 * MIB, dtype=torch.uint8, device=CUDA)
    earlier = devices.queued(tensor)
    torch.cuda.synchronize()
    if not guarded:
        monkeypatch.setattr(sources, "queued", lambda tensor: earlier)
    producer = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(producer):
        busy(producer, 300)
        tensor.fill_(7)
        link.front.send({"x": tensor})  # in this thread, whose current stream is the producer's
        tensor.fill_(9)  # legal as soon as it was sent
    message = link.near.receive()
    assert bool((message.body["x"] == (7 if guarded else 0)).all())
    torch.cuda.synchronize()
