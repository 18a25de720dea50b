"""Files of results: nothing that was there is replaced by surprise, and one that fails costs no other."""

from __future__ import annotations

import json
import os
import stat
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from engine import EngineConfig
from engine.cli import _Outcome, _write
from engine.errors import OutputError
from engine.images import Grid
from engine.output import check_target, write_json, write_tensors
from engine.results import Result, Statistics
from tests.users import forbidden


def result(index: int = 0, *numbers: float) -> Result:
    return Result(index, f"{index}.png", grid=Grid(1, 2, 2), embedding=torch.tensor(numbers or (1.0, 2.0)))


@pytest.fixture
def statistics() -> Statistics:
    return Statistics(
        requests=1,
        late=0,
        images=1,
        failed=0,
        image_bytes=16,
        bytes_by_backend={"shm": 16},
        copies=1.0,
        detours={},
        seconds=1.0,
        hop_p50=None,
        hop_p99=None,
        ring_bytes=0,
        ring_peak=0,
    )


def written(path: Path, results: list[Result], statistics: Statistics) -> None:
    check_target(path)
    write_json(path, results, config={}, statistics=statistics, ranks=[])


def test_what_a_link_points_to_is_replaced_and_not_the_link(tmp_path: Path, statistics: Statistics) -> None:
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "target.json", tmp_path / "link.json"
    target.write_text("old")
    link.symlink_to(target)
    written(link, [result()], statistics)
    assert link.is_symlink()
    assert json.loads(target.read_text())["results"][0]["file"] == "0.png"
    assert [path.name for path in target.parent.iterdir()] == ["target.json"]


def test_a_pipe_is_written_to_and_stays_one(tmp_path: Path, statistics: Statistics) -> None:
    pipe = tmp_path / "pipe.json"
    os.mkfifo(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    written(pipe, [result()], statistics)
    reader.join(30)
    assert json.loads(read[0])["results"][0]["embedding"] == [1.0, 2.0]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_folder_that_may_not_be_entered_is_one_message(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    target = folder / "inner" / "out.json"
    with forbidden(folder), pytest.raises(OutputError, match=f"{target}: Permission denied"):
        check_target(target)


def test_a_full_device_is_one_message(statistics: Statistics) -> None:
    with pytest.raises(OutputError, match="/dev/full can't be written: No space left on device"):
        written(Path("/dev/full"), [result()], statistics)
    assert stat.S_ISCHR(Path("/dev/full").stat().st_mode)


def test_a_folder_that_is_gone_is_one_message(tmp_path: Path, statistics: Statistics) -> None:
    with pytest.raises(OutputError, match=r"out.json can't be written: No such file or directory"):
        write_json(tmp_path / "gone" / "out.json", [], config={}, statistics=statistics, ranks=[])
    for name in ("out.npz", "out.safetensors"):
        with pytest.raises(OutputError, match=f"{name} can't be written"):
            write_tensors(tmp_path / "gone" / name, [result()])


def test_numbers_that_json_does_not_know_are_null(tmp_path: Path, statistics: Statistics) -> None:
    path = tmp_path / "out.json"
    written(path, [result(0, 1.0, float("nan")), result(1, float("inf"), 2.0)], statistics)
    first, second = json.loads(path.read_text(), parse_constant=pytest.fail)["results"]
    assert (first["norm"], first["embedding"]) == (None, [1.0, None])
    assert (second["norm"], second["embedding"]) == (None, [None, 2.0])


def test_embeddings_of_two_sizes_are_named(tmp_path: Path) -> None:
    text = "embedding of 1.png has 3 numbers, that of 0.png 2; --json takes both"
    with pytest.raises(OutputError, match=text):
        write_tensors(tmp_path / "out.npz", [result(0), result(1, 1.0, 2.0, 3.0)])


def test_the_one_file_is_written_though_the_other_fails(tmp_path: Path, statistics: Statistics) -> None:
    outcome = _Outcome(results=[result()], statistics=statistics)
    good, bad = tmp_path / "out.npz", tmp_path / "gone" / "out.json"
    with pytest.raises(OutputError, match="out.json can't be written"):
        _write(outcome, EngineConfig(), bad, good)
    assert np.load(good)["embeddings"].tolist() == [[1.0, 2.0]]
    good, bad = tmp_path / "out.json", tmp_path / "gone" / "out.npz"
    with pytest.raises(OutputError, match="out.npz can't be written"):
        _write(outcome, EngineConfig(), good, bad)
    assert json.loads(good.read_text())["error"] == ""
