"""Ranks that die, come back or answer late, on one host; those of other hosts are in tests/hosts."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
import torch
from PIL import Image

import transport
from engine import ConfigError, Engine, EngineConfig, NoRankLeft, StartError
from engine.dispatch import Dispatcher
from engine.fleet import Fleet
from engine.model import Batch
from engine.parallel import Parallel
from engine.protocol import FRONT, Joined, Ready, Reply, Request, Stop, outward, transport_config
from engine.worker import Worker
from tests.engine.models import Checksum
from tests.engine.pictures import expected, picture
from tests.engine.processes import held_ports, python
from transport.conformance import joined as linked

MODEL = "tests.engine.models:Checksum"


@pytest.fixture
def port() -> Iterator[int]:
    """Where a head may listen, and nobody else is."""
    with held_ports() as first:
        yield first


def test_a_rank_that_dies_is_started_again_as_often_as_allowed(caplog: pytest.LogCaptureFixture) -> None:
    with Engine(EngineConfig(images_per_prompt=1, model=MODEL, rank_restarts=1)) as engine:
        first = engine.peers[0].pid

        def images() -> Iterator[Image.Image]:
            for number in range(6):
                if number == 3:
                    os.kill(first, signal.SIGKILL)
                yield picture(number)

        for number, result in enumerate(engine.encode(images())):
            assert result.error == ""
            assert result.embedding is not None
            assert result.embedding.equal(expected(picture(number)))
        (rank,) = engine.peers
        assert rank.error == ""
        assert rank.pid != first
        os.kill(rank.pid, signal.SIGKILL)
        with pytest.raises(NoRankLeft, match=rf"rank0 \(pid {rank.pid}\) was killed by SIGKILL"):
            list(engine.encode([picture(0)] * 3))
    assert f"rank0 (pid {rank.pid}) is back" in caplog.text


class Comedian:
    """Rank 1 by hand: it takes a request and leaves; when it is back, it answers that one first, wrongly."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with self._joined() as endpoint:
            asked = endpoint.receive(Request, timeout=60).body.id
        with self._joined() as endpoint:
            endpoint.send(Reply(asked, {0: torch.zeros(3)}, {}, 0), to=FRONT)
            while isinstance(request := endpoint.receive(Request | Stop, timeout=60).body, Request):
                embeddings = Checksum().forward(Batch(request.pixel_values, torch.tensor(request.grids)))
                endpoint.send(Reply(request.id, dict(enumerate(embeddings.embeddings)), {}, 0), to=FRONT)
                del request

    def _joined(self) -> transport.Endpoint:
        settings = transport_config(self._config, replies=True)
        address = f"tcp://127.0.0.1:{self._config.data_parallel_rpc_port}"
        endpoint = transport.connect(address, name="rank1", config=settings, timeout=60)
        endpoint.send(Joined.here(self._config), to=FRONT)
        endpoint.send(Ready(device="cpu"), to=FRONT)
        return endpoint

    def join(self) -> None:
        self._thread.join(60)
        assert not self._thread.is_alive()


def test_a_late_answer_of_a_request_that_was_sent_again_is_dropped_and_counted(port: int) -> None:
    config = EngineConfig(
        data_parallel_size=2,
        data_parallel_size_local=1,
        data_parallel_rpc_port=port,
        images_per_prompt=1,
        model=MODEL,
    )
    comedian = Comedian(config)
    with Engine(config) as engine:
        results = list(engine.encode(picture(number) for number in range(16)))
        while not engine.statistics().late:  # it may still be on its way
            list(engine.encode([picture(0)]))
        figures = engine.statistics()
    comedian.join()
    for number, result in enumerate(results):
        assert result.error == ""
        assert result.embedding is not None
        assert result.embedding.equal(expected(picture(number)))
    assert figures.late >= 1
    assert figures.images == figures.requests


