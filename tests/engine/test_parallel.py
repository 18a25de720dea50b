"""Several workers share a model: what they give, that they live and end together, and who is named for it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import rmtree
from threading import Barrier

import pytest
import torch
from PIL import Image
from torch.distributed import FileStore  # type: ignore[attr-defined]  # not in its stubs

from engine import Engine, EngineConfig, NoRankLeft
from engine.images import grid_for, open_image, sample_photographs, write_patches
from engine.model import HEADS, Batch, ModelError, VisionEncoder, load_part
from engine.parallel import Parallel, ParallelError, join
from tests.engine.models import Checksum, checksum
from tests.engine.pictures import picture
from tests.engine.processes import until_ended

DIVIDED = "tests.engine.models:Divided"
CPU = torch.device("cpu")


def patches(image: Image.Image, *, megapixels: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The patches of a photograph, and its grid `[1, 3]`."""
    grid = grid_for(*image.size, megapixels=megapixels)
    out = torch.empty(grid.shape)
    write_patches(image, grid, out)
    return out, torch.tensor([grid])


def of_two(image: Image.Image) -> torch.Tensor:
    """What two workers with the model `Divided` make of a photograph."""
    halves = patches(image)[0].chunk(2)
    return torch.tensor([number for half in halves for number in checksum(half)])


two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, two_gpus])])
def test_two_workers_give_what_one_gives_from_one_copy(device: str) -> None:
    paths = sample_photographs()[:3]
    alone = VisionEncoder()
    alone.load(device=CPU, seed=3)
    config = EngineConfig.load(
        {"tensor_parallel_size": 2, "megapixels": 0.1, "seed": 3, "device": device}, environ={}
    )
    with Engine(config) as engine:
        for path, result in zip(paths, engine.encode(paths), strict=True):
            out, grid = patches(open_image(path), megapixels=0.1)
            assert result.embedding is not None, result.error
            tolerance = 1e-5 if device == "cpu" else 1e-3
            torch.testing.assert_close(
                result.embedding, alone.forward(Batch([out], grid)).embeddings[0], rtol=0, atol=tolerance
            )
        (rank,) = engine.peers
        figures = engine.statistics()
    assert [worker.name for worker in rank.workers] == ["rank0", "rank0.tp1"]
    assert len({worker.pid for worker in rank.workers}) == 2
    assert all(worker.backend.startswith("shm: ") for worker in rank.workers)
    assert figures.bytes_by_backend == {"shm": figures.image_bytes}
    assert figures.copies == 1.0


@pytest.mark.parametrize("size", [2, 4])
def test_the_parts_of_all_workers_are_the_weights_of_one(size: int) -> None:
    whole = VisionEncoder()
    whole.load(device=CPU, seed=5)
    parts = [VisionEncoder() for _ in range(size)]
    for rank, part in enumerate(parts):
        part.load(device=CPU, seed=5, parallel=Parallel(rank, size, [f"w{n}" for n in range(size)]))
    networks = [part._network for part in parts]
    assert whole._network is not None
    for name, weights in whole._network.state_dict().items():
        found = [network.state_dict()[name] for network in networks if network is not None]
        if "qkv" in name:  # queries, keys and values are divided each for itself: by heads
            thirds = [torch.cat(third) for third in zip(*(one.chunk(3) for one in found), strict=True)]
            assert torch.cat(thirds).equal(weights)
        elif "up" in name:
            assert torch.cat(found).equal(weights)
        elif name.endswith(("out.weight", "down.weight")):
            assert torch.cat(found, dim=1).equal(weights)
        else:
            assert all(one.equal(weights) for one in found)


@pytest.mark.parametrize("size", [3, 8])
def test_a_number_of_workers_that_does_not_divide_the_heads_is_refused(size: int) -> None:
    assert HEADS == 4
    with pytest.raises(ModelError, match=rf"tensor_parallel_size {size}: .* among 1, 2 or 4 workers"):
        VisionEncoder().load(device=CPU, seed=0, parallel=Parallel(0, size))


def test_a_model_that_cannot_be_divided_says_so() -> None:
    load_part(Checksum(), device=CPU, seed=0, parallel=Parallel())
    with pytest.raises(ModelError, match=r"tensor_parallel_size 2: Checksum can't be divided .* `parallel`"):
        load_part(Checksum(), device=CPU, seed=0, parallel=Parallel(0, 2))


def test_a_worker_that_does_not_come_is_named(tmp_path: Path) -> None:
    names = ["rank0", "rank0.tp1", "rank0.tp2"]
    with pytest.raises(ParallelError, match=r"rank0.tp1 waited 0.2 s .* for rank0, rank0.tp2, which did not"):
        join(1, names, tmp_path / "meeting", device=CPU, patience=0.2, timeout=5)


