"""What the engine asks of a model, the vision encoder that is built in, and how `--model` chooses one.

A model turns a `Batch` of photographs, already patches (`engine.images`), into one embedding for each.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from dataclasses import dataclass, field
from types import ModuleType
from typing import Final, Protocol, cast

import torch
from torch import nn
from torch.nn import functional

from engine.images import MERGE, ROW
from engine.parallel import Parallel

DIM: Final = 256
HEADS: Final = 4
BLOCKS: Final = 3


class ModelError(Exception):
    """A model can't be had or used; the message says what was looked for and what was found instead."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Photographs for one forward pass.

    `pixel_values` holds one float32 tensor `[patches, 1176]` for each photograph, on the model's device. It
    is a list, not one long tensor, because each tensor is a view into the ring of the process that sent it:
    joining them would copy them all. They are read-only; writing into one ends the process with SIGSEGV.
    `grid_thw` is int64 `[images, 3]`, on the CPU: the number of patches in time, height and width.
    `more` is empty, but for a model with an image processor of its own: it holds what that made beside
    pixel_values, a dict for each image, and the shapes are then that processor's.

    Raises:
        ValueError: the two don't fit each other.
    """

    pixel_values: list[torch.Tensor]
    grid_thw: torch.Tensor
    more: list[dict[str, torch.Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.more:
            return
        grid = self.grid_thw
        if grid.dtype != torch.int64 or tuple(grid.shape) != (len(self.pixel_values), 3):
            raise ValueError(
                f"grid_thw must be int64 [{len(self.pixel_values)}, 3], one row for each tensor in "
                f"pixel_values, not {grid.dtype} {list(grid.shape)}"
            )
        for index, (pixels, (t, h, w)) in enumerate(zip(self.pixel_values, grid.tolist(), strict=True)):
            whole_blocks = min(t, h, w) > 0 and h % MERGE == 0 and w % MERGE == 0
            if not whole_blocks or tuple(pixels.shape) != (t * h * w, ROW) or pixels.dtype != torch.float32:
                raise ValueError(
                    f"pixel_values[{index}] is {pixels.dtype} {list(pixels.shape)}, which doesn't fit its "
                    f"grid {[t, h, w]}: it must be float32 [t * h * w, {ROW}] of whole {MERGE}x{MERGE} blocks"
                )


@dataclass(frozen=True, eq=False)
class Outputs:
    """What a forward pass yields: `embeddings`, float32 `[images, dim]`, in the order of the batch.

    texts: one for each image, from a model that was asked to write; empty else.
    """

    embeddings: torch.Tensor
    texts: list[str] = field(default_factory=list)


class Model(Protocol):
    """What a class named by `--model package.module:Class` must have; it is made without arguments.

    A model that can be divided among the workers of a rank says so by one more argument of `load`,
    `parallel: Parallel` (`engine.parallel`): each worker then loads its part, gets every batch, and returns
    the same outputs.
    """

    def load(self, *, device: torch.device, seed: int) -> None:
        """Bring the weights onto `device`, before any `forward`; whatever is random follows from `seed`."""

    def forward(self, batch: Batch) -> Outputs:
        """Encode a batch whose tensors are on the device given to `load`, without writing into them."""


class VisionEncoder:
    """The built-in model: a small vision transformer with seeded weights and embeddings of 256, norm 1.

    Four patches of a merge block make one token (1,296 for 1 megapixel). Each photograph is encoded alone, so
    its embedding doesn't depend on its company in the batch. The weights are random, equal for equal seeds in
    every process and on every device; the embeddings tell photographs apart but mean nothing beyond that.

    Among several workers heads and hidden units are divided, with two sums in each block.

    Technique: Dosovitskiy et al., "An Image Is Worth 16x16 Words" (arXiv 2010.11929), with sine and cosine
    positions in two dimensions and the mean over tokens in place of a class token (Beyer et al., arXiv
    2205.01580).
    """

    def __init__(self) -> None:
        self._network: _Network | None = None

    def load(self, *, device: torch.device, seed: int, parallel: Parallel | None = None) -> None:
        """Draw all weights, equal for equal seeds however many workers there are, and keep this one's.

        Raises:
            ModelError: the heads can't be divided among so many workers.
        """
        parallel = parallel or Parallel()
        if HEADS % parallel.size:
            allowed = [str(size) for size in range(1, HEADS + 1) if HEADS % size == 0]
            raise ModelError(
                f"tensor_parallel_size {parallel.size}: the built-in encoder has {HEADS} heads, which can be "
                f"divided among {', '.join(allowed[:-1])} or {allowed[-1]} workers"
            )
        network = _Network(parallel)
        _seed_weights(network, seed)
        network.keep_part()
        self._network = network.to(device).eval().requires_grad_(False)

    def forward(self, batch: Batch) -> Outputs:
        """Encode each photograph of the batch.

        Raises:
            ModelError: `load` wasn't called before.
        """
        if self._network is None:
            raise ModelError("the model has no weights yet; call load() before forward()")
        if not batch.pixel_values:
            return Outputs(torch.empty(0, DIM, device=self._network.project.weight.device))
        grids = batch.grid_thw.tolist()
        # no_grad and not inference_mode: whoever gets the results may do with them what tensors allow.
        with torch.no_grad():
            pairs = zip(batch.pixel_values, grids, strict=True)
            return Outputs(torch.stack([self._network(pixels, *grid) for pixels, grid in pairs]))


class _Linear(nn.Linear):
    """A linear layer that leaves its weights to `_seed_weights`."""

    def reset_parameters(self) -> None:
        """Draw nothing: the constructor would draw from the global generator, which belongs to the user."""


class _Columns(_Linear):
    """Outputs divided among the workers; `groups` of them (queries, keys, values) each for itself."""

    def keep_part(self, parallel: Parallel, *, groups: int = 1) -> None:
        weights = self.weight.view(groups, parallel.size, -1, self.in_features)[:, parallel.rank]
        biases = self.bias.view(groups, parallel.size, -1)[:, parallel.rank]
        self.weight = nn.Parameter(weights.flatten(0, 1).clone())
        self.bias = nn.Parameter(biases.flatten().clone())


class _Rows(_Linear):
    """Inputs divided among the workers; what each makes of its own is added up, and the bias added once."""

    def keep_part(self, parallel: Parallel) -> None:
        self._parallel = parallel
        self.weight = nn.Parameter(self.weight.chunk(parallel.size, dim=1)[parallel.rank].clone())

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self._parallel.sum(functional.linear(values, self.weight)) + self.bias


class _Network(nn.Module):
    def __init__(self, parallel: Parallel) -> None:
        super().__init__()
        self.embed = _Linear(MERGE * MERGE * ROW, DIM)
        self.blocks = nn.ModuleList(_Block(parallel) for _ in range(BLOCKS))
        self.norm = nn.LayerNorm(DIM)
        self.project = _Linear(DIM, DIM, bias=False)

    def keep_part(self) -> None:
        """Let go of the weights that other workers have."""
        for block in self.blocks:
            cast(_Block, block).keep_part()

    def forward(self, pixels: torch.Tensor, t: int, h: int, w: int) -> torch.Tensor:
        # The rows of a merge block lie next to each other, so that a token is a view, not a gather.
        tokens = self.embed(pixels.reshape(-1, MERGE * MERGE * ROW))
        tokens = tokens + positions(h // MERGE, w // MERGE, device=tokens.device).repeat(t, 1)
        for block in self.blocks:
            tokens = block(tokens)
        pooled = self.norm(tokens).mean(dim=0)
        return functional.normalize(self.project(pooled), dim=0)


class _Block(nn.Module):
    """Attention and a two-layer perceptron, each normalised before and added to its input."""

    def __init__(self, parallel: Parallel) -> None:
        super().__init__()
        self._parallel = parallel
        self.norm_attention = nn.LayerNorm(DIM)
        self.qkv = _Columns(DIM, 3 * DIM)
        self.out = _Rows(DIM, DIM)
        self.norm_mlp = nn.LayerNorm(DIM)
        self.up = _Columns(DIM, 4 * DIM)
        self.down = _Rows(4 * DIM, DIM)

    def keep_part(self) -> None:
        self.qkv.keep_part(self._parallel, groups=3)
        self.out.keep_part(self._parallel)
        self.up.keep_part(self._parallel)
        self.down.keep_part(self._parallel)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        tokens = tokens + self._attention(self.norm_attention(tokens))
        return tokens + cast(torch.Tensor, self.down(functional.gelu(self.up(self.norm_mlp(tokens)))))

    def _attention(self, tokens: torch.Tensor) -> torch.Tensor:
        # [tokens, 3 * dim / workers] -> three times [1, heads / workers, tokens, dim / heads]
        heads = HEADS // self._parallel.size
        qkv = self.qkv(tokens).view(1, -1, 3, heads, DIM // HEADS).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        return cast(torch.Tensor, self.out(mixed.transpose(1, 2).reshape(len(tokens), -1)))


def positions(rows: int, columns: int, *, device: torch.device) -> torch.Tensor:
    """Return sine and cosine positions float32 `[rows * columns, 256]`: half for the row, half the column.

    Source: Vaswani et al., "Attention Is All You Need" (arXiv 1706.03762), section 3.5, once for each axis.
    """
    quarter = DIM // 4
    frequencies = 10_000.0 ** (-torch.arange(quarter, device=device) / quarter)

    def axis(length: int) -> torch.Tensor:
        angles = torch.arange(length, device=device)[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    by_row = axis(rows)[:, None].expand(-1, columns, -1)
    by_column = axis(columns)[None].expand(rows, -1, -1)
    return torch.cat([by_row, by_column], dim=2).reshape(rows * columns, DIM)


def _seed_weights(network: nn.Module, seed: int) -> None:
    # Always drawn on the CPU: a GPU's generator gives other numbers for the same seed.
    generator = torch.Generator(device="cpu").manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


def load_part(model: Model, *, device: torch.device, seed: int, parallel: Parallel) -> None:
    """Load a model, or this worker's part of it.

    Raises:
        ModelError: there are several workers, and the model can't be divided.
    """
    if "parallel" in inspect.signature(model.load).parameters:
        model.load(device=device, seed=seed, parallel=parallel)  # type: ignore[call-arg]  # it has it
    elif parallel.size == 1:
        model.load(device=device, seed=seed)
    else:
        raise ModelError(
            f"tensor_parallel_size {parallel.size}: {type(model).__name__} can't be divided among workers "
            "(its load() takes no `parallel`); 1 is allowed, and data_parallel_size makes more ranks"
        )


def load_model(spec: str) -> Model:
    """Return the model that a specification names: `builtin`, or `package.module:Class`.

    This imports and runs what it is told to. A specification comes from this machine's own operator (flag,
    file, environment), never from a message.

    Raises:
        ModelError: the specification, the module, or the class isn't as it should be.
    """
    if spec == "builtin":
        return VisionEncoder()
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", spec):
        raise ModelError(
            f"model {spec!r} is neither 'builtin' nor of the form package.module:Class nor a folder here"
        )
    module_name, _, class_name = spec.partition(":")
    return _make(spec, _find_class(spec, _import(spec, module_name), class_name))


def _import(spec: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and f"{name}.".startswith(f"{missing}."):
            message = f"no module named {missing!r}; install it, or put its folder on PYTHONPATH"
        else:
            message = f"module {name!r} failed to import: {type(error).__name__}: {error}"
        raise ModelError(f"model {spec!r}: {message}") from error


def _find_class(spec: str, module: ModuleType, name: str) -> type:
    found = getattr(module, name, None)
    if found is None:
        near = difflib.get_close_matches(
            name, [word for word in vars(module) if not word.startswith("_")], n=1
        )
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ModelError(f"model {spec!r}: module {module.__name__!r} has no class {name!r}{hint}")
    if not isinstance(found, type):
        raise ModelError(f"model {spec!r}: {name!r} is not a class but of type {type(found).__name__}")
    return found


def _make(spec: str, found: type) -> Model:
    lacking = [name for name in ("load", "forward") if not callable(getattr(found, name, None))]
    if lacking:
        raise ModelError(
            f"model {spec!r}: class {found.__name__!r} lacks {' and '.join(lacking)}; "
            "a model has load(self, *, device, seed) and forward(self, batch)"
        )
    try:
        return cast(Model, found())
    except Exception as error:
        raise ModelError(
            f"model {spec!r}: {found.__name__}() failed (models are made without arguments): "
            f"{type(error).__name__}: {error}"
        ) from error