def test_a_head_is_told_no_path_of_a_rank(short_path: Path, address: str) -> None:
    """The whole stays on the standard error of the rank."""
    model, file = short_path / "nowhere", short_path / "config.toml"
    config = EngineConfig(model=str(model))
    file.write_text(config.to_toml())
    command = ["-m", "engine.worker", "--rank", "rank0", "--address", address, "--config", str(file)]
    with (
        transport.listen(address, name=FRONT, config=transport_config(config)) as head,
        python(*command) as rank,
    ):
        joined = head.receive(Joined, timeout=60).body
        ready = head.receive(Ready, timeout=60).body
        _, said = rank.communicate(timeout=60)
    assert joined.serves.startswith("nowhere with seed")
    assert ready.error == "model 'nowhere': there is no such folder"
    assert f"model '{model}': there is no such folder" in said


def test_an_image_that_fails_tells_no_path_of_a_rank(capfd: pytest.CaptureFixture[str]) -> None:
    with Engine(EngineConfig(model="tests.engine.models:TellsWhere")) as engine:
        folder = os.path.dirname(engine.peers[0].address.removeprefix("ipc://"))
        (result,) = engine.encode([picture(0)])
    assert result.error.endswith("OSError: cannot read rank0.0.meeting")
    assert f"OSError: cannot read {folder}/rank0.0.meeting" in capfd.readouterr().err


