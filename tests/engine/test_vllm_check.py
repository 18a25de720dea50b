"""What `tensorferry doctor --vllm` says of vLLM and its processes, and the files that these leave."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import sys
import threading
import types
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

from engine.vllm import check, counts, guard, points
from engine.vllm.check import Line
from engine.vllm.counts import FRONT, WORKERS, Counts, saved
from engine.vllm.settings import sweep
from tests.engine.test_vllm_guard import NoImport
from tests.engine.test_vllm_roles import image, lend, linked, until


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, short_path: Path) -> Path:
    """Where the processes of this test save their counters; nothing is hooked and nothing failed yet."""
    monkeypatch.setattr("engine.vllm.settings.tempfile.gettempdir", lambda: str(short_path))
    monkeypatch.setattr(points, "hooked", {})
    guard.forget()
    return short_path / f"tensorferry-{os.getuid()}"


def vllm_of(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    """As if that version were installed, of which nothing can be imported."""
    monkeypatch.setattr(metadata, "version", lambda _name: version)
    monkeypatch.setitem(sys.modules, "vllm", types.ModuleType("vllm"))


def found(what: str) -> Line:
    """The look of that name."""
    (line,) = [line for line in check.lines() if line.what == what]
    return line


@pytest.mark.parametrize(
    ("version", "status"),
    [
        ("0.24.9", "note"),
        ("0.25.1", "ok"),
        ("0.33.0.post1", "ok"),
        ("0.33.1rc2", "note"),
        ("0.1.dev7+g12ab", "note"),
        ("1.0", "note"),
    ],
)
def test_a_version_that_was_not_tried_is_a_note(
    monkeypatch: pytest.MonkeyPatch, version: str, status: str
) -> None:
    vllm_of(monkeypatch, version)
    line = found("vLLM")
    assert (line.status, bool(line.advice)) == (status, status == "note")
    assert version in line.found


def test_what_cannot_be_imported_is_a_problem_whatever_the_import_raises(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vllm_of(monkeypatch, "0.25.1")
    monkeypatch.setattr(sys.modules["vllm"], "__path__", [], raising=False)
    monkeypatch.setattr(sys, "meta_path", [NoImport(), *sys.meta_path])
    for hop in points.POINTS:
        line = found(hop)
        assert line.status == "problem"
        assert "(OSError: libcudart.so.99" in line.found


def test_a_process_is_ok_when_it_is_linked_and_its_tensors_take_the_ring(
    monkeypatch: pytest.MonkeyPatch, short_path: Path
) -> None:
    vllm_of(monkeypatch, "0.25.1")
    points.hooked["the front end"] = ""
    with linked(f"ipc://{short_path}/vllm", copy_above=0.5) as (front, _):
        assert lend(front, image()) is not None
        until(lambda: "ring 1" in found(f"front {os.getpid()}").found)
        line = found(f"front {os.getpid()}")
        assert (line.status, line.advice) == ("ok", "")
        assert "linked with engine0 (shm: " in line.found
        assert "hooked: the front end" in line.found

        points.hooked["the line of counters"] = "no module named loggers"
        until(lambda: found(f"front {os.getpid()}").status == "problem")
        assert (
            "the line of counters is not hooked: no module named loggers"
            in found(f"front {os.getpid()}").advice
        )


def test_a_process_is_seen_also_while_it_saves() -> None:
    counts, stop = Counts("front"), threading.Event()
    counts.save(now=True)

    def saves() -> None:
        while not stop.is_set():
            counts.add(FRONT, "ring", 1)
            counts.save(now=True)

    thread = threading.Thread(target=saves)
    thread.start()
    try:
        for _ in range(3_000):
            assert any(process["pid"] == os.getpid() for process in saved())
    finally:
        stop.set()
        thread.join()
        counts.remove()


def test_counters_that_another_thread_removes_as_they_are_saved_stay_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts = Counts("front")
    monkeypatch.setattr(counts, "_publish", counts.remove)
    counts.save(now=True)
    assert not counts._file.exists()


def test_engines_are_heard_while_the_counters_are_read() -> None:
    """By the mailbox's thread, while vLLM's logs a line."""
    counts = Counts("front")

    def hears() -> None:
        for number in range(100_000):
            counts.heard(f"engine{number}", [(WORKERS, "handle", 1, 5)])

    thread = threading.Thread(target=hears)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread.start()
    try:
        while thread.is_alive():
            counts.line()
    finally:
        sys.setswitchinterval(interval)
        thread.join()
    assert counts.total() == [(WORKERS, "handle", 100_000, 500_000)]


def test_a_process_that_nobody_is_linked_with_is_not_ok(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vllm_of(monkeypatch, "0.25.1")
    counts = Counts("front")
    counts.save(now=True, peers={})
    assert found(f"front {os.getpid()}").status == "note"
    counts.add(FRONT, "vLLM (not linked)", 5)
    counts.save(now=True, peers={})
    line = found(f"front {os.getpid()}")
    assert line.status == "problem"
    assert "linked with nobody; front end to engine: vLLM (not linked) 1" in line.found
    assert line.advice


@pytest.mark.parametrize(
    ("peer", "how", "advice"),
    [
        ("shm: proved", "vLLM (not linked)", "not linked: The first after the start, who is on another host"),
        ("shm: proved", "vLLM (Full)", "Full: Make /dev/shm larger where the log says"),
        ("shm: proved", "vLLM (larger than the ring)", "larger than the ring: Make ring_bytes larger."),
        ("shm: proved", "vLLM (PeerGone)", "PeerGone: see its log."),
        ("not shm: another host's", "ring", "engine0 does not map the ring"),
    ],
)
def test_tensors_that_go_vllms_way_are_a_note_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, peer: str, how: str, advice: str
) -> None:
    vllm_of(monkeypatch, "0.25.1")
    counts = Counts("front")
    counts.add(FRONT, how, 5)
    counts.save(now=True, peers={"engine0": peer})
    line = found(f"front {os.getpid()}")
    assert line.status == "note"
    assert advice in line.advice


def test_what_is_handed_on_to_a_worker_that_does_not_map_the_ring_is_copied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By its EngineCore, into a ring of its own: it does not go vLLM's way."""
    vllm_of(monkeypatch, "0.25.1")
    counts = Counts("front")
    counts.save(now=True, peers={"engine0": "shm: proved", "worker-1-2": "not shm yet: it has not answered"})
    line = found(f"front {os.getpid()}")
    assert line.status == "note"
    assert line.advice == "worker-1-2 does not map the ring: what is handed on to it is copied."


