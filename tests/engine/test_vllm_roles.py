"""The three parties inside of one vLLM, without vLLM: what the plugin hooks in, tensor by tensor."""

from __future__ import annotations

import gc
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

import shm
import transport
from engine.vllm import counts, roles
from engine.vllm.mailbox import Mailbox
from engine.vllm.roles import Core, Front, Worker
from engine.vllm.settings import Settings, core_address, front_address, settings_of, sweep
from engine.vllm_plugin import leave_with
from shm import memory
from shm.memory import Space
from tests.shm.rings import run_python
from transport.conformance import joined

ENGINE = (0).to_bytes(2, "little")
IMAGE = (512, 1176)  # 1.2 MB in bfloat16
RING = 16 << 20


@pytest.fixture(autouse=True)
def _own_folder(monkeypatch: pytest.MonkeyPatch, short_path: Path) -> None:
    monkeypatch.setattr("engine.vllm.settings.tempfile.gettempdir", lambda: str(short_path))


@pytest.fixture
def address(short_path: Path) -> str:
    """What vLLM's own socket would be bound to."""
    return f"ipc://{short_path}/vllm"


def settings(**options: object) -> Settings:
    given = settings_of({"tensorferry": {"ring_bytes": RING, **options}})
    assert given is not None
    return given


def until(what: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not what():
        assert time.monotonic() < deadline, "it did not happen in 30 s"
        time.sleep(0.01)


@contextmanager
def linked(address: str, copy_above: float, **options: object) -> Iterator[tuple[Front, Core]]:
    """A front end and its engine, linked, the ring mapped."""
    given = settings(copy_above=copy_above, **options)
    core = Core(given, 0, [address], workers=0)
    front = Front(given, address)
    try:
        assert front.wait_for([0], timeout=30) == [0]
        yield front, core
    finally:
        front.close()
        core.close()


@pytest.fixture
def pair(address: str) -> Iterator[tuple[Front, Core]]:
    with linked(address, copy_above=0.5) as both:
        yield both


@pytest.fixture
def keeping(address: str) -> Iterator[tuple[Front, Core]]:
    """The same, of which the engine copies nothing out of the ring, however full that is."""
    with linked(address, copy_above=1.0) as both:
        yield both


def image(seed: int = 0, shape: tuple[int, ...] = IMAGE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def lend(front: Front, tensor: torch.Tensor, engine: bytes = ENGINE) -> dict[str, object] | None:
    with front.sending_to(engine):
        return front.lend(tensor)


def provide(core: Core, meta: dict[str, object] | None, shape: tuple[int, ...] = IMAGE) -> torch.Tensor:
    assert meta is not None
    return core.provide(shape, "bfloat16", meta)


def used(front: Front) -> int:
    ring = front.endpoint.statistics()["backend"]["ring"]
    assert isinstance(ring.used, int)
    return ring.used


def test_a_tensor_goes_through_the_ring_and_its_bytes_are_free_with_its_last_view(
    pair: tuple[Front, Core],
) -> None:
    front, core = pair
    sent = image()
    got = provide(core, lend(front, sent))
    assert torch.equal(got, sent)
    part = got[:2]
    del got
    gc.collect()
    assert used(front) > 0
    assert torch.equal(part, sent[:2])
    del part
    until(lambda: used(front) == 0)
    assert front.counts.rows() == [(counts.FRONT, "ring", 1, sent.nbytes)]


def test_a_ring_takes_hardly_more_memory_than_the_images_need(keeping: tuple[Front, Core]) -> None:
    front, core = keeping
    sent = [image(seed, shape=(1024, 1176)) for seed in range(5)]
    with front.sending_to(ENGINE, sent):
        metas = [front.lend(tensor) for tensor in sent]
    got = [provide(core, meta, (1024, 1176)) for meta in metas]
    assert all(map(torch.equal, got, sent))
    needed = sum(tensor.nbytes for tensor in sent)
    assert needed <= front.endpoint.statistics()["backend"]["ring"].mark <= needed + (2 << 20)


def test_slices_of_one_storage_are_records_of_their_own(pair: tuple[Front, Core]) -> None:
    front, core = pair
    prompt = image(shape=(4 * 512, 1176))
    metas = [lend(front, prompt[start : start + 512]) for start in range(0, 4 * 512, 512)]
    got = [provide(core, meta) for meta in metas]
    assert torch.equal(torch.cat(got), prompt)
    del got[1:]
    until(lambda: used(front) < 2 * prompt.nbytes // 4)


def test_the_tensors_of_a_request_are_copied_together_and_are_records_of_their_own(
    pair: tuple[Front, Core],
) -> None:
    front, core = pair
    prompt = image(shape=(4 * 512, 1176))
    strided = image(shape=(1176, 512)).t()
    parts = [strided, *(prompt[start : start + 512] for start in range(0, 4 * 512, 512))]
    with front.sending_to(ENGINE, parts):
        metas = [front.lend(part) for part in parts]
    got = [provide(core, meta) for meta in metas]
    assert torch.equal(got[0], strided)
    assert torch.equal(torch.cat(got[1:]), prompt)
    assert {how for _, how, _, _ in front.counts.rows()} == {"ring"}
    del got[1:]
    until(lambda: used(front) < 2 * prompt.nbytes // 4)


def test_tensors_of_a_request_are_asked_for_in_another_order_than_they_came(pair: tuple[Front, Core]) -> None:
    """As when the encoder meets one that was not announced before those that were."""
    front, core = pair
    lend(front, image(0))  # of a request before, of which vLLM's message was never sent
    parts = [image(seed) for seed in range(1, 5)]
    with front.sending_to(ENGINE, parts[2:]):
        metas = [front.lend(part) for part in parts]
    got = [provide(core, meta) for meta in metas]
    assert all(map(torch.equal, got, parts))
    del got
    until(lambda: used(front) == 0)


@pytest.mark.parametrize("copy_above", [1.0, 0.0], ids=["views", "copied out"])
@pytest.mark.parametrize("announced", [True, False], ids=["announced", "met by the encoder"])
def test_a_tensor_that_a_request_has_several_times_travels_once(
    address: str, copy_above: float, announced: bool
) -> None:
    """As vLLM's cache gives the same tensor for the same image, and shared fields for all of a batch."""
    parts = [same := image(1), image(2), same, same]
    with linked(address, copy_above) as (front, core):
        with front.sending_to(ENGINE, parts if announced else ()):
            metas = [front.lend(part) for part in parts]
        got = [provide(core, meta) for meta in metas]
        assert all(map(torch.equal, got, parts))
        assert [(count, nbytes) for _, _, count, nbytes in front.counts.rows()] == [(2, 2 * same.nbytes)]
        del got
        until(lambda: used(front) == 0)


def test_a_ring_that_stays_small_is_copied_out_of_from_half_of_what_it_has(address: str) -> None:
    """Not of what was asked for, which it would never reach."""
    spare = shm.space().free - (8 << 20)
    with linked(address, 0.5, ring_bytes=1 << 30, shm_spare_bytes=spare) as (front, core):
        metas = [lend(front, image(seed)) for seed in range(10)]  # 12 MB
        assert None in metas
        kept = [provide(core, meta) for meta in metas if meta]
        kept.clear()
        until(lambda: used(front) == 0)
        assert "copied out" not in {how for _, how, _, _ in front.counts.rows()}
        kept += [provide(core, lend(front, image(seed))) for seed in range(5)]
        assert "copied out" in {how for _, how, _, _ in front.counts.rows()}


def test_how_full_the_ring_is_is_asked_once_for_a_message_with_tensors(
    pair: tuple[Front, Core], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It frees what can be freed, which takes time, and most messages have no tensors."""
    front, core = pair
    asked, statistics = [], front.endpoint.statistics

    def counted() -> dict[str, Any]:
        asked.append(1)
        return statistics()

    monkeypatch.setattr(front.endpoint, "statistics", counted)
    with front.sending_to(ENGINE):
        pass
    assert not asked
    with front.sending_to(ENGINE):
        metas = [front.lend(image(seed)) for seed in range(3)]
    assert len(asked) == 1
    assert all(torch.equal(provide(core, meta), image(seed)) for seed, meta in enumerate(metas))


def test_of_a_request_too_large_for_the_ring_some_tensors_go_vllms_way(keeping: tuple[Front, Core]) -> None:
    front, core = keeping
    parts = [image(seed) for seed in range(20)]  # 24 MB into 16
    with front.sending_to(ENGINE, parts):
        metas = [front.lend(part) for part in parts]
    got = {seed: provide(core, meta) for seed, meta in enumerate(metas) if meta is not None}
    assert 0 < len(got) < 20
    assert all(torch.equal(tensor, image(seed)) for seed, tensor in got.items())


def test_a_tensor_that_finds_no_room_is_counted_once(address: str) -> None:
    """Copied into the ring before its engine was found to have its share already."""
    given = settings(copy_above=1.0, peer_share=0.5)
    core, front = Core(given, 0, [address], workers=0), Front(given, address)
    try:
        assert front.wait_for([0], timeout=30) == [0]
        parts = [image(seed) for seed in range(10)]  # 12 MB, of a ring of 16 that an engine may have half of
        with front.sending_to(ENGINE, parts):
            metas = [front.lend(part) for part in parts]
        got = [meta for meta in metas if meta is not None]
        ways = {how: count for _, how, count, _ in front.counts.rows()}
        assert ways == {"ring": len(got), "vLLM (Full)": 10 - len(got)}
    finally:
        front.close()
        core.close()


def test_what_the_ring_is_not_for_goes_vllms_way(pair: tuple[Front, Core]) -> None:
    front, _ = pair
    assert lend(front, torch.zeros(8)) is None  # small
    assert lend(front, image(), engine=(7).to_bytes(2, "little")) is None  # an engine elsewhere
    assert front.lend(image()) is None  # not a request
    assert lend(front, image(shape=(RING // 2, 2))) is None  # larger than the ring
    ways = {how for _, how, _, _ in front.counts.rows()}
    assert ways == {"vLLM (not linked)", "vLLM (larger than the ring)"}


def test_a_ring_full_of_what_is_kept_is_passed_by(keeping: tuple[Front, Core]) -> None:
    front, core = keeping
    metas = [lend(front, image(seed)) for seed in range(20)]  # 24 MB into 16
    kept = [provide(core, meta) for meta in metas if meta is not None]
    assert 0 < len(kept) < 20
    assert all(torch.equal(tensor, image(seed)) for seed, tensor in enumerate(kept))
    assert "vLLM (Full)" in {how for _, how, _, _ in front.counts.rows()}


def test_above_the_fill_level_tensors_are_copied_out_as_they_come(pair: tuple[Front, Core]) -> None:
    front, core = pair
    kept = []
    for seed in range(24):  # 29 MB through a ring of 16, all of it kept
        until(lambda: used(front) < RING - 2 * image().nbytes)
        kept.append(provide(core, lend(front, image(seed))))
    assert all(torch.equal(tensor, image(seed)) for seed, tensor in enumerate(kept))
    ways = {how: count for _, how, count, _ in front.counts.rows()}
    assert ways["ring"] >= 6
    assert ways["ring"] + ways["copied out"] == 24


def test_a_mailbox_says_once_what_goes_wrong_again_and_again(
    address: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("engine.vllm.mailbox._LOOK_SOON", 0.0)
    config = transport.TransportConfig()
    with transport.listen(address, config=config) as front, joined(front, "core", config) as core:
        came: list[int] = []

        def notice(_sender: str, body: dict[str, int]) -> None:
            came.append(body["n"])
            raise RuntimeError("a bad notice")

        mailbox = Mailbox(core, notice, lambda: False)
        mailbox.start()
        front.wait_for_peers(1)
        for number in range(100):
            front.send({"n": number})
        until(lambda: 99 in [left_out for _, left_out in mailbox._warnings._passed.values()])
        mailbox._warnings._seconds = 0
        front.send({"n": 100})
        until(lambda: "left out" in caplog.text)
        mailbox.close()
    first, second = [record.message for record in caplog.records if "a bad notice" in record.message]
    assert first == "tensorferry: RuntimeError: a bad notice"
    assert second == f"{first} (99 more such warnings left out)"


def test_a_mailbox_whose_look_fails_takes_messages_all_the_same(address: str) -> None:
    config = transport.TransportConfig()
    with transport.listen(address, config=config) as front, joined(front, "core", config) as core:
        came: list[int] = []

        def look() -> bool:
            raise RuntimeError("a bad look")

        mailbox = Mailbox(core, lambda _, body: came.append(body["n"]), look)
        mailbox.start()
        try:
            front.wait_for_peers(1)
            front.send({"n": 1})
            until(lambda: came == [1])
        finally:
            mailbox.close()


def test_who_was_stopped_while_it_waits_has_not_waited_for_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes on before the thread that takes what came meanwhile."""
    clock, key, tensor = [0.0], ("front", 1, 1), image()
    monkeypatch.setattr("engine.vllm.mailbox.time", SimpleNamespace(monotonic=lambda: clock[0]))
    mailbox = Mailbox(cast(transport.Endpoint, SimpleNamespace(account=str)), print, bool)

    def stopped(seconds: float) -> None:
        clock[0] += 60.0
        if clock[0] > 300.0:
            mailbox._queues["front"] = deque([(key, (tensor, None))])

    monkeypatch.setattr(mailbox._came, "wait", stopped)
    assert mailbox.take("front", key, timeout=10.0) == (tensor, None)
    with pytest.raises(LookupError, match="did not come from front in 10 s"):
        mailbox.take("front", ("front", 2, 1), timeout=10.0)
    assert clock[0] >= 300.0 + 10 * 60.0


def test_a_tensor_that_never_comes_is_an_error(
    pair: tuple[Front, Core], monkeypatch: pytest.MonkeyPatch
) -> None:
    front, core = pair
    monkeypatch.setattr(roles, "_TAKE_TIMEOUT", 0.1)
    what = rf"tensor 99 of {front.name} did not come from {front.name} in 0.1 s: '{front.name}' "
    with pytest.raises(LookupError, match=rf"{what}\(pid {os.getpid()}\) at ipc://.*; linked for \d+\.\d s"):
        provide(core, {"tensorferry": [front.name, 1, 99]})
    core.close()
    with pytest.raises(LookupError, match=r"did not come .* before this end was closed: .* is closed"):
        provide(core, {"tensorferry": [front.name, 2, 99]})


@pytest.fixture
def _no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who only waits for a lost tensor until the time is over waits longer than any test may take."""
    monkeypatch.setattr(roles, "_TAKE_TIMEOUT", 1e6)


@pytest.mark.usefixtures("_no_end")
def test_a_tensor_of_who_left_is_not_waited_for(pair: tuple[Front, Core]) -> None:
    front, core = pair
    front.close()
    what = r"did not come .* before that left: .* said goodbye \d+\.\d s ago; linked: nobody"
    for number in (98, 99):
        with pytest.raises(LookupError, match=what):
            provide(core, {"tensorferry": [front.name, 1, number]})


@pytest.mark.usefixtures("_no_end")
def test_a_tensor_that_later_ones_overtook_is_not_waited_for(pair: tuple[Front, Core]) -> None:
    front, core = pair
    with front.sending_to(ENGINE):
        lost = [front.name, front._message, next(front._numbers)]
        whole = front.lend(image())
    with pytest.raises(LookupError, match="did not come .* before later ones"):
        provide(core, {"tensorferry": lost})
    got = provide(core, whole)
    assert torch.equal(got, image())
    with pytest.raises(LookupError, match="did not come .* before later ones"):  # nor when those are taken
        provide(core, {"tensorferry": lost})


@pytest.mark.usefixtures("_no_end")
def test_a_tensor_that_cannot_be_opened_is_not_waited_for(address: str) -> None:
    core, front = (
        Core(settings(max_message_bytes=1 << 20), 0, [address], workers=0),
        Front(settings(), address),
    )
    try:
        front.wait_for([0], timeout=30)
        meta = lend(front, image())
        with pytest.raises(LookupError, match=r"did not come .* in \d+(\.\d+)? s: "):
            provide(core, meta)
        small = image(shape=(256, 1176))
        assert torch.equal(provide(core, lend(front, small), (256, 1176)), small)
    finally:
        front.close()
        core.close()


def test_the_tensors_of_a_request_are_waited_for_together(
    pair: tuple[Front, Core], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many are lost, vLLM's input stands only once; what came is found all the same."""
    front, core = pair
    monkeypatch.setattr(roles, "_TAKE_TIMEOUT", 0.5)
    with front.sending_to(ENGINE):
        whole = front.lend(image())
    of = front._message
    until(lambda: core.mailbox._queues.get(front.name))  # it is found, however short the wait
    for number, waited in ((98, "0.5"), (99, "0")):
        with pytest.raises(LookupError, match=rf"tensor {number} .* did not come .* in {waited} s: "):
            provide(core, {"tensorferry": [front.name, of, number]})
    assert torch.equal(provide(core, whole), image())
    with pytest.raises(LookupError, match=r"did not come .* in 0\.5 s: "):
        provide(core, {"tensorferry": [front.name, of + 1, 100]})


def test_what_was_sent_for_a_message_that_failed_is_forgotten(pair: tuple[Front, Core]) -> None:
    front, core = pair
    lend(front, image(1))  # and vLLM's message is never sent
    got = provide(core, lend(front, image(2)))
    assert torch.equal(got, image(2))
    del got
    until(lambda: used(front) == 0)


def stores(core: Core) -> frozenset[int]:
    """What its only worker has told it that it maps: the ring of the engine, and that of the front end."""
    (worker,) = core._workers
    link = core.endpoint._exchange.roster.named(worker)
    return frozenset() if link is None else link.stores


@contextmanager
def with_worker(address: str, maps: bool = True) -> Iterator[tuple[Front, Core, Worker]]:
    """A front end, its engine and a worker of that, linked.

    maps: whether the worker maps the front end's ring.
    """
    given = settings()
    core = Core(given, 0, [address], workers=1)
    worker = Worker(given, os.getpid())
    if not maps:
        worker._known.add(front_address(address))  # so that it does not dial it
    front = Front(given, address)
    try:
        front.wait_for([0], timeout=30)
        until(lambda: len(front.admitted()) == 1 + maps and core._workers)
        until(lambda: core.offer() is False)
        until(lambda: len(stores(core)) == 1 + maps)
        yield front, core, worker
    finally:
        for party in (front, worker, core):
            party.close()


@pytest.mark.parametrize(
    ("lent", "maps"),
    [
        pytest.param(True, True, id="of the front end's ring"),
        pytest.param(True, False, id="of a ring that the worker does not map"),
        pytest.param(False, True, id="of its own"),
    ],
)
def test_an_engine_hands_on_to_its_worker(address: str, lent: bool, maps: bool) -> None:
    with with_worker(address, maps) as (front, core, worker):
        tensor = provide(core, lend(front, image())) if lent else image()
        handed = core.hand_on(tensor)
        assert handed is not None
        got = worker.take(*handed)
        del tensor
        assert torch.equal(got, image())
        handle = lent and maps
        assert core.counts.rows() == [(counts.WORKERS, "handle" if handle else "ring", 1, image().nbytes)]
        assert core.endpoint.statistics()["sent"].get("handed on", 0) == handle
        assert core.endpoint.statistics()["backend"]["nbytes"] == (0 if handle else image().nbytes)
        del got
        until(lambda: used(front) == 0)


def test_until_a_worker_maps_its_engines_ring_it_is_not_linked(address: str) -> None:
    """That is no full ring, which `tensorferry doctor --vllm` would advise to make larger."""
    given = settings()
    core = Core(given, 0, [address], workers=1)
    try:
        with transport.connect(core_address(os.getpid()), name=f"worker-{os.getpid()}-1", timeout=30):
            until(lambda: core._workers)
            assert core.hand_on(image()) is None  # the worker receives nothing, and so proves nothing
            assert core.counts.rows() == [(counts.WORKERS, "vLLM (not linked)", 1, image().nbytes)]
    finally:
        core.close()


def test_a_worker_hears_of_a_front_end_that_links_while_it_is_told(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = Core(settings(), 0, [address], workers=1)
    told: list[object] = []

    def try_send(body: dict[str, object], to: str) -> None:
        told.append(body)
        core._linked("another", "front-2")  # as the thread does that dials it

    try:
        core.mailbox._closed.set()  # nobody else looks
        core.mailbox._thread.join(30)
        with joined(core.endpoint, f"worker-{os.getpid()}-1", core.settings.transport):
            monkeypatch.setattr(core.endpoint, "try_send", try_send)
            assert core.look(), "it looks again soon while a front end is missing"
            assert not core.look()
        assert told == [{"fronts": []}, {"fronts": ["another"]}]
    finally:
        core.close()


def test_workers_that_never_come_are_not_looked_for_again_and_again(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every second, as for everything else, and no longer twenty times in each."""
    core = Core(settings(), 0, [address], workers=1)
    try:
        assert core.look()
        monkeypatch.setattr(roles, "_LINKS_WITHIN", 0.0)
        assert not core.look()
    finally:
        core.close()


def test_a_worker_waits_longer_than_an_engine(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is lost to it ends it, and vLLM."""
    monkeypatch.setattr(roles, "_TAKE_TIMEOUT", 0.0)
    with with_worker(address) as (_, core, worker), ThreadPoolExecutor() as pool:
        tensor = image()
        key = (core.name, core._message, 1)
        waiting = pool.submit(worker.take, core.name, key)
        until(lambda: worker.mailbox._came._waiters)  # type: ignore[attr-defined]
        assert core.hand_on(tensor) == (core.name, key)
        assert torch.equal(waiting.result(timeout=30), tensor)


def test_a_tensor_that_no_engine_handed_on_is_an_error(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roles, "_HAND_ON_TIMEOUT", 0.1)
    what = r"tensor 99 of front-1 did not come from engine0 in 0\.1 s: "
    with with_worker(address) as (_, core, worker), pytest.raises(LookupError, match=what):
        worker.take(core.name, ("front-1", 1, 99))


def test_a_worker_does_not_wait_for_an_engine_that_left(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roles, "_HAND_ON_TIMEOUT", 1e6)
    with with_worker(address) as (_, core, worker):
        core.close()
        with pytest.raises(LookupError, match="did not come from engine0 before that left: 'engine0'"):
            worker.take(core.name, (core.name, 1, 99))


def test_the_front_end_hears_what_its_engine_counts(address: str) -> None:
    given = settings()
    core, front = Core(given, 0, [address], workers=0), Front(given, address)
    try:
        core.counts.add(counts.WORKERS, "handle", 5)
        until(lambda: front.counts.total() == [(counts.WORKERS, "handle", 1, 5)])
        until(
            lambda: any(
                process["role"] == "front" or process["role"] == "engine" for process in counts.saved()
            )
        )
    finally:
        front.close()
        core.close()


def test_where_no_ring_fits_all_goes_vllms_way_and_that_is_said_once(
    address: str, caplog: pytest.LogCaptureFixture
) -> None:
    given = settings(ring_bytes=1 << 50)
    core, front = Core(given, 0, [address], workers=0), Front(given, address)
    try:
        until(lambda: "does not fit" in caplog.text)
        assert front._ringless
        assert front.wait_for([0], timeout=0.3) == []  # and it looks again and again meanwhile
        assert lend(front, image()) is None
        assert len([record for record in caplog.records if "does not fit" in record.getMessage()]) == 1
    finally:
        front.close()
        core.close()


_LENDS_ALL = """
import contextlib, os
import torch
import transport
from engine.vllm.settings import settings_of

settings = settings_of({"tensorferry": {"ring_bytes": 200 << 20}})
with transport.Endpoint("front", settings.transport) as front, contextlib.ExitStack() as loans:
    try:
        for number in range(100):
            loans.enter_context(front.loan((8 << 20,), torch.uint8, timeout=0.0))
    except transport.Full as error:
        print(number, error)
    free = os.statvfs("/dev/shm")
    print(free.f_bavail * free.f_frsize)
    with open("/dev/shm/another's", "wb") as file:  # as vLLM's queue, which reserves nothing
        os.posix_fallocate(file.fileno(), 0, 158 << 20)
"""


def test_the_ring_leaves_of_dev_shm_what_vllm_itself_needs() -> None:
    done = run_python(_LENDS_ALL, shm_size="208m")
    assert done.returncode == 0, done.stderr
    said, free = done.stdout.splitlines()
    assert 4 <= int(said.split()[0]) <= 6  # 48 MiB less control pages and the rest of a loan
    assert "MiB and leaves 160 MiB of /dev/shm to others (shm_spare_bytes), but /dev/shm has" in done.stderr
    assert int(free) >= 160 << 20


def fill(front: Front, loans: ExitStack) -> None:
    """Lend all of its ring."""
    with suppress(transport.Full):
        while True:
            loans.enter_context(front.endpoint.loan((1 << 20,), torch.uint8, timeout=0.0))


def test_a_ring_that_is_full_just_now_is_a_ring(address: str, caplog: pytest.LogCaptureFixture) -> None:
    """While it is full an engine comes: it maps the ring later, and nobody says that there is none."""
    given = settings()
    front = Front(given, address)
    with ExitStack() as full:
        fill(front, full)
        with transport.connect(front_address(address), name="engine0", timeout=30):  # it receives nothing
            until(lambda: front.endpoint.peers)
            assert front.offer()
            assert not front._ringless
    core = Core(given, 0, [address], workers=0)
    try:
        assert front.wait_for([0], timeout=30) == [0]
        assert lend(front, image()) is not None
        assert "vLLM's way as long as that is so: no room for 1 B" in caplog.text
        assert "vLLM's way: " not in caplog.text
    finally:
        front.close()
        core.close()


def test_a_ring_that_gets_its_first_page_late_is_mapped_then(
    address: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As while another vLLM, which is just ending, has most of /dev/shm."""
    now = memory.space
    monkeypatch.setattr(memory, "space", lambda: Space(1 << 30, 100 << 20, None, 1 << 30))
    given = settings()
    core, front = Core(given, 0, [address], workers=0), Front(given, address)
    try:
        until(lambda: "vLLM's way as long as that is so: growing the ring" in caplog.text)
        monkeypatch.setattr(roles, "_PROVES_WITHIN", 0.0)  # its first minute is over
        assert front.wait_for([0], timeout=0.2) == []
        monkeypatch.setattr(memory, "space", now)
        assert front.wait_for([0], timeout=30) == [0]
    finally:
        front.close()
        core.close()


def test_who_finds_nobody_says_so_once_and_looks_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, address: str
) -> None:
    """As a worker whose EngineCore listens only when the model is loaded, however long that takes."""
    monkeypatch.setattr("engine.vllm.mailbox._SAY_AFTER", 0.2)
    caplog.set_level("INFO", "vllm.tensorferry")
    said = f"no link with {front_address(address)} in 0.2 s (no socket is there)"
    core = Core(settings(), 0, [address], workers=0)
    try:
        until(lambda: said in caplog.text)
        time.sleep(0.5)
        assert caplog.text.count("no link with") == 1
        front = Front(settings(), address)
        try:
            assert front.wait_for([0], timeout=30) == [0]
        finally:
            front.close()
    finally:
        core.close()


def test_who_is_refused_asks_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, address: str
) -> None:
    monkeypatch.setattr("engine.vllm.mailbox._DIAL_LATER", 0.1)
    given = settings()
    with ExitStack() as parties:
        front = Front(given, address)
        parties.callback(front.close)
        with transport.connect(front_address(address), name="engine0", timeout=30):
            core = Core(given, 0, [address], workers=0)
            parties.callback(core.close)
            until(lambda: "the name 'engine0' is taken" in caplog.text)
            time.sleep(0.5)
            assert caplog.text.count("is taken") == 1
        until(lambda: core._fronts)
        assert front.wait_for([0], timeout=30) == [0]


def test_a_link_that_ends_while_both_live_is_made_again(
    monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setattr("engine.vllm.mailbox._DIAL_LATER", 0.1)
    with with_worker(address) as (front, core, worker):
        for dialler, name in ((core, front.name), (worker, front.name), (worker, core.name)):
            link = dialler.endpoint._exchange.roster.named(name)
            assert link is not None
            dialler.endpoint._exchange._break_off(link, "just so")
            until(partial(dialler.mailbox._left.__contains__, name))
            until(lambda: not dialler.mailbox._left)  # noqa: B023  # it is called here
        until(lambda: len(front.admitted()) == 2 and core._workers and len(stores(core)) == 2)
        until(lambda: core.offer() is False)
        front.wait_for([0], timeout=30)
        handed = core.hand_on(provide(core, lend(front, image())))
        assert handed is not None
        assert torch.equal(worker.take(*handed), image())
        assert core.counts.rows() == [(counts.WORKERS, "handle", 1, image().nbytes)]
        until(lambda: (counts.WORKERS, "handle", 1, image().nbytes) in front.counts.total())


def test_a_worker_that_links_again_is_told_of_the_front_ends_again(address: str) -> None:
    """What it was told may have been lost with the link before."""
    core = Core(settings(), 0, [address], workers=1)
    try:
        core.mailbox._closed.set()  # nobody else looks
        core.mailbox._thread.join(30)
        core._linked("there", "front-1")
        for _ in range(2):
            with joined(core.endpoint, f"worker-{os.getpid()}-1", core.settings.transport) as worker:
                core.look()
                assert worker.receive(timeout=30).body == {"fronts": ["there"]}
    finally:
        core.close()


def test_a_front_end_that_links_again_is_told_the_counts_again(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = Core(settings(), 0, [address], workers=0)
    told: list[object] = []
    try:
        core.mailbox._closed.set()  # nobody else looks
        core.mailbox._thread.join(30)
        monkeypatch.setattr(core.endpoint, "try_send", lambda body, to: told.append((to, body)))
        core.counts.add(counts.WORKERS, "handle", 5)
        for _ in range(2):
            core._linked(front_address(address), "front-1")
            core.look()
            core.look()
        assert told == 2 * [("front-1", {"counts": [[counts.WORKERS, "handle", 1, 5]]})]
    finally:
        core.close()


def _ends_while_a_thread_closes(address: str) -> None:
    front = Front(settings(), address)
    front.counts.save(now=True)
    closing = threading.Event()

    def flush(_: float) -> bool:
        closing.set()
        return threading.Event().wait(0.5)

    front.endpoint._exchange.sender.outbound.flush = flush  # type: ignore[assignment, method-assign]
    leave_with(threading.Event(), front)  # which is gone at once
    assert closing.wait(30)


def test_a_process_that_ends_while_its_front_end_is_closed_leaves_no_counters(
    address: str, monkeypatch: pytest.MonkeyPatch, short_path: Path
) -> None:
    monkeypatch.setenv("TMPDIR", str(short_path))
    code = f"from tests.engine.test_vllm_roles import _ends_while_a_thread_closes as f; f({address!r})"
    ended = run_python(code)
    assert (ended.returncode, ended.stderr) == (0, "")
    (folder,) = short_path.iterdir()
    assert list(folder.iterdir()) == []


def test_sockets_of_the_dead_are_swept_and_others_are_not(pair: tuple[Front, Core], short_path: Path) -> None:
    own = Path(front_address(f"ipc://{short_path}/vllm").removeprefix("ipc://"))
    left = own.with_name("1.core")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(left))
    sweep()
    assert left.exists()  # young, and perhaps between bind and listen
    for path in (left, own):
        os.utime(path, (0, 0))
    sweep()
    assert not left.exists()
    assert own.exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ring_byte": 1}, "tensorferry: unknown option ring_byte"),
        ({"backend": "frames"}, "tensorferry: unknown option backend"),
        ({"copy_above": 2}, "tensorferry: copy_above must be"),
        ({"ring_bytes": 1}, "tensorferry: ring_bytes must be"),
    ],
)
def test_a_wrong_option_is_refused_by_name(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings_of({"tensorferry": given})


@pytest.mark.parametrize("given", [{}, {"tensorferry": None}, {"tensorferry": False}, {"other": {}}, None])
def test_nothing_asked_for_is_nothing_done(given: object) -> None:
    assert settings_of(given) is None


def test_who_does_not_prove_that_it_maps_the_ring_is_not_asked_for_ever(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an engine that shares /tmp with the front end and not /dev/shm."""
    front = Front(settings(), address)
    with transport.connect(front_address(address), name="engine0", timeout=30):  # it receives nothing
        try:
            until(lambda: front.endpoint.peers)
            assert front.offer()
            assert front.wait_for([0], timeout=0.2) == []
            monkeypatch.setattr(roles, "_PROVES_WITHIN", 0.0)
            assert not front.offer()
            assert lend(front, image()) is None
        finally:
            front.close()
    assert front.counts.rows() == [("front end to engine", "vLLM (not linked)", 1, image().nbytes)]