@pytest.mark.parametrize("failing", [[0, 2], [0, 1, 2]])
def test_a_step_that_fails_names_who_is_not_in_it(
    tmp_path: Path, failing: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    may_take = 2 if len(failing) < 3 else 30  # for all of them nobody waits to the end
    monkeypatch.setattr("engine.parallel._OTHERS_MAY_TAKE", may_take)
    names = ["rank0", "rank0.tp1", "rank0.tp2"]
    store = FileStore(str(tmp_path / "meeting"), -1)
    for place in range(3):
        store.set(f"here/{place}", f"100{place}")
    together = Barrier(len(failing))

    def fail(place: int) -> str:
        worker = Parallel(place, 3, names, store=FileStore(str(tmp_path / "meeting"), -1))
        together.wait(30)
        with pytest.raises(ParallelError) as caught, worker._named("a sum over the workers"):
            raise RuntimeError("it took too long")
        return str(caught.value)

    with ThreadPoolExecutor(3) as pool:
        said = set(pool.map(fail, failing))
    absent = "; rank0.tp1 (pid 1001) did not come to its end in 2 s: gone, stopped or slow"
    where = " in every worker" if len(failing) == len(names) else absent
    assert said == {f"a sum over the workers failed{where}: it took too long"}


def test_a_step_that_fails_when_the_place_of_the_meeting_is_gone_says_why_alone(tmp_path: Path) -> None:
    folder = tmp_path / "of the head"
    folder.mkdir()
    store = FileStore(str(folder / "meeting"), -1)
    store.set("here/0", "1000")
    rmtree(folder)
    worker = Parallel(0, 2, ["rank0", "rank0.tp1"], store=store)
    with pytest.raises(ParallelError, match="^a sum failed: too long$"), worker._named("a sum"):
        raise RuntimeError("too long")


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """Two ranks of two workers; the last test that uses it ends them all."""
    config = EngineConfig(
        data_parallel_size=2,
        tensor_parallel_size=2,
        images_per_prompt=3,
        model=DIVIDED,
        device="cpu",
        inline_below_kb=0,
        rank_restarts=0,
    )
    with Engine(config) as engine:
        assert not any(result.error for result in engine.encode([picture(0)] * 6))  # the ring is there
        yield engine


class TestTogether:
    def test_what_one_worker_cannot_do_fails_alone(self, engine: Engine) -> None:
        images = [picture(1), picture(2, 56, 84), picture(3), picture(4), picture(5, 84, 84), picture(6)]
        results = list(engine.encode(images))
        assert [bool(result.error) for result in results] == [False, True, False, False, True, False]
        assert "ValueError: 6 patches are too tall for 4" in results[1].error
        assert "tp1 could not do its part" in results[4].error
        for image, result in zip(images, results, strict=True):
            assert result.error or (result.embedding is not None and result.embedding.equal(of_two(image)))

    def test_the_death_of_one_worker_ends_its_rank_and_no_other(
        self, engine: Engine, caplog: pytest.LogCaptureFixture
    ) -> None:
        answering, victim = engine.peers[0].workers
        os.kill(victim.pid, signal.SIGSTOP)  # so that both have what they were sent when it dies

        def images() -> Iterator[Image.Image]:
            for number in range(24):
                if number == 12:  # by now the rank was sent two requests
                    os.kill(victim.pid, signal.SIGKILL)
                yield picture(number)

        results = list(engine.encode(images()))
        dead, living = engine.peers
        for number, result in enumerate(results):
            assert result.error == ""
            assert result.rank == "rank1"
            assert result.embedding is not None
            assert result.embedding.equal(of_two(picture(number)))
        assert dead.error == f"ended with rank0.tp1 (pid {victim.pid}), which was killed by SIGKILL"
        assert living.error == ""
        assert f"rank0 (pid {answering.pid}) {dead.error}; 2 requests go to the others" in caplog.text
        until_ended(answering.pid)
        os.kill(living.workers[0].pid, signal.SIGKILL)
        with pytest.raises(NoRankLeft, match=r"tp1 .*; rank1 \(pid \d+\) was killed by SIGKILL"):
            list(engine.encode([picture(0)] * 3))


def test_a_stopped_worker_ends_its_rank_when_the_time_is_over() -> None:
    config = EngineConfig(
        tensor_parallel_size=2,
        images_per_prompt=1,
        model=DIVIDED,
        device="cpu",
        request_timeout=5,  # also for the workers to connect with each other
        rank_restarts=0,
    )
    with Engine(config) as engine:
        victim = engine.peers[0].workers[1]
        os.kill(victim.pid, signal.SIGSTOP)
        late = rf"rank0.tp1 \(pid {victim.pid}\) did not come to its end in 1 s: gone, stopped or slow: "
        with pytest.raises(NoRankLeft, match=rf"rank0 .* can't go on: .* failed; {late}"):
            list(engine.encode(picture(number) for number in range(20)))
        until_ended(victim.pid)


@pytest.mark.gpu
@two_gpus
def test_a_worker_killed_on_its_gpu_takes_its_rank_along() -> None:
    """Nothing but SIGKILL ends the sum that the other one is in then."""
    config = EngineConfig(tensor_parallel_size=2, device="cuda", images_per_prompt=1, rank_restarts=0)
    with Engine(config) as engine:
        answering, victim = engine.peers[0].workers
        assert {answering.device, victim.device} == {"cuda:0", "cuda:1"}
        os.kill(victim.pid, signal.SIGSTOP)

        def images() -> Iterator[Image.Image]:
            for number in range(9):
                if number == 2:  # by now the rank was sent two requests, and takes no more
                    os.kill(victim.pid, signal.SIGKILL)
                yield picture(number, 280, 280)

        with pytest.raises(NoRankLeft, match=rf"rank0.tp1 \(pid {victim.pid}\), which was killed by SIGKILL"):
            list(engine.encode(images()))
        until_ended(answering.pid)
