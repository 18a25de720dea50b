"""Which tensors can be sent and how: the door to specs, sources and views; `stack` and `concat`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.parameter import is_lazy

from .sources import Combined, Source, combined_spec, source_over
from .specs import MAX_DIMENSIONS, Bytes, Tensor, TensorSpec, numpy_name, torch_name, view

__all__ = [
    "Bytes",
    "Joined",
    "Source",
    "Stacked",
    "Tensor",
    "TensorSpec",
    "concat",
    "source_of",
    "spec_for",
    "stack",
    "view",
]


def source_of(obj: object) -> Source | None:
    """The source of a torch tensor, a numpy array, or what `stack` and `concat` return; None for others.

    Nothing is read or copied yet. TypeError: a tensor that cannot be sent, with what to do about it.
    """
    if isinstance(obj, torch.Tensor):
        return _torch_source(obj)
    if isinstance(obj, np.ndarray):
        return _numpy_source(obj)
    if isinstance(obj, Joined):
        return Combined(obj._parts, obj.dim)
    return None


def _require_source(obj: object) -> Source:
    source = source_of(obj)
    if source is None:
        raise TypeError(f"expected a torch tensor or a numpy array, got {type(obj).__name__}")
    return source


_PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)


def _torch_source(tensor: torch.Tensor) -> Source:
    if type(tensor) not in _PLAIN_TENSORS:
        tensor = _plain_tensor(tensor)
    name = torch_name(tensor.dtype)
    if name is None or tensor.layout is not torch.strided or tensor.is_nested or tensor.is_meta:
        raise TypeError(_refusal(tensor))
    if tensor.dim() > MAX_DIMENSIONS:
        raise TypeError(f"cannot send a tensor of {tensor.dim()} dimensions; at most {MAX_DIMENSIONS}")
    try:
        tensor.data_ptr()
    except RuntimeError as error:
        raise TypeError("cannot send a tensor inside torch.func transforms such as vmap or grad") from error
    return source_over(tensor, name)


def _plain_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The plain tensor over the same memory, for a subclass whose memory is all there is to it."""
    name = type(tensor).__name__
    if is_lazy(tensor):
        raise TypeError(f"cannot send a {name}; run the lazy module once to give it a shape")
    if tensor.layout is torch.jagged:
        raise TypeError(_refusal(tensor))
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise TypeError(f"cannot send a {name}, which is more than its memory; send a plain torch.Tensor")
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.detach().as_subclass(torch.Tensor)


def _refusal(tensor: torch.Tensor) -> str:
    if tensor.is_nested:
        return "cannot send a nested tensor; send the list of tensors that .unbind() gives"
    if tensor.layout is not torch.strided:
        kind = "sparse" if "sparse" in str(tensor.layout) else str(tensor.layout)
        return f"cannot send a {kind} tensor; call .to_dense() first"
    if tensor.is_meta:
        return "cannot send a meta tensor, which has no data; send its shape and dtype"
    if tensor.is_quantized:
        return "cannot send a quantized tensor; send .int_repr() with scale and zero point, or .dequantize()"
    return f"cannot send a tensor of dtype {tensor.dtype}; call .view(torch.uint8) first"


def _numpy_source(array: npt.NDArray[Any]) -> Source:
    if type(array) not in (np.ndarray, np.memmap):
        raise TypeError(f"cannot send a {type(array).__name__}; send the arrays it consists of (np.asarray)")
    return source_over(array, numpy_name(array.dtype))


class Joined:
    """Tensors that the receiver gets as one, concatenated along `dim`. Made by `concat`."""

    __slots__ = ("_parts", "dim", "spec")
    __hash__ = None  # type: ignore[assignment]  # no dict key: what arrives may not be hashable

    def __init__(self, parts: Sequence[Source], dim: int) -> None:
        self._parts = tuple(parts)
        self.dim = dim
        self.spec = combined_spec(self._parts, dim)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self._parts)} tensors, {self.spec.dtype}, {self.spec.shape})"


