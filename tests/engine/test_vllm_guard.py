"""The plugin's hooks in a vLLM that is not as known, and with parts of ours that fail: vLLM runs on."""

from __future__ import annotations

import importlib.abc
import os
import sys
import types
from collections.abc import Callable, Iterator
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import vllm_plugin
from engine.vllm import guard, pickling, points
from engine.vllm.mailbox import Key
from engine.vllm.roles import Core, Front
from engine.vllm.settings import core_address
from tests.engine.test_vllm_roles import ENGINE, image, linked


class Kind(Enum):
    """As vLLM's `EngineCoreRequestType`."""

    ADD = b"\x00"
    ABORT = b"\x01"


class Request:
    """As vLLM's `EngineCoreRequest` with one image."""

    def __init__(self, tensor: torch.Tensor) -> None:
        element = types.SimpleNamespace(data=tensor)
        self.request_id = "r-1"
        self.mm_features = [types.SimpleNamespace(data={"pixel_values": element})]


class Calls:
    """A function of vLLM's that says how it was called, and what its encoder got for the image meanwhile."""

    def __init__(self, during: Callable[[], Any] = lambda: None, error: Exception | None = None) -> None:
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._during = during
        self._error = error

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        self.calls.append((arguments, named))
        if self._error is not None:
            raise self._error
        return self._during()


@pytest.fixture(autouse=True)
def _own_folder(monkeypatch: pytest.MonkeyPatch, short_path: Path) -> None:
    monkeypatch.setattr("engine.vllm.settings.tempfile.gettempdir", lambda: str(short_path))


@pytest.fixture(autouse=True)
def _nothing_was_said_before(monkeypatch: pytest.MonkeyPatch) -> None:
    guard.forget()
    monkeypatch.setattr(vllm_plugin, "_unsaid", {})
    monkeypatch.setattr(points, "hooked", {})


@pytest.fixture
def front(short_path: Path) -> Iterator[Front]:
    """A front end whose engine maps its ring."""
    with linked(f"ipc://{short_path}/vllm", copy_above=0.5) as (front, _):
        yield front


def client(front: Front | None) -> Any:
    """As an `MPClient` that the plugin knows, or does not."""
    made = types.SimpleNamespace(core_engine=ENGINE)
    if front is not None:
        made._tensorferry = front
    return made


def modules(monkeypatch: pytest.MonkeyPatch, *names: str) -> list[types.ModuleType]:
    """Empty modules of those names, as if they had been imported."""
    made = [types.ModuleType(name) for name in names]
    for module in made:
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return made


def tracebacks(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was logged with one."""
    return [record.getMessage() for record in caplog.records if record.exc_info]


CALLS = {
    "as known": lambda request: ((Kind.ADD, request, ENGINE), {}),
    "without the engine": lambda request: ((Kind.ADD, request), {}),
    "by name": lambda request: ((), {"request_type": Kind.ADD, "request": request, "engine": None}),
    "in another order": lambda request: ((ENGINE, request, Kind.ADD), {}),
}


@pytest.mark.parametrize("given", CALLS.values(), ids=CALLS.keys())
def test_a_request_is_sent_however_vllm_says_it(
    front: Front, given: Callable[[Request], tuple[tuple[Any, ...], dict[str, Any]]]
) -> None:
    tensor = image()
    original = Calls(lambda: front.lend(tensor))
    arguments, named = given(Request(tensor))
    sender = client(front)
    assert vllm_plugin._client_sends(original, sender, *arguments, **named) is not None
    assert original.calls == [((sender, *arguments), named)]


@pytest.mark.parametrize("given", CALLS.values(), ids=CALLS.keys())
def test_where_nothing_was_asked_for_a_request_is_passed_on_as_it_came(
    caplog: pytest.LogCaptureFixture,
    given: Callable[[Request], tuple[tuple[Any, ...], dict[str, Any]]],
) -> None:
    original, sender = Calls(lambda: "sent"), client(None)
    arguments, named = given(Request(image()))
    assert vllm_plugin._client_sends(original, sender, *arguments, **named) == "sent"
    assert original.calls == [((sender, *arguments), named)]
    assert not caplog.records


class Broken:
    """A request that can't be looked at."""

    @property
    def mm_features(self) -> Any:
        raise RuntimeError("no such view")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        pytest.param((Kind.ADD, Request(image()), ENGINE, 5), "5", id="one argument more"),
        pytest.param(("add", Request(image()), ENGINE), "no kind of request", id="another kind"),
        pytest.param((Kind.ADD, Broken(), ENGINE), "no such view", id="another request"),
    ],
)
def test_a_call_that_is_not_as_known_goes_vllms_way_and_that_is_said(
    front: Front, caplog: pytest.LogCaptureFixture, arguments: tuple[Any, ...], error: str
) -> None:
    original, sender = Calls(lambda: front.lend(image())), client(front)
    for _ in range(2):
        assert vllm_plugin._client_sends(original, sender, *arguments) is None
    assert original.calls == 2 * [((sender, *arguments), {})]
    (said,) = tracebacks(caplog)
    assert error in said


