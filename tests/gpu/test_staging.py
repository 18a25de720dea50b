"""From the ring to a GPU: registration, order of release, what a guard is for, parts, cut-through, death."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

import shm
import transport
from engine.staging import Stager
from tests.gpu.conftest import MIB, Link, busy, is_done, settings, staged, until
from transport import cudart, devices, registration
from transport.conformance import WAIT, noise, running, same
from transport.registration import STEP

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)


def test_a_read_only_mapping_is_registered_and_the_device_reads_it(link: Link, stager: Stager) -> None:
    link.registered(stager)
    data = noise(8 * MIB, 2)
    view = link.exchanged({"x": data}).body["x"]  # without a stage: the view into the ring
    assert view.is_pinned()
    assert registration.rings.covers(view.data_ptr(), view.nbytes)
    assert view.to(CUDA, non_blocking=True).cpu().equal(data)
    del view


def test_a_refused_registration_leaves_no_error_behind(link: Link) -> None:
    view = link.exchanged({"x": noise(MIB)}).body["x"]
    address = view.data_ptr() // 4096 * 4096
    with pytest.raises(cudart.DeviceError, match="cudaHostRegister failed with error"):
        cudart.runtime().register(address, MIB, read_only=False)  # of pages that are read-only here
    assert torch.zeros(5, device=CUDA).sum().item() == 0  # which an error left behind would make fail
    del view


def test_every_kind_of_tensor_arrives_as_it_was_sent(link: Link, stager: Stager) -> None:
    link.registered(stager)
    body = {
        "bfloat16": noise(6 * MIB).view(torch.bfloat16).view(3, -1),
        "inline": torch.arange(3.0),
        "empty": torch.empty(0, 4),
        "bool": noise(300_000) > 100,
        "strided": noise(2 * MIB).view(1024, -1).T,
        "odd": noise(70_001),
        "array": np.arange(300_000),
    }
    message = link.exchanged(body, stager)
    staged(message).wait()
    for name, value in body.items():
        came = message.body[name]
        if name == "array":
            assert same(came, value)
        else:
            assert came.device == CUDA, name
            assert same(came.cpu(), value), name


def test_a_record_across_the_borders_of_registered_steps(link: Link, stager: Stager) -> None:
    link.registered(stager)
    held = link.exchanged({"x": noise(STEP // 2)})
    data = noise(60 * MIB, 3)
    for _ in range(3):  # while the steps are being registered, and afterwards
        message = link.exchanged({"x": data}, stager)
        staged(message).wait()
        assert message.body["x"].cpu().equal(data)
        del message
    assert transport.registered().refused == ""
    del held


def test_a_message_larger_than_the_ring(link: Link, stager: Stager) -> None:
    link.registered(stager)
    data = [noise(300 * MIB, 4).view(torch.float32), noise(MIB + 1, 5)]
    message = link.exchanged({"x": data}, stager)
    staged(message).wait()
    assert all(same(came.cpu(), sent) for came, sent in zip(message.body["x"], data, strict=True))
    del message


def test_a_record_is_held_until_its_copy_is_done_and_no_longer(link: Link, stager: Stager) -> None:
    link.registered(stager)
    until(lambda: link.live() == 0, "nothing is held")
    data = noise(8 * MIB, 6)
    busy(transport.copies_from_host(0), 300)
    message = link.exchanged({"x": data}, stager)
    copies = staged(message)
    del message  # tensor, message and request go; the copy outlives them
    live = link.live()
    assert not is_done(copies), "this machine is too slow for this test: the copy is done already"
    assert live == 1
    until(lambda: link.live() == 0, "the copy is done, and the record is free")
    assert is_done(copies)


@pytest.mark.parametrize("guarded", [True, False])
def test_without_the_wait_for_the_event_the_device_reads_other_bytes(
    link: Link, stager: Stager, guarded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    link.registered(stager)
    until(lambda: link.live() == 0, "nothing is held")
    if not guarded:
        monkeypatch.setattr(devices.Kept, "_await", lambda self, done: None)
    first, second = noise(8 * MIB, 7), noise(8 * MIB, 8)
    busy(transport.copies_from_host(0), 300)
    message = link.exchanged({"x": first}, stager)
    copies, came = staged(message), message.body["x"]
    del message
    link.near.try_receive()  # acknowledges
    for _ in range(20):  # the lowest address that is free: what was let go of is written next
        link.exchanged({"x": second})
    copies.wait()
    result = came.cpu()
    assert result.equal(first) == guarded
    if not guarded:
        assert result.equal(second)
    del copies


def test_the_model_finds_the_tensors_complete_and_may_drop_them_while_it_runs(
    link: Link, stager: Stager
) -> None:
    link.registered(stager)
    results = []
    for number in range(20):
        busy(transport.copies_from_host(0), 3)
        message = link.exchanged({"x": torch.full((MIB,), number, dtype=torch.float32)}, stager)
        staged(message).wait()
        busy(torch.cuda.current_stream(), 2)
        results.append(message.body["x"].sum())  # queued behind the copy, on another stream
        del message  # and its memory is free for the next copy only when the sum is done
    assert [result.item() for result in results] == [number * MIB for number in range(20)]


@pytest.mark.parametrize("unregisters", [True, False])
def test_a_new_ring_at_the_address_of_a_dead_one(unregisters: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without unregistering, the device reads the dead ring's bytes."""
    registrar = registration.Registrar()
    runtime = cudart.runtime()
    registrar.start(lambda: runtime)
    unregister = registrar._unregister
    kept: list[registration._Ring] = []
    if not unregisters:
        monkeypatch.setattr(registrar, "_unregister", lambda memory, ring: kept.append(ring))
    first, address = _through_a_ring(registrar, 0xAA)
    assert first == 0xAA
    second, again = _through_a_ring(registrar, 0xBB)
    for ring in kept:  # all steps of it: no tensor that comes to lie there later could be copied
        unregister(runtime, ring)
    if again != address:
        pytest.skip("the kernel chose another address")
    assert second == (0xBB if unregisters else 0xAA)


