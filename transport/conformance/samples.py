"""What tests send and how it is compared: tensors of every kind, typed bodies, bytes that were changed."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import msgspec
import numpy as np
import torch

from transport.backends.base import Bytes
from transport.tensors import source_of

_TORCH = "bool uint8 int8 int16 int32 int64 uint16 uint32 uint64 float16 bfloat16 float32 float64 complex32"
_TORCH += " complex64 complex128 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu"
TORCH_DTYPES = [getattr(torch, name) for name in _TORCH.split() if hasattr(torch, name)]
NUMPY_DTYPES = [
    "|b1",
    "|i1",
    "<u2",
    ">u2",
    "<i4",
    ">i8",
    "<f2",
    "<f4",
    ">f8",
    "<c8",
    "<c16",
    "<M8[ns]",
    "<U3",
    "|S5",
]


class Request(msgspec.Struct):
    """A typed body."""

    id: str
    pixels: torch.Tensor
    grid: list[int]


@dataclasses.dataclass
class Note:
    """A body that is a dataclass, to be sent."""

    mask: Any
    text: str


def noise(nbytes: int, seed: int = 1) -> torch.Tensor:
    """Random bytes, torch.uint8 [nbytes]."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8))


def digest(tensor: Any) -> int:
    """A number that tells wrong, moved and missing bytes, of a tensor's bytes in C order."""
    data = raw(tensor)
    weights = np.arange(1, data.size + 1, dtype=np.uint64)
    return int((data * weights).sum(dtype=np.uint64)) ^ data.size


def raw(tensor: Any) -> Bytes:
    """The bytes of a tensor or array in C order, uint8 [nbytes]."""
    source = source_of(tensor)
    assert source is not None
    buffer = np.empty(source.nbytes, np.uint8)
    source.fill(buffer)
    return buffer


def raw_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor as one, torch.uint8 [nbytes]."""
    return torch.from_numpy(raw(tensor))


def same(one: Any, other: Any) -> bool:
    """Whether two tensors have the same library, dtype, shape and bytes."""
    return (
        isinstance(one, torch.Tensor) == isinstance(other, torch.Tensor)
        and one.dtype == other.dtype
        and tuple(one.shape) == tuple(other.shape)
        and bool(np.array_equal(raw(one), raw(other)))
    )


def tensors() -> dict[str, Any]:
    """Tensors of every dtype and every layout, by what is special about them."""
    bits = noise(240)
    found: dict[str, Any] = {
        str(dtype): bits.view(dtype).view(3, -1) for dtype in TORCH_DTYPES if dtype != torch.bool
    }
    found["torch.bool"] = bits > 127
    for dtype in NUMPY_DTYPES:
        plain = np.arange(60).astype(np.int64)
        found[f"numpy {dtype}"] = (plain.view("<M8[ns]") if "M8" in dtype else plain.astype(dtype)).reshape(
            4, 15
        )
    matrix = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    found |= {
        "0-d": torch.tensor(3.5, dtype=torch.float64),
        "numpy 0-d": np.array(7, np.int16),
        "empty": torch.empty(0, 5, dtype=torch.bfloat16),
        "numpy empty": np.empty((3, 0), np.float32),
        "transposed": matrix.T,
        "stepped": matrix[::2, ::3],
        "expanded": matrix[:1].expand(5, 6),
        "backwards": np.arange(20)[::-2],
        "fortran": np.asfortranarray(np.arange(12.0).reshape(3, 4)),
        "conjugate": torch.randn(5, dtype=torch.complex64, generator=torch.Generator().manual_seed(1)).conj(),
        "negated": torch.randn(5, dtype=torch.complex64, generator=torch.Generator().manual_seed(2))
        .conj()
        .imag,
        "with gradient": torch.ones(3, requires_grad=True),
        "parameter": torch.nn.Parameter(torch.arange(4.0)),
        "1 MiB and a bit, strided": noise((1 << 20) + 6).view(2, -1).T,
    }
    return found


def mutated(data: bytes, chance: random.Random) -> bytes:
    """Some bytes changed, cut or added."""
    changed = bytearray(data)
    for _ in range(chance.randrange(1, 4)):
        match chance.randrange(4):
            case 0 if changed:
                del changed[chance.randrange(len(changed)) :]
            case 1:
                changed += chance.randbytes(chance.randrange(1, 9))
            case _ if changed:
                changed[chance.randrange(len(changed))] = chance.randrange(256)
    return bytes(changed)
