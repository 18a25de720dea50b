"""What a tensor is on the wire, and the tensor over its bytes again: dtype names, shapes, views."""

from __future__ import annotations

import math
import re
import warnings
from functools import lru_cache
from typing import Any, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from .errors import ProtocolError

Bytes: TypeAlias = npt.NDArray[np.uint8]
Tensor: TypeAlias = torch.Tensor | npt.NDArray[Any]

# What numpy can hold, and from 2.0 on also the limit of torch's element-wise kernels.
MAX_DIMENSIONS = 64 if np.lib.NumpyVersion(np.__version__) >= "2.0.0" else 32
MAX_BYTES = 1 << 62

_TORCH_DTYPES = {
    str(dtype): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype)
    # Quantized tensors need their scale; bitsN and (u)intN below 8 bits have no agreed place in a byte.
    and not re.fullmatch(r"torch\.(q.*|bits.*|u?int[1-7])", str(dtype))
}
_TORCH_NAMES = {dtype: name for name, dtype in _TORCH_DTYPES.items()}


def _numpy_twin(dtype: torch.dtype) -> np.dtype[Any] | None:
    """The dtype of an array that torch makes such a tensor from; None for torch's own, as bfloat16."""
    try:
        twin = np.dtype(str(dtype).removeprefix("torch."))
        return twin if torch.from_numpy(np.empty(0, twin)).dtype is dtype else None
    except TypeError:
        return None


_NUMPY_TWINS = {dtype: twin for dtype in _TORCH_NAMES if (twin := _numpy_twin(dtype)) is not None}
_NUMPY_FIXED = {"|b1", "|i1", "|u1"} | {
    order + kind + size
    for order in "<>"
    for kind, sizes in {"i": "248", "u": "248", "f": ("2", "4", "8", "16"), "c": ("8", "16", "32")}.items()
    for size in sizes
}
_NUMPY_SIZED = re.compile(
    r"[<>]U[1-9]\d{0,8}|\|S[1-9]\d{0,8}|[<>][mM]8(\[([1-9]\d{0,8})?(Y|M|W|D|h|m|s|ms|us|ns|ps|fs|as)\])?",
    re.ASCII,
)


@lru_cache(maxsize=256)
def _dtype_of(name: str) -> torch.dtype | np.dtype[Any]:
    """The dtype that goes by this name on the wire; nothing outside the allow-lists reaches a parser."""
    found = _TORCH_DTYPES.get(name)
    if found is not None:
        return found
    if name in _NUMPY_FIXED or _NUMPY_SIZED.fullmatch(name):
        try:
            return np.dtype(name)
        except TypeError:  # such as <f16 on a platform without it, or a string wider than numpy's limit
            pass
    raise ProtocolError(f"unknown dtype {name[:32]!a}; the peer may run a newer torch or numpy")


def torch_name(dtype: torch.dtype) -> str | None:
    """This dtype's name on the wire, or None: its elements are not whole bytes that mean something alone."""
    return _TORCH_NAMES.get(dtype)


@lru_cache(maxsize=256)
def numpy_name(dtype: np.dtype[Any]) -> str:
    """This dtype's name on the wire. TypeError: elements that are pointers, fields, or of a foreign type."""
    name = dtype.str
    if (name in _NUMPY_FIXED or _NUMPY_SIZED.fullmatch(name)) and np.dtype(name) == dtype:
        return name
    if dtype.hasobject or dtype.kind == "T":
        advice = "send a list, or convert it to a numeric or fixed-width dtype"
    elif dtype.names:
        advice = "send a dict of its fields"
    else:
        advice = "view it as a numpy dtype of the same size, or send a torch tensor"
    raise TypeError(f"cannot send a numpy array of dtype {str(dtype)[:80]}; {advice}")


