"""The command `tensorferry`: tables, files, exit codes, and one clear line for whatever is wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from engine import EngineConfig, signals
from engine.cli import main
from engine.protocol import transport_config
from tests.engine.pictures import expected, picture, save
from tests.engine.processes import ROOT, python, ran
from transport import log_trace

QUICK = ["--model", "tests.engine.models:Checksum", "--inline-below-kb", "0"]


def tensorferry(*arguments: str | Path, **environ: str) -> subprocess.CompletedProcess[str]:
    return ran(["-m", "engine", *map(str, arguments)], {**os.environ, **environ})


def one_line(finished: subprocess.CompletedProcess[str], code: int) -> str:
    """What a command that failed said: nothing on standard output, one line without a traceback."""
    assert (finished.returncode, finished.stdout) == (code, "")
    assert finished.stderr.startswith("tensorferry: ")
    assert finished.stderr.count("\n") == 1, finished.stderr
    return finished.stderr


def complaints(finished: subprocess.CompletedProcess[str]) -> list[str]:
    """What a command said, but for how long it waited for ranks, which depends on what else runs here."""
    return [line for line in finished.stderr.splitlines() if ": warning: waiting for " not in line]


class TestRun:
    def test_shows_what_happened_and_writes_it_down(self, tmp_path: Path) -> None:
        paths = save(tmp_path, 5)
        paths.append(paths[0])  # three prompts of two are one image more than there are
        document, arrays = tmp_path / "out.json", tmp_path / "out.npz"
        options = [*QUICK, "-dp", "2", "--images-per-prompt", "2", "--prompts", "3"]
        done = tensorferry("run", tmp_path, *options, "--json", document, "--output", arrays)
        assert (done.returncode, complaints(done)) == (0, [])
        words = " ".join(done.stdout.split())
        nbytes = 6 * 4 * 6 * 1176 * 4
        for expectation in (
            f"images in {tmp_path} ",
            "0.png 24 × 1176 ",
            "requests 3 images 6 image bytes 661.5 KiB bytes by backend shm 661.5 KiB",
            "copies per tensor 1.00 detours none",
            "hop latency p50 ",
            "KiB of 1 GiB",
            "shm: the peer proved that it maps the ring",
        ):
            assert expectation in words
        written = json.loads(document.read_text())
        assert written["error"] == ""
        assert [result["file"] for result in written["results"]] == list(map(str, paths))
        assert written["statistics"]["bytes_by_backend"] == {"shm": nbytes}
        assert written["config"]["data_parallel_size"] == 2
        assert [rank["name"] for rank in written["ranks"]] == ["rank0", "rank1"]
        with np.load(arrays, allow_pickle=False) as archive:
            assert archive["names"].tolist() == list(map(str, paths))
            assert archive["index"].tolist() == list(range(6))
            assert archive["grid_thw"].tolist() == [[1, 4, 6]] * 6
            for row, result in zip(archive["embeddings"], written["results"], strict=True):
                image = picture(result["index"] % 5)
                assert row.tolist() == expected(image).tolist() == result["embedding"]
                assert result["norm"] == pytest.approx(float(np.linalg.norm(row)))

    def test_keeps_what_succeeded_when_an_image_fails(self, tmp_path: Path) -> None:
        good, bad = save(tmp_path, 2)
        bad.write_bytes(bad.read_bytes()[:300])
        text = tmp_path / "notes.txt"
        text.write_text("no image")
        output = tmp_path / "out.safetensors"
        done = tensorferry("run", good, bad, text, good, *QUICK, "--output", output)
        assert done.returncode == 1
        assert done.stdout.count("failed") == 3  # one for each of the two, and their number
        lines = complaints(done)
        assert len(lines) == 2
        assert lines[0].startswith(f"tensorferry: {bad}: not a readable image: ")
        assert lines[1].startswith(f"tensorferry: {text}: not a readable image: ")
        with safe_open(output, framework="pt") as file:
            assert json.loads(file.metadata()["names"]) == [str(good)] * 2
            assert file.get_tensor("index").tolist() == [0, 3]
            for row in file.get_tensor("embeddings"):
                assert row.equal(expected(picture(0)))
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "0.png",
            "1.png",
            "notes.txt",
            "out.safetensors",
        ]

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_an_interrupt_ends_everything_and_keeps_what_was_done(
        self, number: int, code: int, tmp_path: Path
    ) -> None:
        (path,) = save(tmp_path, 1)
        document = tmp_path / "out.json"
        command = ["run", str(path), "--model", "tests.engine.models:Picky", "--prompts", "100000"]
        with python("-m", "engine", *command, "--json", str(document)) as running:
            assert running.stderr is not None
            answered = 0
            while answered < 5:
                line = running.stderr.readline()
                assert line, "it ended before it was interrupted"
                answered += line == "[rank0] 4 photographs\n"
            running.send_signal(number)
            shown, said = running.communicate()
        assert running.returncode == code
        results = json.loads(document.read_text())["results"]
        assert f"tensorferry: interrupted after {len(results)} images\n" in said
        assert "Traceback" not in said
        assert not any(result["error"] for result in results)
        assert "copies per tensor" in shown

    def test_a_ring_that_does_not_fit_says_how_to_get_more(self, tmp_path: Path) -> None:
        (path,) = save(tmp_path, 1)
        line = one_line(tensorferry("run", path, "--tensor-transport", "shm", "--shm-ring-gb", "1e6"), 1)
        assert "/dev/shm has" in line
        assert "--shm-size" in line


class TestUsage:
    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["run", "--shm-ring", "2"], "--shm-ring-gb"),
            (["run", "--nonsense"], "(see tensorferry run --help)"),
            (["nonsense"], "(see tensorferry --help)"),
            (["run", "--tensor-transport", "smh"], "must be one of auto, shm, tcp, frames, inline"),
            (["run", "--prompts", "many"], "prompts = 'many' (flag --prompts): must be a whole number"),
            (["run", "--config", "nowhere.toml"], "file 'nowhere.toml' can't be read: No such file"),
            (["run", "--json"], "requires an argument"),
            (["run", "nowhere.jpg"], "nowhere.jpg: no such file or folder"),
            (["run", "shm"], "shm: no images in this folder"),
            (["run", "--json", "nowhere/out.json"], "nowhere/out.json: there is no folder nowhere"),
            (["run", "--json", "docs"], "docs is a folder"),
            (["run", "--output", "out.pt"], "out.pt: its name must end in .safetensors or .npz"),
        ],
    )
    def test_a_mistake_is_one_line_and_exit_code_2(
        self,
        arguments: list[str],
        said: str,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(signals, "install", lambda: None)  # they are pytest's here
        code = main(arguments)
        assert said in one_line(subprocess.CompletedProcess(arguments, code, *capsys.readouterr()), 2)

    def test_a_mistake_ends_the_process_with_status_2(self) -> None:
        assert "Did you mean 'run'?" in one_line(tensorferry("rum"), 2)

    def test_an_unknown_variable_is_refused_with_the_nearest_name(self) -> None:
        line = one_line(tensorferry("run", TENSORFERRY_SED="1"), 2)
        assert "did you mean TENSORFERRY_SEED?" in line

    def test_print_config_is_a_file_that_says_the_same(self, tmp_path: Path) -> None:
        file = tmp_path / "a.toml"
        printed = tensorferry("run", "-dp", "3", "--print-config", TENSORFERRY_SEED="5").stdout
        file.write_text(printed)
        config = EngineConfig.load({}, environ={}, file=file)
        assert config == EngineConfig(data_parallel_size=3, seed=5)
        assert "data_parallel_size = 3  # flag --data-parallel-size" in printed
        assert "seed = 5  # environment TENSORFERRY_SEED" in printed
        assert tensorferry("run", "--config", file, "--print-config").returncode == 0

    def test_help_names_every_option(self) -> None:
        shown = tensorferry("run", "--help").stdout
        for flag in (
            "--tensor-transport",
            "--shm-ring-gb",
            "--data-parallel-size",
            "--print-config",
            "--output",
        ):
            assert flag in shown

    def test_version(self) -> None:
        done = tensorferry("--version")
        assert done.returncode == 0
        assert done.stdout.startswith("tensorferry ")


class TestDebug:
    def test_shows_every_step_of_front_and_ranks_and_no_name_of_a_segment(self, tmp_path: Path) -> None:
        (path,) = save(tmp_path, 1)
        done = tensorferry("run", path, *QUICK, "--log-level", "debug", PYTHONIOENCODING="ascii")
        assert done.returncode == 0
        assert "copies per tensor" in done.stdout  # the table, though it has signs that ascii has not
        for step in (
            r"tensorferry: debug: send\.put at \d+ ns: tensors=1 peers=1",
            r"tensorferry: debug: ring\.reserve at \d+ ns: records=1 nbytes=\d+",
            r"\[rank0\] DEBUG tensorferry\.transport: receive\.opening at \d+ ns: peer=front number=\d+",
            r"\[rank0\] DEBUG tensorferry\.transport: ring\.opened at \d+ ns: slot=\d+ generation=\d+",
        ):
            assert re.search(f"^{step}$", done.stderr, re.MULTILINE), (step, done.stderr)
        assert not re.search(r"/dev/shm|tensorferry\.\d+\.[0-9a-f]{32}", done.stderr)

    def test_costs_nothing_at_other_levels(self) -> None:
        assert transport_config(EngineConfig(log_level="info")).trace is None
        assert transport_config(EngineConfig(log_level="debug")).trace is log_trace


class TestSegments:
    def test_ps_and_sweep_see_the_living_and_the_dead(self) -> None:
        script = (
            "import shm, time; ring = shm.RingWriter(1 << 20); print(ring.name, flush=True); time.sleep(600)"
        )
        with python("-c", script) as owner:
            assert owner.stdout is not None
            name = owner.stdout.readline().strip()
            (listed,) = [
                info for info in json.loads(tensorferry("ps", "--json").stdout) if info["name"] == name
            ]
            assert (listed["alive"], listed["pid"], listed["capacity"]) == (True, owner.pid, 1 << 20)
            assert name in tensorferry("ps").stdout
            assert name not in json.loads(tensorferry("sweep", "--json").stdout)["segments"]
            owner.kill()
        assert f"would remove {name}\n" in tensorferry("sweep", "--dry-run").stdout
        assert f"removed {name}\n" in tensorferry("sweep").stdout
        assert name not in tensorferry("ps").stdout


@pytest.mark.parametrize("arguments", [["doctor"], ["--version"]], ids=" ".join)
def test_standard_output_on_a_full_disk_is_said_in_a_line(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "engine", *arguments]
    with Path("/dev/full").open("w") as full:
        finished = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT, check=False, timeout=100
        )
    assert finished.returncode == 1
    assert finished.stderr == "tensorferry: standard output can't be written: No space left on device\n"


def test_who_reads_no_more_of_the_output_ends_the_command_quietly() -> None:
    with python("-m", "engine", "--version") as command:
        assert command.stdout is not None
        command.stdout.close()
        assert command.stderr is not None
        assert (command.stderr.read(), command.wait(100)) == ("", 1)