def test_what_failed_in_a_process_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    vllm_of(monkeypatch, "0.25.1")
    for _ in range(2):
        with guard.Harmless("a request"):
            raise RuntimeError("no such view")
    counts = Counts("front")
    counts.save(now=True, peers={"engine0": "shm: proved"})
    line = found(f"front {os.getpid()}")
    assert line.status == "problem"
    assert "a request failed 2 times: see its log." in line.advice


def test_two_front_ends_of_one_process_save_their_counters_apart() -> None:
    one, other = Counts("front"), Counts("front")
    for each, nbytes in ((one, 1), (other, 2)):
        each.add(FRONT, "ring", nbytes)
        each.save(now=True)
    assert sorted(process["tensors"][0][3] for process in saved()) == [1, 2]
    one.remove()
    assert [process["tensors"][0][3] for process in saved()] == [2]


@pytest.mark.parametrize("look", [sweep, lambda: list(saved())], ids=["sweep", "doctor"])
def test_the_files_of_the_dead_are_removed(folder: Path, look: Callable[[], object]) -> None:
    """By who looks, and by the next front end that starts."""
    counts = Counts("front")
    counts.save(now=True)
    dead = [folder / f"4194305-1{suffix}" for suffix in (".json", ".new")]  # no pid is as large
    for file in dead:
        file.write_text("{}")
    others = [folder / "notes.json", folder / f"{os.getpid()}-99.new"]  # no counters, and half of some
    for file in others:
        file.write_text("[")
    look()
    assert sorted(folder.iterdir()) == sorted([*others, counts._file])
    assert [process["pid"] for process in saved()] == [os.getpid()]


@pytest.mark.parametrize("look", [sweep, lambda: list(saved())], ids=["sweep", "doctor"])
def test_a_process_that_has_the_pid_of_a_dead_one_has_not_its_counters(
    folder: Path, look: Callable[[], object]
) -> None:
    """As in a container that starts again, where each process gets the pid that it had."""
    counts = Counts("front")
    counts.save(now=True)
    file, state = folder / f"{os.getpid()}-99.json", json.loads(counts._file.read_text())
    file.write_text(json.dumps(state | {"started": state["started"] - 100}))
    look()
    assert not file.exists()
    assert len(list(saved())) == 1


class Published(Counts):
    """Counts how often it was asked to."""

    times = 0

    def _publish(self) -> None:
        self.times += 1


def test_counters_that_cannot_be_saved_are_published_and_saved_later(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    counts = Published("front")
    shutil.rmtree(folder)
    folder.write_text("in the way")
    for _ in range(3):
        counts.save(now=True)
    assert counts.times == 3
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "counters are not saved" in record.getMessage()
    folder.unlink()
    counts.save(now=True)
    assert [process["role"] for process in saved()] == ["front"]


def test_a_folder_that_was_removed_is_made_again(folder: Path) -> None:
    counts = Counts("front")
    for _ in range(2):  # also where nothing was counted since
        shutil.rmtree(folder)
        counts.save(now=True)
        assert [process["role"] for process in saved()] == ["front"]
    shutil.rmtree(folder)
    counts.remove()


def test_one_may_look_at_what_an_older_version_saved(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    vllm_of(monkeypatch, "0.25.1")
    folder.mkdir(mode=0o700)
    (folder / f"{os.getpid()}.json").write_text('{"role": "front", "pid": 7, "tensors": []}')
    assert "hooked: nothing" in found("front 7").found


def test_front_ends_of_one_process_share_counters_for_prometheus(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each publishes in its own thread, and prometheus_client refuses a second counter of a name."""
    both, made = threading.Barrier(2), []

    class Metric:
        def __init__(self, name: str, *_: object) -> None:
            made.append(name)
            with contextlib.suppress(threading.BrokenBarrierError):
                both.wait(0.2)  # the other one makes its own meanwhile, if it may

    monkeypatch.setitem(sys.modules, "prometheus_client", types.SimpleNamespace(Counter=Metric))
    monkeypatch.setattr(counts, "_prometheus", None)
    threads = [threading.Thread(target=Counts("front").save) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == ["tensorferry_tensors", "tensorferry_tensor_bytes"]
    assert not caplog.records