class TensorSpec(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What is needed beside the bytes to have a tensor again.

    dtype: torch's name with its module (`"torch.bfloat16"`) or numpy's own `dtype.str` (`"<f4"`, `">i2"`,
    `"<M8[ns]"`), so that it also says which library's tensor this is. A `"<f16"` (long double) means what
    the platform takes it to mean.
    shape: elements along each dimension; `()` is a single value.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def is_torch(self) -> bool:
        """Whether it is torch's tensor, not numpy's array."""
        return self.dtype.startswith("torch.")

    @property
    def nbytes(self) -> int:
        """Bytes of the elements in C order, exact at any size. ProtocolError: unknown dtype."""
        return _dtype_of(self.dtype).itemsize * math.prod(self.shape)

    def check(self) -> int:
        """`nbytes`. ProtocolError unless the dtype is known and the shape is one that a tensor can have."""
        extent = _dtype_of(self.dtype).itemsize
        if len(self.shape) > MAX_DIMENSIONS:
            raise ProtocolError(f"{len(self.shape)} dimensions; at most {MAX_DIMENSIONS} are allowed")
        for size in self.shape:
            if size < 0:
                raise ProtocolError(f"a dimension of {size} elements")
            # A zero must not hide a product that overflows in the strides numpy and torch compute.
            extent *= size or 1
        if extent > MAX_BYTES:
            raise ProtocolError(f"a shape of more than {MAX_BYTES} bytes")
        return 0 if 0 in self.shape else extent


class Window:
    """Memory at an address, for `np.asarray`, whose result keeps this object and so `owner` alive.

    That this is no ndarray is the point: numpy replaces an ndarray base by that one's own base, so that an
    object in between, on which somebody may have put a finalizer, dies early.
    """

    __slots__ = ("__array_interface__", "owner")

    def __init__(
        self, address: int, shape: tuple[int, ...], typestr: str, *, owner: object, read_only: bool = True
    ) -> None:
        self.__array_interface__ = {
            "version": 3,
            "data": (address, read_only),
            "shape": shape,
            "typestr": typestr,
        }
        self.owner = owner


def _accept_read_only_arrays() -> None:
    # torch has no read-only tensors and says so once for each process, at the first array that is. Here,
    # at import, no other thread is likely to meet the filters of `warnings` half changed.
    array = np.zeros(1, np.uint8)
    array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        torch.from_numpy(array)


_accept_read_only_arrays()


def view(buffer: Bytes, spec: TensorSpec) -> Tensor:
    """The tensor whose bytes are `buffer`, uint8 [spec.nbytes], without a copy.

    The result and all that derives from it (slices, `Parameter`, dlpack capsules, storages) keep `buffer`
    itself alive, so a `weakref.finalize` on it fires after the last of them. Over a read-only buffer numpy
    refuses writes; torch cannot: writing to such a tensor, or through its `.numpy()`, ends the process
    with SIGSEGV where the memory is mapped read-only. A buffer that is not aligned for its dtype is copied.
    ProtocolError: a spec that fails `check`, a buffer of another length.
    """
    nbytes = spec.check()
    if buffer.size != nbytes:
        raise ProtocolError(f"{buffer.size} bytes for a tensor of {nbytes} bytes")
    tensor = shaped(buffer, spec)
    return tensor if is_aligned(tensor) else shaped(buffer.copy(), spec)


def shaped(buffer: Bytes, spec: TensorSpec) -> Tensor:
    """`view` of a buffer and a spec that fit each other, aligned or not."""
    dtype = _dtype_of(spec.dtype)
    # numpy would put the base of the base in the place of an array in between.
    owned = not isinstance(buffer.base, np.ndarray)
    if isinstance(dtype, torch.dtype):
        if owned and buffer.size and dtype in _NUMPY_TWINS:  # one call of torch, which are slow when cold
            return torch.from_numpy(np.ndarray(spec.shape, _NUMPY_TWINS[dtype], buffer=buffer))
        flat = torch.from_numpy(buffer)
        # numpy gives no bytes a stride of 0, over which torch refuses another dtype.
        flat = flat if flat.numel() else flat.as_strided((0,), (1,))
        return flat.view(dtype).view(spec.shape)
    if owned:
        return np.ndarray(spec.shape, dtype, buffer=buffer)
    read_only = not buffer.flags.writeable
    return np.asarray(Window(buffer.ctypes.data, spec.shape, spec.dtype, owner=buffer, read_only=read_only))


def shaped_on_device(flat: torch.Tensor, spec: TensorSpec) -> Tensor:
    """The tensor whose bytes are `flat`, uint8 [spec.nbytes] on any device; as an array, where it is one."""
    dtype = _dtype_of(spec.dtype)
    if isinstance(dtype, torch.dtype):
        return flat.view(dtype).view(spec.shape) if flat.numel() else flat.new_empty(spec.shape, dtype=dtype)
    return shaped(flat.cpu().numpy(), spec)


def is_aligned(tensor: Tensor) -> bool:
    """Whether the address suits the dtype; torch's kernels may fault on one that does not."""
    if isinstance(tensor, np.ndarray):
        return tensor.flags.aligned
    return tensor.data_ptr() % tensor.itemsize == 0
