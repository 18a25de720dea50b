"""Engine: results in order, failing images by name, dead ranks, every backend; real processes throughout."""

from __future__ import annotations

import os
import re
import signal
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from engine import ConfigError, Engine, EngineConfig, EngineError, NoRankLeft, StartError
from engine.images import grid_for, open_image, sample_photographs, write_patches
from engine.job import message_bytes, split
from engine.loading import Patches, Photograph
from engine.model import Batch, VisionEncoder
from engine.results import copies_per_tensor, percentile
from tests.engine.pictures import expected, picture, save
from tests.engine.processes import python, ran

MODEL = "tests.engine.models:Checksum"


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """Two ranks with a model that takes no time; the ring is there before the first test looks around."""
    config = EngineConfig(data_parallel_size=2, images_per_prompt=2, model=MODEL, inline_below_kb=0)
    with Engine(config) as engine:
        assert not any(result.error for result in engine.encode([picture(0)] * 4))
        yield engine


class TestEncode:
    def test_gives_results_in_the_order_of_the_input(self, engine: Engine) -> None:
        # Sizes that differ, so that requests take different times and ranks.
        images = [picture(number, 56 + 140 * (number % 3), 84) for number in range(11)]
        results = list(engine.encode(images))
        assert [result.index for result in results] == list(range(11))
        assert [result.name for result in results] == [f"image {number}" for number in range(11)]
        for image, result in zip(images, results, strict=True):
            assert result.grid == grid_for(*image.size)
            assert result.embedding is not None
            assert result.embedding.equal(expected(image))
        assert {result.rank for result in results} == {"rank0", "rank1"}

    def test_takes_files_and_images_alike(self, engine: Engine, tmp_path: Path) -> None:
        (path,) = save(tmp_path, 1)
        results = list(engine.encode([path, str(path), Image.open(path), picture(0)]))
        assert [result.name for result in results] == [str(path)] * 3 + ["image 3"]
        first, *others = (result.embedding for result in results)
        assert first is not None
        assert all(other is not None and other.equal(first) for other in others)

    def test_names_an_image_that_fails_and_goes_on_with_the_rest(
        self, engine: Engine, tmp_path: Path
    ) -> None:
        good = save(tmp_path, 3)
        broken, text, missing = tmp_path / "broken.png", tmp_path / "text.png", tmp_path / "missing.png"
        broken.write_bytes(good[0].read_bytes()[:200])
        text.write_text("no image at all")
        results = list(engine.encode([good[0], broken, good[1], text, missing, good[2]]))
        assert [bool(result.error) for result in results] == [False, True, False, True, True, False]
        for path, result in zip((broken, text, missing), (results[1], results[3], results[4]), strict=True):
            assert result.error.startswith(f"{path}: ")
            assert result.embedding is None
        assert "truncated" in results[1].error
        assert "no such file" in results[4].error

    def test_takes_an_endless_input_bit_by_bit(self, engine: Engine) -> None:
        taken, before = 0, engine.statistics().requests

        def endless() -> Iterator[Image.Image]:
            nonlocal taken
            while True:
                taken += 1
                yield picture(taken)

        running = engine.encode(endless())
        assert [next(running).index for _ in range(5)] == list(range(5))
        running.close()
        # A rank that stands still keeps back its results, and not the other. Four requests are on their way,
        # one waits, one is put together, one is read ahead.
        answered = engine.statistics().requests - before
        assert taken <= 2 * (answered + 4 + 1 + 1 + 1)
        # What was under way for it does no harm to what follows.
        assert [result.index for result in engine.encode([picture(1)] * 5)] == list(range(5))

    def test_two_runs_may_alternate(self, engine: Engine) -> None:
        one = engine.encode([picture(number) for number in range(5)])
        other = engine.encode([picture(number) for number in range(5)])
        for left, right in zip(one, other, strict=True):
            assert left.index == right.index
            assert left.embedding is not None
            assert right.embedding is not None
            assert left.embedding.equal(right.embedding)

    def test_of_nothing_is_nothing(self, engine: Engine) -> None:
        assert list(engine.encode([])) == []

    def test_refuses_a_single_path(self, engine: Engine) -> None:
        with pytest.raises(TypeError, match="put a single path into one"):
            next(engine.encode("a.png"))

    def test_puts_every_byte_into_the_ring_once(self, engine: Engine) -> None:
        before = engine.statistics()
        images = [picture(number) for number in range(6)]
        list(engine.encode(images))
        after = engine.statistics()
        nbytes = sum(grid_for(*image.size).nbytes for image in images)
        assert after.image_bytes - before.image_bytes == nbytes
        assert after.bytes_by_backend["shm"] - before.bytes_by_backend["shm"] == nbytes
        assert after.copies == 1.0
        assert after.detours == {}
        assert after.images - before.images == 6
        assert after.requests - before.requests == 3
        assert after.hop_p50 is not None
        assert after.hop_p99 is not None
        assert 0 < after.hop_p50 <= after.hop_p99
        assert 0 < after.ring_peak <= after.ring_bytes == 2**30

    def test_peers_say_how_tensors_reach_them(self, engine: Engine) -> None:
        assert [peer.name for peer in engine.peers] == ["rank0", "rank1"]
        for peer in engine.peers:
            assert peer.error == ""
            assert peer.device == "cpu"
            assert peer.backend.startswith("shm: ")
            os.kill(peer.pid, 0)