def test_a_front_end_that_is_closed_in_mid_run_fails_no_request(
    front: Front, caplog: pytest.LogCaptureFixture
) -> None:
    ready, tensor = front._ready, image()
    front.close()
    front._ready = ready  # nobody has looked since
    original = Calls(lambda: front.lend(tensor))
    assert vllm_plugin._client_sends(original, client(front), Kind.ADD, Request(tensor), ENGINE) is None
    assert len(original.calls) == 1
    assert "Closed" in tracebacks(caplog)[0]


def test_what_vllm_raises_is_raised_and_its_call_is_not_made_again(
    front: Front, caplog: pytest.LogCaptureFixture
) -> None:
    error = KeyError("vLLM's own")
    original = Calls(error=error)
    with pytest.raises(KeyError) as raised:
        vllm_plugin._client_sends(original, client(front), Kind.ADD, Request(image()), ENGINE)
    assert raised.value is error
    assert len(original.calls) == 1
    assert not caplog.records
    assert front._target is None  # and the next message is not taken for this one


def test_a_tensor_that_cannot_be_lent_goes_vllms_way(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (serial,) = modules(monkeypatch, "vllm.v1.serial_utils")
    serial.OOBTensorConsumer = object  # type: ignore[attr-defined]

    class Failing(Front):
        def __init__(self) -> None:
            pass

        def lend(self, tensor: torch.Tensor) -> dict[str, Any] | None:
            raise RuntimeError("view size is not compatible")

    consumer = vllm_plugin._consumer(Failing())
    assert [consumer(image()) for _ in range(3)] == [None] * 3
    (said,) = tracebacks(caplog)
    assert "view size is not compatible" in said


@pytest.mark.parametrize("configured", [True, False])
def test_a_client_whose_configuration_is_elsewhere_is_left_alone(
    caplog: pytest.LogCaptureFixture, configured: bool
) -> None:
    made = types.SimpleNamespace()
    original = Calls()
    config = types.SimpleNamespace(additional_config={"tensorferry": configured})
    vllm_plugin._client_made(original, made, vllm_config=config)
    assert original.calls == [((made,), {"vllm_config": config})]
    assert len(caplog.records) == configured  # who did not ask for anything hears nothing
    assert not configured or "no attribute 'vllm_config'; tensors go vLLM's way" in tracebacks(caplog)[0]


@pytest.mark.parametrize(("version", "warned"), [("0.25.1", False), ("0.24.0", True)])
def test_a_version_that_was_not_tried_is_warned_of_where_rings_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, version: str, warned: bool
) -> None:
    monkeypatch.setattr(metadata, "version", lambda _name: version)
    for configured in (False, True):
        config = types.SimpleNamespace(
            additional_config={"tensorferry": configured}, parallel_config=None, model_config=None
        )
        made = types.SimpleNamespace(vllm_config=config, engine_ranks_managed=[0], core_engine=ENGINE)
        vllm_plugin._client_made(Calls(), made)
    said = [record.getMessage() for record in caplog.records]
    assert said == ["tensorferry: vLLM 0.24.0 was not tried; known are 0.25.1 up to 0.33.0"] * warned