def _through_a_ring(registrar: registration.Registrar, value: int) -> tuple[int, int]:
    """Write a ring full of one value, copy it to the device, let it go: what the device has, and from which
    address.
    """
    writer = shm.RingWriter(32 * MIB, slots=8, columns=1)
    offer = writer.offer()
    seen: list[int] = []

    def watch(address: int, nbytes: int, writable: bool) -> shm.Watched:
        seen.append(address)
        return registrar.watch(address, nbytes, writable)

    reader = shm.RingReader(offer, "reader", watch=watch)
    writer.admit(offer, "reader")
    (record,) = writer.reserve([16 * MIB])
    writer.buffer(record)[:] = value
    writer.commit([record], keep=True)
    view = reader.open(record.handle)
    assert (view == value).all()
    # A registration that the driver refuses, because it still has one there, is what the guard shows.
    until(lambda: registrar.state().nbytes > 0 or bool(registrar.state().refused), "registered or refused")
    there = torch.from_numpy(view).to(CUDA, non_blocking=True)
    found = int(there.max().item())
    assert there.min().item() == found
    del view
    reader.close()
    writer.close()
    until(lambda: not registrar.state().rings, "the ring is unmapped")
    return found, seen[0]


def _stages_and_is_killed(address: str) -> None:
    stager = Stager(torch.device("cuda"))
    with transport.connect(address, name="near", config=settings(), timeout=WAIT) as near:
        near.receive(stage=stager)
        until(lambda: transport.registered().nbytes > 0, "the ring is registered")
        busy(transport.copies_from_host(0), 60_000)
        message = near.receive(stage=stager)
        near.try_receive()
        assert not is_done(staged(message))
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_killed_in_the_middle_of_a_copy(address: str) -> None:
    """Its sender goes on, and the record is free."""
    config = settings()
    with transport.listen(address, config=config) as front:
        for _ in range(2):  # and the next of its name as well
            with running(_stages_and_is_killed, address):
                front.wait_for_peers({"near"}, timeout=WAIT)
                for seed in range(2):
                    front.send({"x": noise(32 * MIB, seed)}, to="near")
                until(lambda: not front.peers, "it is gone")
            until(lambda: front.statistics()["backend"]["shm"]["ring"].live == 0, "the ring is empty")


ENDS_WHILE_COPYING = """
import torch
import transport

source = torch.ones(256 << 20, dtype=torch.uint8).pin_memory()
place = torch.empty_like(source, device="cuda")
for _ in range(8):  # some 40 ms
    transport.copy_in(place, 0, source.numpy(), transport.copies_from_host(0))
"""


@pytest.mark.parametrize("time", range(3))
def test_a_process_ends_in_peace_while_its_copies_are_under_way(time: int) -> None:
    """The thread that waits for them is a daemon; torch's own wait aborted the process nearly each time."""
    ended = subprocess.run(
        [sys.executable, "-c", ENDS_WHILE_COPYING], capture_output=True, text=True, timeout=WAIT, check=False
    )
    assert (ended.returncode, ended.stderr) == (0, "")
