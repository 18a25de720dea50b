"""The built-in encoder is deterministic and leaves its inputs alone; `--model` says what it can't find."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from engine.images import Grid, find, grid_for, open_image, write_patches
from engine.model import Batch, Model, ModelError, Outputs, VisionEncoder, load_model, load_part, positions
from engine.parallel import Parallel

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


def encoder(seed: int = 0) -> VisionEncoder:
    model = VisionEncoder()
    model.load(device=CPU, seed=seed)
    return model


def batch(*grids: Grid) -> Batch:
    generator = torch.Generator().manual_seed(7)
    pixels = [torch.randn(grid.shape, generator=generator) for grid in grids]
    return Batch(pixels, torch.tensor(grids, dtype=torch.int64).reshape(-1, 3))


def embed(model: Model, given: Batch) -> torch.Tensor:
    return model.forward(given).embeddings


class TestVisionEncoder:
    def test_gives_one_embedding_of_norm_1_for_each_image(self) -> None:
        embeddings = embed(encoder(), batch(Grid(1, 4, 4), Grid(1, 6, 10), Grid(2, 4, 2)))
        assert embeddings.shape == (3, 256)
        assert embeddings.dtype == torch.float32
        torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(3))

    def test_of_nothing_gives_nothing(self) -> None:
        assert embed(encoder(), batch()).shape == (0, 256)

    def test_does_not_depend_on_company_in_the_batch(self) -> None:
        model, given = encoder(), batch(Grid(1, 4, 4), Grid(1, 6, 10))
        together = embed(model, given)
        for index in range(2):
            alone = Batch(given.pixel_values[index : index + 1], given.grid_thw[index : index + 1])
            torch.testing.assert_close(embed(model, alone)[0], together[index])

    def test_tells_photographs_apart(self) -> None:
        embeddings = []
        for path in find([]):
            image = open_image(path)
            grid = grid_for(*image.size, megapixels=0.1)
            pixels = torch.empty(grid.shape)
            write_patches(image, grid, pixels)
            embeddings.append(embed(encoder(), Batch([pixels], torch.tensor([grid])))[0])
        likeness = torch.stack(embeddings) @ torch.stack(embeddings).T
        assert likeness.fill_diagonal_(-1).max() < 0.9999

    def test_sees_where_a_patch_lies(self) -> None:
        given = batch(Grid(1, 4, 4))
        swapped = given.pixel_values[0].view(4, 4, 1176)[[3, 1, 2, 0]].view(16, 1176)
        here, there = embed(encoder(), given), embed(encoder(), Batch([swapped], given.grid_thw))
        assert (here - there).abs().max() > 1e-4

    def test_tells_a_wide_photograph_from_a_high_one(self) -> None:
        given = batch(Grid(1, 2, 8))
        high = Batch(given.pixel_values, torch.tensor([[1, 8, 2]]))
        assert (embed(encoder(), given) - embed(encoder(), high)).abs().max() > 1e-4

    def test_gives_other_embeddings_for_another_seed(self) -> None:
        given = batch(Grid(1, 4, 4))
        assert (embed(encoder(0), given) - embed(encoder(1), given)).abs().max() > 1e-2

    def test_gives_the_same_embeddings_in_another_process(self, tmp_path: Path) -> None:
        code = (
            "import sys, torch\n"
            "from tests.engine.test_model import Grid, batch, embed, encoder\n"
            "torch.manual_seed(99)\n"
            "torch.save(embed(encoder(5), batch(Grid(1, 6, 10))), sys.argv[1])\n"
        )
        file = tmp_path / "embeddings.pt"
        subprocess.run([sys.executable, "-c", code, str(file)], check=True, timeout=60, cwd=ROOT)
        here = embed(encoder(5), batch(Grid(1, 6, 10)))
        torch.testing.assert_close(torch.load(file, weights_only=True), here, rtol=0, atol=1e-6)

    def test_leaves_the_global_generator_alone(self) -> None:
        before = torch.get_rng_state()
        embed(encoder(), batch(Grid(1, 4, 4)))
        assert torch.equal(torch.get_rng_state(), before)

    def test_gives_ordinary_tensors(self) -> None:
        embeddings = embed(encoder(), batch(Grid(1, 4, 4)))
        assert not embeddings.requires_grad
        assert not embeddings.is_inference()

    def test_must_be_loaded_first(self) -> None:
        with pytest.raises(ModelError, match=r"call load\(\) before forward\(\)"):
            VisionEncoder().forward(batch(Grid(1, 4, 4)))


READ_ONLY = """
import mmap, resource, sys, tempfile, warnings
import numpy as np, torch
from tests.engine.test_model import Batch, Grid, batch, embed, encoder

resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
warnings.filterwarnings("ignore", "The given NumPy array is not writable")
given = batch(Grid(1, 6, 10))
with tempfile.TemporaryFile() as file:
    file.write(given.pixel_values[0].numpy().tobytes())
    file.flush()
    memory = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
pixels = torch.from_numpy(np.frombuffer(memory, np.float32)).view(60, 1176)
if sys.argv[1] == "write":
    pixels.add_(0)
read_only = embed(encoder(), Batch([pixels], given.grid_thw))
sys.exit(not torch.allclose(read_only, embed(encoder(), given)))
"""


@pytest.mark.parametrize(("action", "status"), [("read", 0), ("write", -signal.SIGSEGV)])
def test_the_encoder_works_on_memory_that_only_allows_reading(action: str, status: int) -> None:
    """Writing into the same memory shows that the first case would have failed."""
    done = subprocess.run([sys.executable, "-c", READ_ONLY, action], check=False, timeout=60, cwd=ROOT)
    assert done.returncode == status


class TestPositions:
    def test_are_distinct_and_split_by_axis(self) -> None:
        table = positions(5, 7, device=CPU).view(5, 7, 256)
        assert len({tuple(row) for row in table.view(35, 256).tolist()}) == 35
        assert torch.equal(table[2, 1, :128], table[2, 6, :128])
        assert torch.equal(table[0, 3, 128:], table[4, 3, 128:])

    def test_are_sines_and_cosines(self) -> None:
        row = positions(4, 1, device=CPU)[3, :128]
        angles = torch.tensor([3 / 10_000 ** (index / 64) for index in range(64)])
        torch.testing.assert_close(row, torch.cat([angles.sin(), angles.cos()]))


class TestBatch:
    def test_refuses_a_grid_table_that_does_not_fit(self) -> None:
        pixels = [torch.zeros(16, 1176)]
        for table in (
            torch.ones(2, 3, dtype=torch.int64),
            torch.ones(3, dtype=torch.int64),
            torch.ones(1, 3),
        ):
            with pytest.raises(ValueError, match=r"grid_thw must be int64 \[1, 3\], one row for each"):
                Batch(pixels, table)

    @pytest.mark.parametrize(
        ("shape", "grid"),
        [
            ((16, 1176), [1, 4, 6]),
            ((15, 1176), [1, 3, 5]),
            ((16, 1175), [1, 4, 4]),
            ((16, 1176), [1, -4, -4]),
            ((0, 1176), [0, 4, 4]),
            ((18816,), [1, 4, 4]),
        ],
    )
    def test_names_the_image_that_does_not_fit(self, shape: tuple[int, ...], grid: list[int]) -> None:
        pixels = [torch.zeros(16, 1176), torch.zeros(shape)]
        with pytest.raises(ValueError, match=r"pixel_values\[1\] is torch.float32 .* doesn't fit its grid"):
            Batch(pixels, torch.tensor([[1, 4, 4], grid]))

    def test_refuses_another_dtype(self) -> None:
        with pytest.raises(ValueError, match=r"pixel_values\[0\] is torch.float64"):
            Batch([torch.zeros(16, 1176, dtype=torch.float64)], torch.tensor([[1, 4, 4]]))


MODULE = """
import torch
from engine.model import Batch, Outputs

class Mean:
    def load(self, *, device: torch.device, seed: int) -> None:
        self.seed = seed

    def forward(self, batch: Batch) -> Outputs:
        return Outputs(torch.stack([pixels.mean(dim=0) + self.seed for pixels in batch.pixel_values]))

