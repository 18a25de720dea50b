"""The plugin's hooks around stand-ins of the shape of vLLM's classes; real vLLM is in tests/vllm."""

from __future__ import annotations

import copyreg
import gc
import os
import sys
import types
import weakref
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

import shm
import transport
from engine import vllm_plugin
from engine.vllm import check, guard, pickling, points
from engine.vllm.roles import Core, Front
from engine.vllm.settings import front_address, settings_of
from tests.engine.processes import ROOT, ran


@pytest.fixture(autouse=True)
def _nothing_was_said_before(monkeypatch: pytest.MonkeyPatch) -> None:
    guard.forget()
    monkeypatch.setattr(vllm_plugin, "_unsaid", {})
    monkeypatch.setattr(points, "hooked", {})


def test_without_vllm_nothing_is_hooked_and_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    vllm_plugin.register()
    vllm_plugin.register()
    assert not caplog.records
    assert "vllm" not in sys.modules


def test_what_is_not_known_is_left_alone_and_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", types.ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.v1", types.ModuleType("vllm.v1"))
    monkeypatch.setitem(sys.modules, "vllm.v1.engine", types.ModuleType("vllm.v1.engine"))
    monkeypatch.setitem(sys.modules, "vllm.v1.engine.core", types.ModuleType("vllm.v1.engine.core"))
    vllm_plugin.register()
    assert not caplog.records, "nobody has asked for anything yet"
    assert "has no attribute 'EngineCoreProc'" in points.hooked["the EngineCore"]
    config = types.SimpleNamespace(additional_config={"tensorferry": True}, parallel_config=None)
    vllm_plugin._client_made(lambda *_: None, types.SimpleNamespace(), config)
    assert "the EngineCore is not as known here" in caplog.text