class Stacked(Joined):
    """Tensors of one shape that the receiver gets as one with a new dimension `dim`. Made by `stack`."""

    __slots__ = ()


def stack(tensors: Sequence[Tensor], dim: int = 0) -> Stacked:
    """A batch, for use anywhere in a body: the receiver gets what `torch.stack` or `np.stack` would give.

    Each tensor is copied once, straight to its place at the destination; the batch is never built here.
    tensors: at least one, all of one library, dtype and shape; they are read when the body is sent.
    TypeError: not a tensor, another library or dtype. ValueError: none, another shape, no such dim.
    """
    sources = _alike("stack", tensors)
    rank = len(sources[0].spec.shape)
    dim = _dimension("stack", dim, rank + 1)
    for index, source in enumerate(sources):
        if source.spec.shape != sources[0].spec.shape:
            raise ValueError(_differs("stack", index, "shape", source.spec.shape, sources[0].spec.shape))
    return Stacked([_require_source(_unsqueezed(source.tensor, dim)) for source in sources], dim)


def concat(tensors: Sequence[Tensor], dim: int = 0) -> Joined:
    """As `stack`, but along the existing dimension `dim`, in which alone the shapes may differ.

    ValueError also for tensors without a dimension.
    """
    sources = _alike("concat", tensors)
    first = sources[0].spec.shape
    if not first:
        raise ValueError("concat: tensor 0 has no dimension; use stack")
    dim = _dimension("concat", dim, len(first))
    for index, source in enumerate(sources):
        shape = source.spec.shape
        if len(shape) != len(first) or shape[:dim] + shape[dim + 1 :] != first[:dim] + first[dim + 1 :]:
            raise ValueError(_differs("concat", index, "shape", shape, first))
    return Joined(sources, dim)


def _alike(name: str, tensors: Sequence[Tensor]) -> list[Source]:
    """The sources of tensors that have one library and dtype."""
    sources: list[Source] = []
    for index, tensor in enumerate(tensors):
        if isinstance(tensor, Joined):
            raise TypeError(f"{name}: tensor {index} is a {type(tensor).__name__}; these cannot be nested")
        try:
            source = _require_source(tensor)
        except TypeError as error:
            raise TypeError(f"{name}: tensor {index}: {error}") from None
        sources.append(source)
        if source.spec.dtype != sources[0].spec.dtype:
            raise TypeError(_differs(name, index, "dtype", source.spec.dtype, sources[0].spec.dtype))
    if not sources:
        raise ValueError(f"{name}: no tensors; at least one is needed")
    return sources


def _differs(name: str, index: int, what: str, here: object, there: object) -> str:
    return f"{name}: tensor {index} has {what} {here}, tensor 0 has {what} {there}"


def _dimension(name: str, dim: int, rank: int) -> int:
    if not -rank <= dim < rank:
        raise ValueError(f"{name}: dim {dim} is not between {-rank} and {rank - 1}")
    return dim % rank


def _unsqueezed(tensor: Tensor, dim: int) -> Tensor:
    return np.expand_dims(tensor, dim) if isinstance(tensor, np.ndarray) else tensor.unsqueeze(dim)


def spec_for(shape: Sequence[int], dtype: torch.dtype | npt.DTypeLike) -> TensorSpec:
    """The spec of a tensor to be made: torch's dtype makes it a torch tensor, numpy's an array.

    TypeError: a dtype that cannot be sent. ValueError: a negative size.
    """
    sizes = tuple(int(size) for size in shape)
    if any(size < 0 for size in sizes):
        raise ValueError(f"a shape has no negative sizes: {sizes}")
    if isinstance(dtype, torch.dtype):
        name = torch_name(dtype)
        if name is None:
            raise TypeError(f"cannot send a tensor of dtype {dtype}")
        return TensorSpec(name, sizes)
    return TensorSpec(numpy_name(np.dtype(dtype)), sizes)