class Choosy(Mean):
    def __init__(self, size):
        self.size = size

class Unloadable:
    forward = Mean.forward

class Nothing:
    load = 5

mean = Mean()
"""


@pytest.fixture
def write_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """Return a function that makes an importable module of a source text and returns its name."""
    names: list[str] = []
    monkeypatch.syspath_prepend(tmp_path)

    def write(source: str) -> str:
        names.append(f"model_{uuid.uuid4().hex}")
        (tmp_path / f"{names[-1]}.py").write_text(source)
        return names[-1]

    yield write
    for name in names:
        sys.modules.pop(name, None)


class TestLoadModel:
    def test_knows_the_builtin(self) -> None:
        assert isinstance(load_model("builtin"), VisionEncoder)

    def test_takes_a_class_of_somebody_else(self, write_module: Callable[[str], str]) -> None:
        model = load_model(f"{write_module(MODULE)}:Mean")
        model.load(device=CPU, seed=3)
        outputs = model.forward(Batch([torch.ones(16, 1176)], torch.tensor([[1, 4, 4]])))
        assert isinstance(outputs, Outputs)
        assert torch.equal(outputs.embeddings, torch.full((1, 1176), 4.0))

    @pytest.mark.parametrize(("number", "name"), [(0, "Mean"), (1, "Halves")])
    def test_takes_the_classes_of_the_documentation(
        self, number: int, name: str, write_module: Callable[[str], str]
    ) -> None:
        blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "models.md").read_text(), re.DOTALL)
        model = load_model(f"{write_module(blocks[number])}:{name}")
        load_part(model, device=CPU, seed=0, parallel=Parallel())
        assert embed(model, batch(Grid(1, 4, 4), Grid(1, 6, 10))).shape == (2, 1176)

    @pytest.mark.parametrize(
        "spec",
        [
            "",
            "built-in",
            "module",
            "module:",
            ":Class",
            "a:b:c",
            ".a:C",
            "a..b:C",
            "a:C.d",
            "a/b.py:C",
            "a:C\n",
        ],
    )
    def test_refuses_bad_syntax(self, spec: str) -> None:
        with pytest.raises(ModelError, match=r"is neither 'builtin' nor of the form package\.module:Class"):
            load_model(spec)

    @pytest.mark.parametrize(
        ("spec", "missing"),
        [("no_such_package:Model", "no_such_package"), ("engine.no_such:Model", "engine.no_such")],
    )
    def test_names_a_missing_module(self, spec: str, missing: str) -> None:
        with pytest.raises(
            ModelError, match=f"model '{spec}': no module named '{missing}'; install it, or put"
        ):
            load_model(spec)

    @pytest.mark.parametrize(
        ("source", "reason"),
        [
            ("import no_such_dependency", "ModuleNotFoundError: No module named 'no_such_dependency'"),
            ("1 / 0", "ZeroDivisionError: division by zero"),
            ("def", "SyntaxError: invalid syntax"),
        ],
    )
    def test_names_what_fails_inside_the_module(
        self, source: str, reason: str, write_module: Callable[[str], str]
    ) -> None:
        name = write_module(source)
        with pytest.raises(ModelError, match=f"module '{name}' failed to import: {reason}"):
            load_model(f"{name}:Model")

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("Meen", r"has no class 'Meen'; did you mean 'Mean'\?"),
            ("Zzz", r"has no class 'Zzz'$"),
            ("mean", r"'mean' is not a class but of type Mean"),
            ("Unloadable", r"class 'Unloadable' lacks load; a model has load\(self, \*, device, seed\) and"),
            ("Nothing", r"class 'Nothing' lacks load and forward"),
            ("Choosy", r"Choosy\(\) failed \(models are made without arguments\): TypeError: .*'size'"),
        ],
    )
    def test_names_what_is_wrong_with_the_class(
        self, name: str, reason: str, write_module: Callable[[str], str]
    ) -> None:
        with pytest.raises(ModelError, match=reason):
            load_model(f"{write_module(MODULE)}:{name}")