@pytest.mark.parametrize("asked", ["{folder}", "{folder}/", "models/qwen", "~/models/qwen", "link/qwen"])
def test_a_model_is_known_by_the_name_of_its_folder(
    asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "models" / "qwen"
    folder.mkdir(parents=True)
    (tmp_path / "link").symlink_to("models")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    config = EngineConfig(model=asked.format(folder=folder))
    path = Path(config.model).expanduser().absolute()
    text = f"model {config.model!r}: {path}: no {path}/model.safetensors, a link to {folder.resolve()}/part"
    told = outward(text, config, Path()).replace("qwen/'", "qwen'")
    assert told == "model 'qwen': qwen: no qwen/model.safetensors, a link to qwen/part"
    assert outward("8/2 of 4 / 2 fail", config, Path()) == "8/2 of 4 / 2 fail"


@pytest.mark.parametrize("asked", ["builtin", "own.module:Class", ".", "/"])
def test_a_model_without_a_path_changes_no_text(asked: str) -> None:
    text = "model /a/b: 1 / 2 . ./ fail"
    assert outward(text, EngineConfig(model=asked), Path()) == text


HUNDRED = 100


def test_a_hundred_bad_messages_of_a_kind_are_one_line(caplog: pytest.LogCaptureFixture, port: int) -> None:
    config = EngineConfig(data_parallel_size_local=0, data_parallel_rpc_port=port, model=MODEL)
    settings = transport_config(config, replies=True)
    address = f"tcp://127.0.0.1:{config.data_parallel_rpc_port}"

    def joined(name: str) -> transport.Endpoint:
        endpoint = transport.connect(address, name=name, config=settings, timeout=60)
        endpoint.send(Joined.here(config), to=FRONT)
        endpoint.send(Ready(device="cpu"), to=FRONT)
        return endpoint

    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(joined, "rank0")
        with Engine(config) as engine, coming.result(60) as rank:
            coming = pool.submit(joined, "stranger")
            while not coming.done():
                engine._dispatcher.progress()
            with coming.result() as stranger:
                for _ in range(HUNDRED):
                    rank.send({"no": "reply"}, to=FRONT)
                    rank.send(Reply(999, {}, {}, 0), to=FRONT)
                    stranger.send(Ready(), to=FRONT)
                while any(peer.unacknowledged for peer in rank.peers + stranger.peers):
                    engine._dispatcher.progress()
                engine._dispatcher._warnings._seconds = 0  # so that the next one passes
                rank.send({"no": "reply"}, to=FRONT)
                rank.send(Reply(999, {}, {}, 0), to=FRONT)
                stranger.send(Ready(), to=FRONT)
                while any(peer.unacknowledged for peer in rank.peers + stranger.peers):
                    engine._dispatcher.progress()
    for text in ("an answer could not be read", "what it sent is ignored", "answers a request too late"):
        first, second = [record.message for record in caplog.records if text in record.message]
        assert "left out" not in first
        assert re.search(r"\((99|100) more such warnings left out\)$", second)


def test_a_worker_says_once_that_it_cannot_read(address: str, caplog: pytest.LogCaptureFixture) -> None:
    settings = transport.TransportConfig()
    with (
        transport.listen(address, name=FRONT, config=settings) as front,
        linked(front, "rank0", settings) as rank,
    ):
        worker = Worker(rank, Checksum(), torch.device("cpu"), Parallel(), str)
        for number in range(HUNDRED):
            front.send({"no": number}, to="rank0")
        front.send(Stop(), to="rank0")
        worker._take_requests()
        worker._warnings._seconds = 0
        front.send({"no": "request"}, to="rank0")
        front.send(Stop(), to="rank0")
        worker._take_requests()
    first, second = [record.message for record in caplog.records if "could not be read" in record.message]
    assert "message 1 from 'front'" in first
    assert second.endswith("(99 more such warnings left out)")


def test_a_rank_that_does_not_come_is_named(port: int) -> None:
    config = EngineConfig(
        data_parallel_size=2, data_parallel_size_local=0, data_parallel_rpc_port=port, startup_timeout=0.3
    )
    with pytest.raises(StartError) as caught:
        Engine(config)
    assert str(caught.value) == (
        "not ready within 0.3 s (startup_timeout): "
        f"rank0 (of another host) has not connected to tcp://127.0.0.1:{port}; "
        f"rank1 (of another host) has not connected to tcp://127.0.0.1:{port}"
    )


def test_a_head_that_does_not_come_is_named(port: int) -> None:
    with python("-m", "engine", "run", "--headless", "-dpp", str(port), "--head-timeout", "0.3") as there:
        _, said = there.communicate()
    assert there.returncode == 1
    line = (
        r"tensorferry: no head in 0\.3 s \(head_timeout\): 'rank0' could not connect to"
        rf" tcp://127\.0\.0\.1:{port} in \S+ s: nobody listens there"
    )
    assert re.search(f"^{line}$", said, re.MULTILINE), said


def test_a_rank_that_serves_something_else_is_refused(port: int) -> None:
    config = EngineConfig(data_parallel_size_local=0, data_parallel_rpc_port=port, model=MODEL)
    flags = ["--headless", "-dpp", str(port), "--model", MODEL, "--seed", "5"]
    with python("-m", "engine", "run", *flags) as there:
        what = (
            f"it serves {MODEL} with seed 5 on 1 × 1 workers, its head {MODEL} with seed 0 on 1 × 1 workers"
        )
        with pytest.raises(StartError) as caught:
            Engine(config)
        _, said = there.communicate()
    where = rf"rank0 \(pid \d+ on {re.escape(socket.gethostname())}\)"
    assert re.fullmatch(f"{where} could not start: {re.escape(what)}", str(caught.value))
    assert there.returncode == 1
    assert f"tensorferry: rank0: the head does not want this worker: {what}\n" in said


@contextmanager
def head_of(
    config: EngineConfig, before: Sequence[str] = ()
) -> Iterator[tuple[Dispatcher, list[transport.Endpoint]]]:
    """A head without photographs, and who came under the names in `before` ahead of its own ranks, by tcp."""
    fleet = Fleet(config)
    settings = transport_config(config)
    with ExitStack() as stack:
        stack.callback(fleet.stop, polite=False)
        front = stack.enter_context(transport.listen(fleet.addresses, name=FRONT, config=settings))
        others = [stack.enter_context(linked(front, name, settings)) for name in before]
        for other in others:
            other.send(Joined.here(config), to=FRONT)
            other.send(Ready(device="cpu"), to=FRONT)
        fleet.start(front.addresses)
        yield Dispatcher(front, fleet, config), others


def test_a_rank_that_the_head_has_not_is_sent_away(caplog: pytest.LogCaptureFixture, port: int) -> None:
    config = EngineConfig(data_parallel_size_local=0, data_parallel_rpc_port=port, model=MODEL)
    with head_of(config, before=["rank3"]) as (head, (stranger,)):
        while (told := stranger.try_receive(Stop)) is None:
            head.progress()
    assert told.body.reason.startswith(
        "'rank3' is none of the head's ranks; "
        "compare --data-parallel-size and --data-parallel-start-rank (it serves "
    )
    assert re.search(r"'rank3' \(pid \d+ on .+\) is none of the ranks; it is sent away", caplog.text)


def test_a_rank_of_another_host_that_the_head_starts_itself_is_sent_away(port: int) -> None:
    config = EngineConfig(
        data_parallel_size=2, data_parallel_size_local=1, data_parallel_rpc_port=port, model=MODEL
    )
    with head_of(config, before=["rank0"]) as (head, (namesake,)):
        with pytest.raises(StartError) as caught:
            head.wait_until_ready(60)
        assert namesake.receive(Stop, timeout=60).body.reason == (
            "its head starts rank0 itself; give this host its own --data-parallel-start-rank"
        )
    assert f"the name 'rank0' is taken by pid {os.getpid()} over tcp://127.0.0.1:{port} since" in str(
        caught.value
    )
    assert str(caught.value).endswith(
        f"; pid {os.getpid()} on {socket.gethostname()} came as rank0, which the head starts itself: "
        "that host lacks its --data-parallel-start-rank"
    )


def test_what_the_head_said_before_it_left_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tmp_path / "loaded"
    monkeypatch.setenv("LOAD_WHEN", str(loaded))
    with transport.listen("tcp://127.0.0.1:*", name=FRONT) as front:
        flags = ["--headless", "-dpp", front.addresses[0].rpartition(":")[2]]
        with python("-m", "engine", "run", *flags, "--model", "tests.engine.models:LoadsLate") as there:
            front.receive(Joined, timeout=60)
            front.send(Stop("it came uncalled"), to="rank0")
            front.close()
            loaded.touch()
            _, said = there.communicate()
    assert there.returncode == 1
    assert "tensorferry: rank0: the head does not want this worker: it came uncalled\n" in said


def test_off_loopback_nobody_listens_without_keys_unless_told() -> None:
    config = EngineConfig(data_parallel_size_local=0, data_parallel_address="192.0.2.77")
    with pytest.raises(StartError, match=r"192\.0\.2\.77:29550 .*--insecure"):
        Engine(config)


def test_a_headless_host_ends_when_its_rank_died_too_often() -> None:
    with transport.listen("tcp://127.0.0.1:*", name=FRONT) as front:
        port = front.addresses[0].rpartition(":")[2]
        flags = ["--headless", "-dpp", port, "--model", "tests.engine.models:DiesInLoad"]
        with python("-m", "engine", "run", *flags, "--rank-restarts", "1") as there:
            while there.poll() is None:
                with suppress(transport.Timeout):
                    front.receive(timeout=0.1)
            _, said = there.communicate()
    assert there.returncode == 1
    assert "rank0 exited with code 7; it is started again" in said
    assert "tensorferry: rank0 exited with code 7; it wrote: no such luck\n" in said


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data_parallel_start_rank": 1}, "data_parallel_start_rank is for --headless"),
        ({"headless": True, "data_parallel_start_rank": 1}, "no rank is left for this host"),
        ({"headless": True, "data_parallel_size_local": 0}, "no rank is left for this host"),
        ({"data_parallel_size_local": 2}, "that is more than data_parallel_size, 1"),
        ({"headless": True, "data_parallel_backend": "ray"}, "run the head alone"),
        ({"curve_clients": "keys"}, "curve_clients without curve_key encrypts nothing"),
        ({"curve_server": "head.key"}, "curve_server without curve_key encrypts nothing"),
    ],
)
def test_what_contradicts_itself_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig.load(settings, environ={})


def test_ranks_are_divided_among_hosts() -> None:
    def numbers(**settings: object) -> list[int]:
        return list(EngineConfig.load({"data_parallel_size": 4, **settings}, environ={}).local_ranks)

    assert numbers() == [0, 1, 2, 3]
    assert numbers(data_parallel_size_local=0) == []
    assert numbers(data_parallel_size_local=2) == [0, 1]
    assert numbers(headless=True, data_parallel_start_rank=2) == [2, 3]
    assert numbers(headless=True, data_parallel_start_rank=2, data_parallel_size_local=1) == [2]
    assert numbers(data_parallel_backend="ray") == []