def engine(additional_config: Any, *, multimodal: bool = True) -> Any:
    """As an `EngineCoreProc` without workers."""
    model = types.SimpleNamespace(multimodal_config={} if multimodal else None, enable_prompt_embeds=False)
    return types.SimpleNamespace(
        vllm_config=types.SimpleNamespace(
            additional_config=additional_config,
            model_config=model,
            parallel_config=types.SimpleNamespace(
                data_parallel_size_local=1, distributed_executor_backend="mp"
            ),
        ),
        tensor_ipc_receiver=None,
        model_executor=types.SimpleNamespace(),
        engine_index=0,
    )


INPUTS = {
    "as known": lambda addresses: ((addresses, None, ENGINE, object()), {}),
    "by name": lambda addresses: ((), {"identity": ENGINE, "input_addresses": addresses}),
    "in another order": lambda addresses: ((None, ENGINE, addresses), {"more": 1}),
}


@pytest.mark.parametrize("given", INPUTS.values(), ids=INPUTS.keys())
@pytest.mark.parametrize("configured", [True, False])
def test_an_engine_begins_however_vllm_says_it(
    monkeypatch: pytest.MonkeyPatch,
    short_path: Path,
    given: Callable[[list[str]], tuple[tuple[Any, ...], dict[str, Any]]],
    configured: bool,
) -> None:
    monkeypatch.setattr(vllm_plugin, "_core", None)
    arguments, named = given([f"ipc://{short_path}/vllm"])
    original, begins = Calls(lambda: "ran"), engine({"tensorferry": configured})
    try:
        assert vllm_plugin._input_begins(original, begins, *arguments, **named) == "ran"
        assert original.calls == [((begins, *arguments), named)]
        assert isinstance(begins.tensor_ipc_receiver, vllm_plugin._Provider) == configured
    finally:
        if vllm_plugin._core is not None:
            vllm_plugin._core.close()


def test_an_engine_of_a_model_without_images_is_left_alone(short_path: Path) -> None:
    """Neither its front ends nor its workers make an end that it could link with."""
    original, begins = Calls(lambda: "ran"), engine({"tensorferry": True}, multimodal=False)
    assert vllm_plugin._input_begins(original, begins, [f"ipc://{short_path}/vllm"]) == "ran"
    assert begins.tensor_ipc_receiver is None


def test_an_engine_without_addresses_begins_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    original, begins = Calls(lambda: "ran"), engine({"tensorferry": True})
    assert vllm_plugin._input_begins(original, begins, 5) == "ran"
    assert original.calls == [((begins, 5), {})]
    assert begins.tensor_ipc_receiver is None
    assert "no list of addresses" in tracebacks(caplog)[0]