def test_a_client_that_is_not_as_known_is_left_alone_and_said(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing that is missed in it reaches vLLM, which is just starting."""
    client = types.SimpleNamespace()
    config = types.SimpleNamespace(additional_config={"tensorferry": True}, parallel_config=None)

    def made(client: Any, config: Any) -> None:
        client.vllm_config = config

    vllm_plugin._client_made(made, client, config)
    assert client.vllm_config is config
    assert "has no attribute 'engine_ranks_managed'; tensors go vLLM's way" in caplog.text


GIB = 1 << 30


def vllm_config(*, servers: int = 1, ranks: int = 1, balanced: bool = False, kind: str = "lru") -> Any:
    """As vLLM's; servers, ranks: API servers and data-parallel ranks, balanced: by somebody outside."""
    return types.SimpleNamespace(
        additional_config={"tensorferry": True},
        parallel_config=types.SimpleNamespace(
            data_parallel_size=ranks,
            data_parallel_size_local=ranks,
            data_parallel_external_lb=balanced,
            _api_process_count=servers,
        ),
        model_config=types.SimpleNamespace(
            multimodal_config=types.SimpleNamespace(mm_processor_cache_gb=4, mm_processor_cache_type=kind)
        ),
    )


@pytest.mark.parametrize(
    ("config", "ring"),
    [
        (vllm_config(), 10),
        (vllm_config(ranks=2, balanced=True), 10),
        (vllm_config(ranks=2), 2),  # vLLM then has a cache in the front end alone
        (vllm_config(servers=2), 2),
        (vllm_config(kind="shm"), 2),
    ],
)
def test_half_of_the_ring_has_room_for_what_the_engines_cache_keeps(
    monkeypatch: pytest.MonkeyPatch, config: Any, ring: int
) -> None:
    monkeypatch.setattr(shm, "space", lambda: shm.Space(64 * GIB, 32 * GIB, None, 64 * GIB))
    assert vllm_plugin._settings(config, engines=[0]).transport.ring_bytes == ring * GIB
    assert vllm_plugin._settings(config).transport.ring_bytes == 2 * GIB  # an EngineCore's own


def test_the_ring_is_no_larger_than_dev_shm_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    rings = []
    for free in (6 * GIB, GIB, 64 << 20):
        monkeypatch.setattr(shm, "space", lambda free=free: shm.Space(64 * GIB, free, None, 64 * GIB))
        rings.append(vllm_plugin._settings(vllm_config(), engines=[0]).transport.ring_bytes)
    assert rings == [6 * GIB - (160 << 20), GIB - (160 << 20), 2 * GIB]  # the last is said not to fit


def test_each_engines_queue_to_its_workers_is_left_its_part_of_dev_shm() -> None:
    settings = vllm_plugin._settings(vllm_config(ranks=3), engines=[0, 1, 2])
    assert settings.transport.shm_spare_bytes == 3 * (160 << 20)
    assert settings.transport.peer_share == 0.5


class _Client:
    """As an `MPClient`, a thing that leads to itself."""

    def __init__(self) -> None:
        self.itself = self


def test_a_client_is_collected_in_a_thread_of_its_front_end(
    address: str, short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a call, under a lock: the front end leaves all the same, and its peers are told."""
    monkeypatch.setattr("engine.vllm.settings.tempfile.gettempdir", lambda: str(short_path))
    given = settings_of({"tensorferry": {"ring_bytes": 16 << 20}})
    assert given is not None

    def collect(event: str, now: int, fields: object) -> None:
        if event == "receive.opening":
            gc.collect()

    front = Front(replace(given, transport=replace(given.transport, trace=collect)), address)
    gc.disable()  # nobody else may collect it
    try:
        vllm_plugin.leave_with(_Client(), front)
        with transport.connect(front_address(address), name="engine0", timeout=30) as engine:
            engine.send({"rows": []})
            with pytest.raises(transport.PeerGone):
                engine.receive(timeout=30)
    finally:
        gc.enable()


class _Gone(Core):
    """An EngineCore's end that has lost everything."""

    def __init__(self) -> None:
        pass

    def provide(self, shape: tuple[int, ...], dtype: str, meta: dict[str, Any]) -> torch.Tensor:
        raise LookupError("tensor 3 of front-1 did not come")


class _Request:
    request_id = "r-1"
    mm_features: list[Any] | None = None


def test_the_tensors_of_a_request_are_found_in_the_order_of_vllms_encoder() -> None:
    first, second, third, fourth = (torch.full((2,), value) for value in range(4))
    request = _Request()
    request.mm_features = [
        _feature("a", pixels=first, many=[second, [third, 1.0], [[fourth]]]),
        _feature("b", nothing=None),
        _known("c"),
        _feature("d", again=first),
    ]
    found = list(vllm_plugin._tensors_of(request))
    assert [id(tensor) for tensor in found] == [id(t) for t in (first, second, third, fourth, first)]


def _feature(identifier: str, scale: object = 1.0, **elements: object) -> types.SimpleNamespace:
    elements = {"scale": scale, **elements}
    data = {name: types.SimpleNamespace(data=value) for name, value in elements.items()}
    return types.SimpleNamespace(identifier=identifier, data=data)


def _known(identifier: str) -> types.SimpleNamespace:
    """A feature that vLLM's cache has at the other end."""
    return types.SimpleNamespace(identifier=identifier, data=None)


def test_a_lost_tensor_fails_its_request_alone() -> None:
    provider = vllm_plugin._Provider(_Gone())
    engine = types.SimpleNamespace(tensor_ipc_receiver=provider)
    tensor = provider("bfloat16", (2, 3), {"tensorferry": ["front-1", 1, 3]})
    assert tensor.device.type == "meta"  # no bytes: it can't be taken for the image
    with pytest.raises(RuntimeError, match=r"request r-1 are lost: tensor 3 of front-1"):
        vllm_plugin._request_came(lambda *_: "added", engine, _Request())
    assert vllm_plugin._request_came(lambda *_: "added", engine, _Request()) == "added"


def test_what_the_input_thread_keeps_of_its_last_request_leads_to_no_image() -> None:
    """It has the request as it was decoded, and what it put into its queue, until the next one comes."""

    class Scheduled:
        def __init__(self, request: _Request) -> None:
            self.mm_features = request.mm_features

    engine = types.SimpleNamespace(tensor_ipc_receiver=vllm_plugin._Provider(_Gone()))
    request, pixels = _Request(), torch.zeros(3)
    request.mm_features = [_feature("a", pixels=pixels)]
    there = weakref.ref(pixels)
    del pixels
    handed = vllm_plugin._request_came(lambda _, request: (Scheduled(request), 7), engine, request)
    assert (len(handed), handed[1], handed[-1]) == (2, 7, 7)
    scheduled, wave = handed
    assert wave == 7
    assert handed[0] is scheduled
    assert list(vllm_plugin._tensors_of(scheduled)) == [there()]
    del scheduled
    assert there() is None
    assert list(handed) == [None, 7]


@pytest.mark.parametrize("handed", ["added", (_Request(), 7), ()])
def test_what_is_not_as_known_is_handed_to_the_engine_as_it_is(
    handed: object, caplog: pytest.LogCaptureFixture
) -> None:
    engine = types.SimpleNamespace(tensor_ipc_receiver=vllm_plugin._Provider(_Gone()))
    request = _Request()
    request.mm_features = features = [_feature("a")]
    assert vllm_plugin._request_came(lambda *_: handed, engine, request) is handed
    assert request.mm_features is features
    assert not caplog.records


class _ReceiverCache:
    """As vLLM's: a feature without data is one that it has."""

    def __init__(self) -> None:
        self.kept: dict[str, Any] = {}

    def get_and_update_features(self, features: list[Any]) -> list[Any]:
        for feature in features:
            cached = self.kept.get(feature.identifier)
            assert cached or feature.data is not None, "Expected a cached item"
            feature.data = self.kept[feature.identifier] = cached or feature.data
        return features


def test_the_whole_images_of_a_request_that_fails_are_known_to_later_ones() -> None:
    """vLLM's front end takes them for known, the lost one too, and sends none of them again."""
    provider, cache = vllm_plugin._Provider(_Gone()), _ReceiverCache()
    engine = types.SimpleNamespace(tensor_ipc_receiver=provider, mm_receiver_cache=cache)

    def come(*features: types.SimpleNamespace) -> Any:
        request = _Request()
        request.mm_features = list(features)
        return vllm_plugin._request_came(
            lambda engine, request: engine.mm_receiver_cache.get_and_update_features(request.mm_features),
            engine,
            request,
        )

    lost = provider("bfloat16", (2, 3), {"tensorferry": ["front-1", 1, 3]})
    with pytest.raises(RuntimeError, match="request r-1 are lost"):
        come(_feature("a"), _feature("b", pixels=[lost]), _feature("c", pixels=torch.zeros(1)))
    assert set(cache.kept) == {"a", "c"}
    with pytest.raises(AssertionError, match="Expected a cached item"):
        come(_known("b"), _feature("d"))
    assert set(cache.kept) == {"a", "c", "d"}
    assert len(come(_known("a"), _known("c"), _known("d"))) == 3
    come(_feature("b"))  # sent anew when the front end has forgotten it
    assert set(cache.kept) == {"a", "b", "c", "d"}


@pytest.mark.parametrize("before", [None, lambda tensor: (str, ("before",))], ids=["torch's", "another's"])
def test_tensors_are_pickled_otherwise_only_while_a_queue_is_written(
    monkeypatch: pytest.MonkeyPatch, before: Callable[..., Any] | None
) -> None:
    broadcast = types.ModuleType("vllm.distributed.device_communicators.shm_broadcast")
    parent = types.ModuleType("vllm.distributed.device_communicators")
    parent.shm_broadcast = broadcast  # type: ignore[attr-defined]
    for name, module in {
        "vllm": types.ModuleType("vllm"),
        "vllm.distributed": types.ModuleType("vllm.distributed"),
        parent.__name__: parent,
        broadcast.__name__: broadcast,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    if before is not None:
        monkeypatch.setitem(copyreg.dispatch_table, torch.Tensor, before)

    class Handing(_Gone):
        def begin_message(self) -> None:
            pass

        def hand_on(self, tensor: torch.Tensor) -> tuple[str, tuple[str, int, int]] | None:
            return ("engine0", ("front-1", 1, 7)) if tensor.numel() > 1 else None

    with pickling.as_calls(Handing()):
        reduce: Any = copyreg.dispatch_table[torch.Tensor]
        assert reduce(torch.zeros(2)) == (pickling.take, ("engine0", ("front-1", 1, 7)))
        small = reduce(torch.zeros(1))
    assert small == (str, ("before",)) if before else small[0] is torch._utils._rebuild_tensor_v2
    assert copyreg.dispatch_table.get(torch.Tensor) is before


def test_no_worker_takes_nothing() -> None:
    with pytest.raises(RuntimeError, match="no worker"):
        pickling.take("engine0", ("front-1", 1, 1))


def test_doctor_says_that_there_is_no_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(_name: str) -> str:
        raise metadata.PackageNotFoundError

    monkeypatch.setattr(metadata, "version", absent)
    (line,) = check.lines()
    assert (line.status, line.found) == ("problem", "not installed here")


_LEAVES_A_CHILD = """
import multiprocessing, os, signal, sys, time
import shm
import transport
from engine import vllm_plugin

def ring(address, ready):
    import torch
    import transport
    with transport.listen(address) as front, front.loan((1,), torch.uint8):
        ready.set()
        time.sleep(100)

if __name__ == "__main__":
    vllm_plugin._sweep_at_exit()
    ready = multiprocessing.get_context("spawn").Event()
    child = multiprocessing.get_context("spawn").Process(target=ring, args=(sys.argv[1], ready))
    child.start()
    assert ready.wait(60)
    child.kill()
"""


def test_rings_of_killed_children_are_swept_at_the_end(address: str, short_path: Path) -> None:
    """As `vllm serve` kills its API servers and does not wait for them."""
    before = shm.names()
    script = short_path / "leaves.py"
    script.write_text(_LEAVES_A_CHILD)
    (short_path / f"tensorferry-{os.getuid()}").mkdir(mode=0o700)  # as a front end makes it
    done = ran([str(script), address], {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(short_path)})
    assert (done.returncode, done.stderr) == (0, "")
    assert shm.names() == before