class TestModels:
    def test_a_photograph_that_the_model_refuses_fails_alone(self, capfd: pytest.CaptureFixture[str]) -> None:
        images = [picture(1), picture(2, 56, 140), picture(3), picture(4), picture(5, 84, 84)]
        with Engine(EngineConfig(model="tests.engine.models:Picky", images_per_prompt=3)) as engine:
            results = list(engine.encode(images))
        assert [bool(result.error) for result in results] == [False, True, False, False, True]
        assert "image 1: rank0" in results[1].error
        assert "ValueError: 10 patches are too tall for 4" in results[1].error
        assert "the model returned embeddings [3] for 1 images; they must be [1, dim]" in results[4].error
        # What a rank writes appears here, with its name before it.
        assert "[rank0] 3 photographs\n" in capfd.readouterr().err

    def test_the_builtin_encoder_gives_what_it_gives_here(self) -> None:
        paths = sample_photographs()[:3]
        model = VisionEncoder()
        model.load(device=torch.device("cpu"), seed=3)
        with Engine(EngineConfig(megapixels=0.1, seed=3)) as engine:
            for path, result in zip(paths, engine.encode(paths), strict=True):
                image = open_image(path)
                grid = grid_for(*image.size, megapixels=0.1)
                out = torch.empty(grid.shape)
                write_patches(image, grid, out)
                local = model.forward(Batch([out], torch.tensor([grid]))).embeddings[0]
                assert result.embedding is not None
                torch.testing.assert_close(result.embedding, local, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", ["frames", "inline"])
def test_every_backend_brings_every_byte(backend: str) -> None:
    images = [picture(number, 280, 140) for number in range(3)]
    config = EngineConfig.load({"tensor_transport": backend, "model": MODEL}, environ={})
    with Engine(config) as other:
        results = list(other.encode(images))
        assert other.peers[0].backend.startswith(backend)
    figures = other.statistics()
    for image, result in zip(images, results, strict=True):
        assert result.embedding is not None
        assert result.embedding.equal(expected(image))
    assert figures.bytes_by_backend == {backend: figures.image_bytes}
    assert figures.copies == 2.0
    assert (figures.ring_peak, figures.ring_bytes, figures.detours) == (0, 0, {})


class TestSmallRing:
    def test_a_prompt_above_the_share_goes_in_several_messages(self) -> None:
        # 8 MiB, of which one peer may have half: messages of 2 MiB, images of 0.96 MB.
        config = EngineConfig(shm_ring_gb=8 / 1024, images_per_prompt=7, megapixels=0.04, model=MODEL)
        with Engine(config) as engine:
            results = list(engine.encode(picture(number) for number in range(14)))
            figures = engine.statistics()
        assert not any(result.error for result in results)
        assert figures.requests == 8
        assert figures.bytes_by_backend == {"shm": figures.image_bytes}
        assert figures.copies == 1.0

    def test_an_image_above_the_share_goes_in_parts(self) -> None:
        # One image of 4.8 MB, of which 2 MiB may be in the ring at a time.
        config = EngineConfig(shm_ring_gb=4 / 1024, megapixels=0.2, model=MODEL, tensor_transport="shm")
        with Engine(config) as engine:
            image = picture(1, 500, 400)
            (result,) = engine.encode([image])
            assert engine.peers[0].backend.startswith("shm: ")
            figures = engine.statistics()
        assert result.embedding is not None
        assert result.embedding.equal(expected(image, megapixels=0.2))
        assert figures.bytes_by_backend == {"shm": figures.image_bytes}
        assert figures.copies == 2.0

    def test_split_keeps_order_and_limit(self) -> None:
        grid = grid_for(56, 56)
        image = Patches(megapixels=None).prepare(picture(0, 56, 56))
        assert image.nbytes == grid.nbytes
        photographs = [Photograph(index, "", image) for index in range(5)]
        messages = list(split(photographs, 2 * grid.nbytes))
        assert [[photograph.index for photograph in message] for message in messages] == [[0, 1], [2, 3], [4]]
        assert [len(message) for message in split(photographs, grid.nbytes - 1)] == [1] * 5

    @pytest.mark.parametrize(
        ("ranks", "share", "part"), [(1, 0.5, 4), (1, 1.0, 3), (2, 0.5, 5), (8, 0.5, 17)]
    )
    def test_all_that_is_outstanding_fits_into_the_ring(self, ranks: int, share: float, part: int) -> None:
        config = EngineConfig(data_parallel_size=ranks, peer_share=share)
        assert message_bytes(config, 1 << 30) == (1 << 30) // part


class TestDeath:
    def test_requests_of_a_dead_rank_go_to_the_other(self, caplog: pytest.LogCaptureFixture) -> None:
        config = EngineConfig(data_parallel_size=2, images_per_prompt=1, model=MODEL, rank_restarts=0)
        with Engine(config) as engine:
            victim = engine.peers[0]
            os.kill(victim.pid, signal.SIGSTOP)  # so that it has what it was sent when it dies

            def images() -> Iterator[Image.Image]:
                for number in range(20):
                    if number == 10:  # by now it was sent two requests
                        os.kill(victim.pid, signal.SIGKILL)
                    yield picture(number)

            results = list(engine.encode(images()))
            dead, living = engine.peers
            again = list(engine.encode([picture(1)]))
        assert [result.index for result in results] == list(range(20))
        for number, result in enumerate(results):
            assert result.error == ""
            assert result.rank == "rank1"
            assert result.embedding is not None
            assert result.embedding.equal(expected(picture(number)))
        assert dead.error == "was killed by SIGKILL"
        assert (living.error, living.requests) == ("", 20)
        assert f"rank0 (pid {victim.pid}) was killed by SIGKILL; 2 requests go to the others" in caplog.text
        assert not again[0].error

    def test_the_last_one_ends_the_run_after_the_results_there_are(self) -> None:
        with Engine(EngineConfig(images_per_prompt=1, model=MODEL, rank_restarts=0)) as engine:
            pid = engine.peers[0].pid
            results = [next(engine.encode([picture(0)]))]

            def images() -> Iterator[Image.Image]:
                for number in range(9):
                    if number == 3:
                        os.kill(pid, signal.SIGKILL)
                    yield picture(number)

            with pytest.raises(
                NoRankLeft, match=rf"no rank is left: rank0 \(pid {pid}\) was killed by SIGKILL"
            ):
                results.extend(engine.encode(images()))
            assert "SIGKILL" in engine.peers[0].error
            with pytest.raises(NoRankLeft):
                list(engine.encode([picture(1)]))
        indices = [result.index for result in results[1:]]
        assert indices == list(range(len(indices)))
        assert "SIGKILL" in results[-1].error

    def test_a_silent_rank_fails_its_images_by_name(self, caplog: pytest.LogCaptureFixture) -> None:
        with Engine(EngineConfig(model=MODEL, images_per_prompt=1, request_timeout=0.5)) as engine:
            pid = engine.peers[0].pid
            os.kill(pid, signal.SIGSTOP)
            try:
                results = list(engine.encode([picture(0), picture(1), picture(2)]))
            finally:
                os.kill(pid, signal.SIGCONT)
            nbytes = sum(result.nbytes for result in results[:2])
            two = rf"2 requests \({nbytes} bytes\), the oldest for \d+\.\d s"
            late = rf"rank0 \(pid {pid}\) has not answered within 0.5 s \(request_timeout\); it has {two}"
            assert re.search(late, results[0].error)
            assert re.search(late, caplog.text)
            assert caplog.text.count("has not answered") == 1  # for two requests
            assert re.search(rf"no rank had room .*: rank0 \(pid {pid}\) has {two}", results[2].error)
            assert engine.peers[0].error == ""  # slow is never dead

    def test_ranks_leave_when_their_front_end_was_killed(
        self, short_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(short_path))  # where no other test's start sweeps
        script = textwrap.dedent(f"""
            import time
            from engine import Engine, EngineConfig
            from tests.engine.pictures import picture
            if __name__ == "__main__":
                with Engine(EngineConfig(data_parallel_size=2, model={MODEL!r}, inline_below_kb=0)) as engine:
                    list(engine.encode([picture(0)]))
                    print(*(peer.pid for peer in engine.peers), engine.peers[0].address, flush=True)
                    time.sleep(600)
        """)
        with python("-c", script) as front:
            assert front.stdout is not None
            *pids, address = front.stdout.readline().split()
            front.kill()
        while any(Path(f"/proc/{pid}").exists() for pid in pids):  # the timeout of the suite is the limit
            time.sleep(0.05)
        folder = Path(address.removeprefix("ipc://")).parent
        assert (folder / "config.toml").exists()
        swept = ran(["-m", "engine", "sweep", "--json"], dict(os.environ))
        assert "tensorferry." in swept.stdout
        assert not folder.exists()


class TestStartAndEnd:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            (
                {"model": "nowhere.to:BeFound"},
                r"rank0 \(pid \d+\) could not start: .* no module named 'nowhere'",
            ),
            (
                {"model": "tests.engine.models:DiesInLoad"},
                r"exited with code 7 before .* wrote: no such luck",
            ),
            (
                {"startup_timeout": 0.01},
                r"not ready within 0.01 s \(startup_timeout\): rank0 .* not connected",
            ),
            ({"tensor_transport": "shm", "shm_ring_gb": 1e6}, r"/dev/shm has .* --shm-size"),
        ],
    )
    def test_a_rank_that_cannot_start_says_why(self, settings: dict[str, object], message: str) -> None:
        with pytest.raises(StartError, match=message):
            Engine(EngineConfig.load(settings, environ={}))

    def test_a_ring_that_cannot_be_is_passed_by(self, caplog: pytest.LogCaptureFixture) -> None:
        with Engine(EngineConfig(model=MODEL, shm_ring_gb=1e6, inline_below_kb=0)) as engine:
            results = list(engine.encode([picture(1), picture(2)]))
            assert "frames" in engine.peers[0].backend
        figures = engine.statistics()
        assert not any(result.error for result in results)
        assert figures.bytes_by_backend["frames"] == figures.image_bytes
        assert figures.copies == 2.0
        assert figures.detours
        assert caplog.text.count("going on without shared memory") == 1

    def test_closed_twice_it_keeps_its_figures_and_nothing_else(self) -> None:
        engine = Engine(EngineConfig(model=MODEL))
        list(engine.encode([picture(1)]))
        folder = Path(engine.peers[0].address.removeprefix("ipc://")).parent
        assert folder.stat().st_mode & 0o777 == 0o700
        engine.close()
        engine.close()
        assert not folder.exists()
        assert engine.statistics().images == 1
        with pytest.raises(EngineError, match="closed"):
            next(engine.encode([picture(1)]))

    def test_a_wrong_option_is_refused_before_anything_starts(self) -> None:
        with pytest.raises(ConfigError, match="data_parallel_size"):
            EngineConfig(data_parallel_size=0)


def test_percentiles_are_values_that_occurred() -> None:
    assert percentile([], 50) is None
    assert percentile([7.0], 99) == 7.0
    values = [float(number) for number in range(1, 101)]
    assert (percentile(values, 50), percentile(values, 99), percentile(values, 100)) == (50.0, 99.0, 100.0)


@pytest.mark.parametrize(
    ("ways", "made", "in_ring", "copies"),
    [
        ({"shm": 100}, 100, 100, 1.0),
        ({"frames": 100}, 100, 0, 2.0),
        ({"frames": 100}, 100, 100, 2.0),
        ({"shm": 100}, 100, 0, 2.0),
        ({"shm": 150}, 100, 100, 1.0),
        ({}, 0, 0, None),
    ],
)
def test_copies_per_tensor(ways: dict[str, int], made: int, in_ring: int, copies: float | None) -> None:
    assert copies_per_tensor(ways, made=made, in_ring=in_ring) == copies