def test_an_engine_whose_queue_cannot_be_hooked_takes_what_front_ends_send(
    monkeypatch: pytest.MonkeyPatch, short_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its end is linked by then, and without a provider vLLM's decoder would end the input thread."""
    monkeypatch.setattr(vllm_plugin, "_core", None)
    monkeypatch.setattr(points, "require", lambda _hop: None)
    begins = engine({"tensorferry": True})
    begins.model_executor.rpc_broadcast_mq = types.SimpleNamespace(n_local_reader=1, n_remote_reader=0)
    try:
        assert vllm_plugin._input_begins(Calls(lambda: "ran"), begins, [f"ipc://{short_path}/vllm"]) == "ran"
        assert isinstance(begins.tensor_ipc_receiver, vllm_plugin._Provider)
        assert "the queue to the workers failed: AttributeError" in tracebacks(caplog)[0]
    finally:
        if vllm_plugin._core is not None:
            vllm_plugin._core.close()


@pytest.mark.parametrize(
    ("remote", "backend", "receiver"), [(1, "mp", None), (0, "ray", None), (0, "mp", "vLLM's own")]
)
def test_queues_and_receivers_that_are_not_for_us_are_left_alone(
    monkeypatch: pytest.MonkeyPatch, short_path: Path, remote: int, backend: str, receiver: str | None
) -> None:
    """What a reader elsewhere gets must be whole; Ray's workers make no end of ours, and would count as not
    linked for ever; with `mm_tensor_ipc="torch_shm"` there is a receiver.
    """
    monkeypatch.setattr(vllm_plugin, "_core", None)
    monkeypatch.setattr(points, "require", lambda _hop: None)
    begins, enqueue = engine({"tensorferry": True}), Calls()
    begins.vllm_config.parallel_config.distributed_executor_backend = backend
    queue = types.SimpleNamespace(n_local_reader=1, n_remote_reader=remote, enqueue=enqueue)
    begins.model_executor.rpc_broadcast_mq, begins.tensor_ipc_receiver = queue, receiver
    try:
        assert vllm_plugin._input_begins(Calls(lambda: "ran"), begins, [f"ipc://{short_path}/vllm"]) == "ran"
        assert queue.enqueue is enqueue
        if receiver:
            assert begins.tensor_ipc_receiver is receiver
            assert vllm_plugin._core is None
        else:
            assert isinstance(begins.tensor_ipc_receiver, vllm_plugin._Provider)
            assert not Path(core_address(os.getpid()).removeprefix("ipc://")).exists()
    finally:
        if vllm_plugin._core is not None:
            vllm_plugin._core.close()


def test_a_client_whose_encoder_has_a_consumer_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As with `mm_tensor_ipc="torch_shm"`."""
    monkeypatch.setattr(metadata, "version", lambda _name: "0.25.1")
    config = types.SimpleNamespace(
        additional_config={"tensorferry": True},
        parallel_config=types.SimpleNamespace(data_parallel_size_local=1),
        model_config=types.SimpleNamespace(multimodal_config={}),
    )
    encoder = types.SimpleNamespace(oob_tensor_consumer="vLLM's own")
    made = types.SimpleNamespace(
        vllm_config=config, engine_ranks_managed=[0], core_engine=ENGINE, encoder=encoder
    )
    vllm_plugin._client_made(Calls(), made)
    assert encoder.oob_tensor_consumer == "vLLM's own"
    assert not hasattr(made, "_tensorferry")
    (record,) = caplog.records
    assert record.getMessage() == "tensorferry: mm_tensor_ipc carries the tensors already; take direct_rpc"


def test_a_request_comes_however_vllm_says_it() -> None:
    original, here = Calls(lambda: "added"), engine(None)
    request = Request(image())
    assert vllm_plugin._request_came(original, here, request=request, more=1) == "added"
    assert original.calls == [((here,), {"request": request, "more": 1})]


class Failing(Core):
    """An EngineCore's end of which nothing works."""

    def __init__(self, *, measures: bool) -> None:
        self._measures = measures

    def begin_message(self) -> None:
        if not self._measures:
            raise RuntimeError("the ring cannot be measured")

    def hand_on(self, tensor: torch.Tensor) -> tuple[str, Key] | None:
        raise RuntimeError("the tensor cannot be handed on")


@pytest.mark.parametrize(("measures", "said"), [(False, "be measured"), (True, "be handed on")])
def test_what_fails_at_the_queue_leaves_tensors_to_vllm(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, measures: bool, said: str
) -> None:
    parent, broadcast = modules(
        monkeypatch,
        "vllm.distributed.device_communicators",
        "vllm.distributed.device_communicators.shm_broadcast",
    )
    parent.shm_broadcast = broadcast  # type: ignore[attr-defined]
    broadcast._reduce_tensor = lambda tensor: (str, ("vLLM's",))  # type: ignore[attr-defined]
    original = Calls(lambda: broadcast._reduce_tensor(image()))
    queue = types.SimpleNamespace(enqueue=original)
    pickling.hook(queue, Failing(measures=measures))
    assert [queue.enqueue("step", timeout=1) for _ in range(2)] == 2 * [(str, ("vLLM's",))]
    assert original.calls == 2 * [(("step",), {"timeout": 1})]
    (line,) = tracebacks(caplog)
    assert said in line


def test_statistics_are_logged_whatever_ours_are(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(vllm_plugin, "_fronts", [types.SimpleNamespace()])  # without counts
    original = Calls(lambda: "logged")
    assert vllm_plugin._statistics_logged(original, "logger", more=1) == "logged"
    assert original.calls == [(("logger",), {"more": 1})]
    (said,) = tracebacks(caplog)
    assert "no attribute 'counts'" in said
    assert "vLLM's way" not in said  # tensors go as they did


class Slots:
    """A thing that has no attributes."""

    __slots__ = ()


@pytest.mark.parametrize("configured", [True, False, None])
@pytest.mark.parametrize("part", ["_worker_begins", "_input_begins"])
def test_a_process_begins_whatever_it_has(
    caplog: pytest.LogCaptureFixture, part: str, configured: bool | None
) -> None:
    """configured: None where nobody can tell."""
    config = types.SimpleNamespace(additional_config={"tensorferry": configured})
    original = Calls(lambda: "ready")
    party = Slots() if configured is None else types.SimpleNamespace(configuration=config)
    assert getattr(vllm_plugin, part)(original, party, 3) == "ready"
    assert original.calls == [((party, 3), {})]
    assert len(caplog.records) == (configured is True)
    assert not configured or "no attribute 'vllm_config'" in tracebacks(caplog)[0]


def known_front(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Modules with classes of the shape of vLLM's that the hooks of a front end look for."""

    class EngineArgs:
        def __init__(self, additional_config: Any) -> None:
            self.additional_config = additional_config

        def create_engine_config(self, *more: Any) -> Any:
            return more

    class MPClient:
        def __init__(self) -> None:
            self.encoder = None

        def _send_input(self) -> Any:
            return self.encoder

    class LoggingStatLogger:
        def log(self) -> None:
            pass

    classes: dict[str, dict[str, Any]] = {
        "vllm.engine.arg_utils": {"EngineArgs": EngineArgs},
        "vllm.v1.engine.core_client": {
            "MPClient": MPClient,
            "SyncMPClient": type("SyncMPClient", (MPClient,), {"_send_input": MPClient._send_input}),
            "AsyncMPClient": type("AsyncMPClient", (MPClient,), {"_send_input": MPClient._send_input}),
        },
        "vllm.v1.serial_utils": {"OOBTensorConsumer": object},
        "vllm.v1.metrics.loggers": {"LoggingStatLogger": LoggingStatLogger},
    }
    for module in modules(monkeypatch, *classes):
        for name, value in classes[module.__name__].items():
            setattr(module, name, value)
    return {name: value for found in classes.values() for name, value in found.items()}


def test_what_is_hooked_twice_is_hooked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    known = known_front(monkeypatch)
    vllm_plugin.register()
    hooked = known["MPClient"].__init__, known["SyncMPClient"]._send_input
    vllm_plugin.register()
    assert (known["MPClient"].__init__, known["SyncMPClient"]._send_input) == hooked


def asked_for(known: dict[str, Any], configured: object = True) -> None:
    """As a front end whose configuration asks for rings, or does not."""
    known["EngineArgs"]({"tensorferry": configured}).create_engine_config()


def config_of(configured: object) -> Any:
    """As a `VllmConfig`, of a model without images."""
    return types.SimpleNamespace(
        additional_config={"tensorferry": configured},
        model_config=None,
        parallel_config=types.SimpleNamespace(distributed_executor_backend="uni"),
    )


def begins(part: str, configured: object) -> None:
    """That part of vLLM's, whose configuration asks for rings or does not, begins."""
    if part == "_options_given":
        given: Any = config_of(configured)
    else:
        given = types.SimpleNamespace(vllm_config=config_of(configured), tensor_ipc_receiver=None)
        given.engine_ranks_managed, given.core_engine = [0], ENGINE
    getattr(vllm_plugin, part)(Calls(), given)


@pytest.mark.parametrize(
    "part", ["_options_given", "_client_made", "_statistics_logged", "_input_begins", "_worker_begins"]
)
def test_what_is_not_known_is_said_once_and_only_where_rings_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, part: str
) -> None:
    """Whichever part sees the configuration says it, and that of the others."""
    monkeypatch.setattr(vllm_plugin, "_sweep_at_exit", Calls())
    monkeypatch.setattr(metadata, "version", lambda _name: "0.25.1")
    known = known_front(monkeypatch)
    del known["LoggingStatLogger"].log
    del known["EngineArgs"].create_engine_config
    vllm_plugin.register()
    for configured in (False, None):
        begins(part, configured)
        assert not caplog.records
    for _ in range(2):
        begins(part, True)
        vllm_plugin.register()
    said = [record.getMessage() for record in caplog.records]
    assert [line.partition(" is not as known here (")[0] for line in said] == [
        "tensorferry: the configuration",
        "tensorferry: the line of counters",
    ]


def test_without_a_place_for_the_counters_the_front_end_is_hooked_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    known = known_front(monkeypatch)
    del known["LoggingStatLogger"].log
    vllm_plugin.register()
    asked_for(known)
    assert known["MPClient"].__init__._tensorferry
    assert known["SyncMPClient"]._send_input._tensorferry
    assert list(points.hooked.values()).count("") == 2
    assert "LoggingStatLogger" in points.hooked["the line of counters"]
    (record,) = caplog.records
    assert "the line of counters is not as known here" in record.getMessage()


def test_a_front_end_that_encodes_elsewhere_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What is said of the engine before a message would be forgotten before its tensors are asked for."""
    known = known_front(monkeypatch)
    known["AsyncMPClient"]._send_input = lambda self, *arguments: self.send_later(*arguments)
    vllm_plugin.register()
    asked_for(known)
    assert not hasattr(known["MPClient"].__init__, "_tensorferry")
    assert not hasattr(known["SyncMPClient"]._send_input, "_tensorferry")
    assert "AsyncMPClient._send_input does not use encoder" in caplog.text


@pytest.mark.parametrize("given", [5, "yes", ["ring_bytes"], {"ring_byte": 1}, {1: 2}])
def test_a_wrong_option_is_refused_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, given: object
) -> None:
    known = known_front(monkeypatch)
    original = Calls()
    known["EngineArgs"].create_engine_config = lambda _self: original()
    vllm_plugin.register()
    with pytest.raises(ValueError, match="tensorferry(: unknown option| must be true, false or options)"):
        known["EngineArgs"]({"tensorferry": given}).create_engine_config()
    assert original.calls == []
    assert known["EngineArgs"]({"other": given}).create_engine_config() is None


@pytest.mark.parametrize("configured", [True, False])
def test_rings_are_swept_at_the_end_only_where_they_were_asked_for(
    monkeypatch: pytest.MonkeyPatch, configured: bool
) -> None:
    known, at_exit = known_front(monkeypatch), Calls()
    monkeypatch.setattr(vllm_plugin, "_sweep_at_exit", at_exit)
    vllm_plugin.register()
    known["EngineArgs"]({"tensorferry": configured}).create_engine_config()
    assert len(at_exit.calls) == configured


def test_a_sweep_at_the_end_that_fails_is_a_line_in_the_log(
    short_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (short_path / f"tensorferry-{os.getuid()}").write_text("somebody else's")
    vllm_plugin._sweep()
    (said,) = tracebacks(caplog)
    assert "the sweep at the end failed: " in said
    assert "vLLM's way" not in said


class NoImport(importlib.abc.MetaPathFinder):
    """Modules of vLLM's that can't be imported here, as where a library of theirs is broken."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname.startswith("vllm."):
            raise OSError("libcudart.so.99: cannot open shared object file")
        return None


def test_an_import_that_fails_in_any_way_ends_no_vllm(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    package, _ = modules(monkeypatch, "vllm", "vllm.engine.arg_utils")
    package.__path__ = []
    monkeypatch.setattr(sys, "meta_path", [NoImport(), *sys.meta_path])
    vllm_plugin.register()
    assert not caplog.records
    begins("_client_made", True)
    assert "the front end is not as known here (libcudart.so.99: cannot open" in caplog.text
    assert tracebacks(caplog)
