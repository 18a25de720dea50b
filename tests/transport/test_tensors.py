"""Tensors to bytes and back: every dtype and layout, lifetimes of views, pieces, threads, refusals."""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from transport.errors import ProtocolError
from transport.tensors import Bytes, Source, TensorSpec, concat, source_of, stack, view

TORCH_DTYPES = [
    torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32,
    torch.int64, torch.float16, torch.float32, torch.float64, torch.bfloat16, torch.float8_e4m3fn,
    torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz, torch.float8_e8m0fnu,
    torch.float4_e2m1fn_x2, torch.complex32, torch.complex64, torch.complex128,
]  # fmt: skip
NUMPY_DTYPES = [
    "|b1", "|i1", "|u1", "<i2", ">i2", "<u4", ">u8", "<f2", "<f4", ">f4", "<f8", "<f16", "<c8", ">c16",
    "<c32", "<U7", ">U2", "|S5", "<M8", "<M8[ns]", ">m8[25s]",
]  # fmt: skip


def torch_sample(dtype: torch.dtype, shape: tuple[int, ...] = (4, 3, 6)) -> torch.Tensor:
    count = int(np.prod(shape))
    if not count:
        return torch.empty(0, dtype=torch.uint8).view(dtype).view(shape)
    raw = np.random.default_rng(count).integers(0, 256, count * dtype.itemsize, np.uint8)
    if dtype is torch.bool:
        raw &= 1
    return torch.from_numpy(raw).view(dtype).view(shape)


def numpy_sample(dtype: str, shape: tuple[int, ...] = (4, 3, 6)) -> np.ndarray[Any, Any]:
    found = np.dtype(dtype)
    count = int(np.prod(shape))
    high = {"b": 2, "U": 1}.get(found.kind, 256)
    raw = np.random.default_rng(count).integers(0, high, count * found.itemsize, np.uint8)
    return np.ndarray(shape, found, buffer=raw)


def required(obj: object) -> Source:
    source = source_of(obj)
    assert source is not None
    return source


def filled(obj: object, **options: Any) -> Bytes:
    source = required(obj)
    destination = np.full(source.nbytes, 0xA5, np.uint8)
    source.fill(destination, **options)
    return destination


def bits(tensor: Any) -> bytes:
    """The C-order bytes of a tensor by the library's own means, and not by ours."""
    if isinstance(tensor, np.ndarray):
        return tensor.tobytes()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "ComplexHalf support is experimental")
        plain: torch.Tensor = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return bytes(plain.reshape(-1).view(torch.uint8).numpy())


def assert_same(tensor: Any, arrived: Any) -> None:
    assert type(arrived) in (torch.Tensor, np.ndarray)
    assert isinstance(arrived, torch.Tensor) == isinstance(tensor, torch.Tensor)
    assert arrived.dtype == tensor.dtype
    assert tuple(arrived.shape) == tuple(tensor.shape)
    assert bits(arrived) == bits(tensor)


def assert_travels(tensor: Any) -> None:
    source = required(tensor)
    wire = msgspec.msgpack.decode(msgspec.msgpack.encode(source.spec), type=TensorSpec)
    wire.check()
    assert wire.nbytes == source.nbytes == len(bits(tensor))
    assert_same(tensor, view(filled(tensor), wire))


LAYOUTS: dict[str, Callable[[Any], Any]] = {
    "plain": lambda t: t,
    "transposed": lambda t: t.swapaxes(0, 2),
    "sliced": lambda t: t[1:, :, ::2],
    "inner": lambda t: t[2],
    "single": lambda t: t[1, 2, 3:4].reshape(()),
    "empty": lambda t: t[:0],
    "empty inside": lambda t: t[:, :, 6:],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TORCH_DTYPES, ids=str)
def test_torch_dtypes_and_layouts(dtype: torch.dtype, layout: str) -> None:
    assert_travels(LAYOUTS[layout](torch_sample(dtype)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
def test_numpy_dtypes_and_layouts(dtype: str, layout: str) -> None:
    assert_travels(LAYOUTS[layout](numpy_sample(dtype)))


def test_no_torch_dtype_is_forgotten() -> None:
    known = {d for d in vars(torch).values() if isinstance(d, torch.dtype)}
    missing = [str(d) for d in known - set(TORCH_DTYPES)]
    allowed = ("torch.q", "torch.bits", "torch.int", "torch.uint")
    assert all(name.startswith(allowed) for name in missing), missing


def test_special_layouts() -> None:
    z = torch_sample(torch.complex64)
    assert_travels(z.conj())
    assert_travels(z.conj().swapaxes(0, 1)[1:])
    assert z.conj().imag.is_neg()
    assert_travels(z.conj().imag)
    base = torch.arange(12.0).view(3, 4)
    assert_travels(base.requires_grad_())
    assert_travels((base * 2).t())
    assert_travels(torch.nn.Parameter(base.detach()))
    assert_travels(base.detach()[:, 1:2].expand(3, 5))
    assert_travels(np.arange(24).reshape(2, 3, 4)[::-1, :, ::-2])
    assert_travels(np.broadcast_to(np.arange(3.0), (4, 3)))
    assert_travels(np.asfortranarray(np.arange(24.0).reshape(4, 6)))
    with torch.inference_mode():
        made = torch.arange(6.0).view(2, 3)
    assert_travels(made.t())


def test_subclass_with_nothing_but_memory_arrives_plain() -> None:
    class Marked(torch.Tensor):
        pass

    tensor = torch.arange(6.0).view(2, 3).as_subclass(Marked)
    assert_same(torch.arange(6.0).view(2, 3), view(filled(tensor), required(tensor).spec))
    assert_same(torch.arange(6.0).view(2, 3).t(), view(filled(tensor.t()), required(tensor.t()).spec))


def test_only_the_bytes_of_a_view_travel() -> None:
    storage = torch.zeros(1000)
    assert required(storage[10:20]).nbytes == 40
    assert required(torch.zeros(1).expand(7)).nbytes == 28


def test_memmap(tmp_path: Any) -> None:
    array = np.memmap(tmp_path / "array", np.int16, "w+", shape=(4, 5))
    array[:] = np.arange(20).reshape(4, 5)
    assert_same(np.asarray(array), view(filled(array), required(array).spec))
    assert_same(np.asarray(array.T), view(filled(array.T), required(array.T).spec))


def test_address_tells_a_loan() -> None:
    block = np.zeros(64, np.uint8)
    start = block.ctypes.data
    tensor = view(block[16:48], TensorSpec("torch.float32", (2, 4)))
    assert required(tensor).address == start + 16
    assert required(tensor[1:]).address == start + 32
    assert required(block[5:]).address == start + 5
    others = [
        tensor.T,
        np.arange(4)[::-1],
        torch.zeros(3, dtype=torch.complex64).conj(),
        torch.zeros(0),
        None,
    ]
    assert [required(t).address for t in others[:-1]] == [None] * 4
    assert source_of(None) is source_of([tensor]) is source_of(1.5) is None


# --------------------------------------------------------------------------------------------- refusals


def _structured() -> Any:
    return np.zeros(2, [("a", "i4")])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: torch.eye(3).to_sparse(), "sparse tensor; call .to_dense() first"),
        (lambda: torch.eye(3).to_sparse_csr(), "sparse tensor; call .to_dense() first"),
        (lambda: torch.quantize_per_tensor(torch.zeros(2), 1.0, 0, torch.quint8), "quantized tensor"),
        (lambda: torch.empty(2, device="meta"), "meta tensor"),
        (lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]), "nested tensor"),
        (
            lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged),
            "nested tensor",
        ),
        (lambda: torch.empty(2, dtype=vars(torch)["uint4"]), "dtype torch.uint4"),
        (lambda: torch.empty(2, dtype=vars(torch)["int1"]), "dtype torch.int1"),
        (lambda: torch.empty(2, dtype=torch.bits8), "dtype torch.bits8"),
        (torch.nn.UninitializedParameter, "UninitializedParameter; run the lazy module once"),
        (lambda: torch.empty((1,) * 65), "65 dimensions"),
        (lambda: np.array([object()]), "dtype object; send a list"),
        (lambda: np.array(["a"], np.dtypes.StringDType()), "StringDType"),
        (_structured, "send a dict of its fields"),
        (lambda: np.zeros(2, "V8"), "view it as a numpy dtype"),
        (lambda: np.ma.masked_array([1, 2], [True, False]), "MaskedArray"),
    ],
)
def test_refused_with_advice(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(TypeError) as caught:
        source_of(make())
    assert words in str(caught.value)


def test_refused_inside_vmap() -> None:
    with pytest.raises(TypeError, match="vmap"):
        torch.vmap(lambda t: required(t).tensor)(torch.zeros(2, 2))


def test_refused_when_memory_is_not_the_data() -> None:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        fake = torch.zeros(3)
    with pytest.raises(TypeError, match="FakeTensor"):
        source_of(fake)


@pytest.mark.parametrize(
    "spec",
    [
        TensorSpec("torch.float33", ()), TensorSpec("torch.nn", ()), TensorSpec("torch.quint8", ()),
        TensorSpec("torch.int4", ()), TensorSpec("|O", ()), TensorSpec("O", ()), TensorSpec("f4", ()),
        TensorSpec("float32", ()), TensorSpec("i4,i4", ()), TensorSpec("<i4\n", ()),
        TensorSpec("(2,)<i4", ()),
        TensorSpec("<M8[foo]", ()), TensorSpec("<M8[0s]", ()), TensorSpec("<U0", ()), TensorSpec("|V8", ()),
        TensorSpec("<U999999999", ()), TensorSpec("<U\u0663", ()), TensorSpec("", ()),
        TensorSpec("torch.int8", (-1,)),
        TensorSpec("torch.int8", (-2, -2)), TensorSpec("|u1", (1,) * 65), TensorSpec("<f4", (1 << 62,)),
        TensorSpec("<f4", (0, 1 << 62, 1 << 62)), TensorSpec("torch.int8", (1 << 32, 1 << 31)),
    ],
)  # fmt: skip
def test_hostile_spec(spec: TensorSpec) -> None:
    with pytest.raises(ProtocolError):
        spec.check()
    with pytest.raises(ProtocolError):
        view(np.zeros(4, np.uint8), spec)


def test_error_about_a_dtype_stays_short_and_printable() -> None:
    with pytest.raises(ProtocolError) as caught:
        TensorSpec("\x1b[31m" * 10_000, ()).check()
    assert len(str(caught.value)) < 250
    assert str(caught.value).isprintable()


def test_nbytes_is_exact_beyond_machine_words() -> None:
    assert TensorSpec("torch.float64", (1 << 62, 1 << 62)).nbytes == 1 << 127


@given(st.text(max_size=12), st.lists(st.integers(-3, 1 << 63), max_size=4))
def test_any_spec_is_refused_or_sound(dtype: str, shape: list[int]) -> None:
    spec = TensorSpec(dtype, tuple(shape))
    try:
        spec.check()
    except ProtocolError:
        return
    assert 0 <= spec.nbytes <= 1 << 62


@pytest.mark.parametrize("length", [0, 15, 17])
def test_buffer_of_another_length(length: int) -> None:
    with pytest.raises(ProtocolError, match=f"{length} bytes for a tensor of 16"):
        view(np.zeros(length, np.uint8), TensorSpec("torch.float32", (4,)))


# ------------------------------------------------------------------------------------------------- views

HOLDERS: dict[str, Callable[[Any], Any]] = {
    "itself": lambda t: t,
    "slice": lambda t: t[1:, 1],
    "other view": lambda t: t.reshape(-1)[2:],
}
TORCH_HOLDERS: dict[str, Callable[[torch.Tensor], Any]] = {
    "parameter": torch.nn.Parameter,
    "dlpack": torch.utils.dlpack.from_dlpack,
    "capsule": lambda t: t.__dlpack__(),
    "storage": lambda t: t.untyped_storage(),
    "numpy": lambda t: t.numpy(),
    "detached": lambda t: t[0].detach().view(torch.int32),
}


def make_buffer(kind: str, nbytes: int) -> Bytes:
    """What `view` may get: an array over foreign memory, one that owns its memory, a part of another."""
    if kind == "over bytes":
        return np.frombuffer(bytes(nbytes), np.uint8)
    return np.zeros(nbytes, np.uint8) if kind == "owner" else np.zeros(nbytes + 64, np.uint8)[64:]


@pytest.mark.parametrize("kind", ["over bytes", "owner", "part"])
@pytest.mark.parametrize(
    ("dtype", "holder"),
    [
        *itertools.product(["torch.float32", "<f4", "torch.uint8", "|u1"], HOLDERS.values()),
        *itertools.product(["torch.float32"], TORCH_HOLDERS.values()),
    ],
)
def test_buffer_lives_as_long_as_what_derives_from_it(
    kind: str, dtype: str, holder: Callable[[Any], Any]
) -> None:
    spec = TensorSpec(dtype, (4, 6))
    buffer = make_buffer(kind, spec.nbytes)
    released: list[bool] = []
    weakref.finalize(buffer, released.append, True)
    kept = holder(view(buffer, spec))
    del buffer
    gc.collect()
    assert not released
    del kept
    gc.collect()
    assert released


@pytest.mark.parametrize("dtype", ["torch.float32", "<f4"])
@pytest.mark.parametrize("kind", ["over bytes", "owner", "part"])
def test_buffer_of_no_bytes_lives_as_long_too(kind: str, dtype: str) -> None:
    buffer = make_buffer(kind, 0)
    reference = weakref.ref(buffer)
    tensor = view(buffer, TensorSpec(dtype, (3, 0, 2)))
    del buffer
    gc.collect()
    assert reference() is not None
    del tensor
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize("part", [False, True])
@pytest.mark.parametrize("dtype", ["torch.float32", "<f4", ">i2", "<U3", "<M8[ns]"])
def test_view_shares_memory(dtype: str, part: bool) -> None:
    block = np.zeros(256, np.uint8)
    spec = TensorSpec(dtype, (2, 3))
    buffer = block[64 : 64 + spec.nbytes] if part else np.zeros(spec.nbytes, np.uint8)
    tensor = view(buffer, spec)
    before = bits(tensor)
    buffer[:] = 1
    assert bits(tensor) == b"\1" * spec.nbytes != before
    assert required(tensor).address == buffer.ctypes.data


@pytest.mark.parametrize("part", [False, True])
def test_read_only_stays_read_only_in_numpy_and_silent_in_torch(part: bool) -> None:
    buffer = np.zeros(64, np.uint8)
    buffer = buffer[32:] if part else buffer
    buffer.flags.writeable = False
    array = view(buffer, TensorSpec("<f4", (buffer.size // 4,)))
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert view(buffer, TensorSpec("torch.float32", (buffer.size // 4,))).sum() == 0


@pytest.mark.parametrize("dtype", ["torch.float64", "torch.complex128", "torch.bfloat16", "<f8", "<U3"])
def test_misaligned_buffer_is_copied(dtype: str) -> None:
    spec = TensorSpec(dtype, (3,))
    block = np.zeros(spec.nbytes + 1, np.uint8)
    tensor = view(block[1:], spec)
    block[:] = 1
    assert bits(tensor) == bytes(spec.nbytes)


def test_wide_strings_are_aligned_by_their_characters() -> None:
    block = np.zeros(64 + 28 * 2, np.uint8)
    tensor = view(block[64:], TensorSpec("<U7", (2,)))
    assert required(tensor).address == block.ctypes.data + 64


# -------------------------------------------------------------------------------- pieces, threads, ranges

MIB = 1 << 20
BIG: dict[str, Callable[[], Any]] = {
    "torch": lambda: torch.arange(9 * MIB // 2, dtype=torch.int32),
    "torch strided": lambda: torch.arange(9 * MIB // 2, dtype=torch.int32).view(3, -1, 4).transpose(0, 2),
    "one long row": lambda: torch.arange(18 * MIB // 4, dtype=torch.int32).view(-1, 2).t()[:1].expand(2, -1),
    "bool strided": lambda: (torch.arange(18 * MIB) % 3 == 0).view(-1, 2).t(),
    "numpy": lambda: np.arange(9 * MIB // 2, dtype=np.int32),
    "numpy reversed": lambda: np.arange(9 * MIB // 2, dtype=np.int32)[::-1],
    "conjugate": lambda: torch.arange(3 * MIB).to(torch.complex64).view(3, -1).conj(),
}


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", BIG)
def test_large_tensors_in_pieces(name: str, threads: int) -> None:
    tensor = BIG[name]()
    seen: list[int] = []
    expected = bits(tensor)
    source = required(tensor)
    destination = np.zeros(source.nbytes, np.uint8)

    def progress(complete: int) -> None:
        assert bytes(destination[:complete][-4096:]) == expected[:complete][-4096:]
        seen.append(complete)

    source.fill(destination, threads=threads, progress=progress)
    assert bytes(destination) == expected
    assert seen[-1] == source.nbytes
    steps = [after - before for before, after in itertools.pairwise([0, *seen])]
    assert all(0 < step <= 16 * MIB for step in steps)
    assert len(steps) > 1
    seen.clear()
    source.fill(destination, threads=threads, progress=progress, step=MIB)
    steps = [after - before for before, after in itertools.pairwise([0, *seen])]
    assert all(0 < step <= MIB for step in steps)
    assert bytes(destination) == expected
    assert bytes(filled(tensor, threads=threads)) == expected


@pytest.mark.parametrize("shape", [(), (0, 4), (5,)])
def test_progress_of_small_tensors_is_reported_once(shape: tuple[int, ...]) -> None:
    seen: list[int] = []
    filled(torch.zeros(shape), progress=seen.append)
    assert seen == [4 * int(np.prod(shape))]


def test_no_thread_writes_after_an_error() -> None:
    source = required(torch.ones(32 * MIB, dtype=torch.uint8))
    destination = np.zeros(source.nbytes, np.uint8)

    def progress(complete: int) -> None:
        raise KeyError(complete)

    for _ in range(5):
        with pytest.raises(KeyError):
            source.fill(destination, threads=4, progress=progress)
        destination[:] = 0
        assert not destination.any()


def test_several_threads_fill_at_once() -> None:
    tensors = [torch.full((3 * MIB,), n, dtype=torch.uint8) for n in range(4)]
    results: dict[int, Bytes] = {}
    workers = [
        threading.Thread(target=lambda n=n: results.update({n: filled(tensors[n], threads=2)}))
        for n in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert all((results[n] == n).all() for n in range(4))


def _fill_and_exit() -> None:
    ok = bool((filled(np.ones(4 * MIB, np.uint8), threads=2) == 1).all())
    os._exit(0 if ok else 1)


def test_forked_child_has_threads_of_its_own() -> None:
    filled(np.ones(4 * MIB, np.uint8), threads=2)  # so that the parent has the pool that a child inherits
    child = multiprocessing.get_context("fork").Process(target=_fill_and_exit)
    child.start()
    try:
        child.join(60)
        assert child.exitcode == 0
    finally:
        child.kill()
        child.join(60)
        child.close()


def test_misaligned_destination() -> None:
    for tensor in (torch_sample(torch.complex128), torch_sample(torch.complex128).conj().swapaxes(0, 2)):
        source = required(tensor)
        block = np.zeros(source.nbytes + 1, np.uint8)
        seen: list[int] = []
        source.fill(block[1:], progress=seen.append)
        assert bytes(block[1:]) == bits(tensor)
        assert seen == [source.nbytes]


@pytest.mark.parametrize(
    "destination",
    [
        np.zeros(15, np.uint8),
        np.zeros(17, np.uint8),
        np.zeros((4, 4), np.uint8),
        np.zeros(32, np.uint8)[::2],
        np.zeros(4, np.float32),
        np.frombuffer(bytes(16), np.uint8),
    ],
)
def test_destination_of_another_form(destination: Any) -> None:
    with pytest.raises(ValueError, match="the destination"):
        required(torch.zeros(4)).fill(destination)


RANGED: dict[str, Callable[[], Any]] = {
    "flat": lambda: torch.arange(MIB, dtype=torch.int32),
    "strided": lambda: torch.arange(MIB, dtype=torch.int32).view(2, 512, 1024).transpose(0, 2),
    "reversed": lambda: np.arange(MIB, dtype=np.int32)[::-1],
    "stacked": lambda: stack([torch.arange(MIB // 4), torch.arange(MIB // 4)], 1),
    "single": lambda: torch.tensor(1 + 2j).conj(),
}


@pytest.mark.parametrize("step", [1 << 20, (1 << 20) + 3, 777_777])
@pytest.mark.parametrize("name", RANGED)
def test_ranges_add_up(name: str, step: int) -> None:
    made = RANGED[name]()
    source, whole = required(made), filled(made)
    parts = [(start, min(start + step, source.nbytes)) for start in range(0, source.nbytes, step)]
    for order in (parts, parts[::-1]):
        result = np.zeros(source.nbytes, np.uint8)
        for start, stop in order:
            source.fill_range(result[start:stop], start, stop)
        assert np.array_equal(result, whole)
    source.fill_range(np.empty(0, np.uint8), source.nbytes, source.nbytes)
    for start, stop in [(-1, 0), (2, 1), (0, source.nbytes + 1)]:
        with pytest.raises(ValueError, match="bytes"):
            source.fill_range(np.empty(max(stop - start, 0), np.uint8), start, stop)


# ------------------------------------------------------------------------------------- stack and concat

PARTS: dict[str, Callable[[int], Any]] = {
    "torch": lambda n: torch_sample(torch.bfloat16, (2, 3, 4)) if n else torch.zeros(2, 3, 4).bfloat16(),
    "torch strided": lambda n: torch.arange(24.0).view(4, 3, 2).transpose(0, 2) + n,
    "conjugate": lambda n: (torch.arange(24).view(2, 3, 4) * (1 + 2j) + n).conj(),
    "numpy": lambda n: np.arange(24, dtype=">i4").reshape(2, 3, 4) + n,
    "numpy reversed": lambda n: np.arange(24.0).reshape(2, 3, 4)[::-1, :, ::-1] + n,
}


@pytest.mark.parametrize("dim", range(-4, 4))
@pytest.mark.parametrize("name", PARTS)
def test_stack_is_what_the_library_makes(name: str, dim: int) -> None:
    parts = [PARTS[name](n) for n in range(3)]
    numpy = isinstance(parts[0], np.ndarray)
    expected = np.stack(parts, dim).astype(parts[0].dtype) if numpy else torch.stack(parts, dim)
    made = stack(parts, dim)
    assert made.spec == required(expected).spec
    assert_same(expected, view(filled(made), made.spec))


@pytest.mark.parametrize("dim", range(-3, 3))
@pytest.mark.parametrize("name", PARTS)
def test_concat_is_what_the_library_makes(name: str, dim: int) -> None:
    whole = [PARTS[name](n) for n in range(3)]
    axis = dim % 3
    parts = [whole[0], whole[1][(slice(None),) * axis + (slice(1, 2),)], whole[2].swapaxes(0, 0)]
    parts.append(whole[0][(slice(None),) * axis + (slice(0, 0),)])
    numpy = isinstance(parts[0], np.ndarray)
    expected = np.concatenate(parts, dim).astype(parts[0].dtype) if numpy else torch.cat(parts, dim)
    made = concat(parts, dim)
    assert_same(expected, view(filled(made), made.spec))


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("threads", [1, 2])
def test_large_stack_in_pieces(dim: int, threads: int) -> None:
    parts = [torch.arange(3 * MIB, dtype=torch.int32).view(3, -1) + n for n in range(3)]
    seen: list[int] = []
    made = stack(parts, dim)
    assert bytes(filled(made, threads=threads, progress=seen.append)) == bits(torch.stack(parts, dim))
    assert seen == sorted(seen)
    assert seen[-1] == 36 * MIB
    assert len(seen) > 2


def test_a_batch_is_read_when_it_is_filled_and_can_be_sent_again() -> None:
    part = np.zeros(MIB, np.uint8)
    made = stack([part, part], 1)
    source = required(made)
    part[:] = 7
    assert (filled(made) == 7).all()
    source.fill_range(np.empty(10, np.uint8), 5, 15)
    part[:] = 9
    assert (filled(made) == 9).all()
    again, second = required(made), np.empty(10, np.uint8)
    again.fill_range(second, 5, 15)
    assert (second == 9).all()


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: stack([]), ValueError, "stack: no tensors; at least one is needed"),
        (
            lambda: stack([torch.zeros(2), torch.zeros(2), torch.zeros(3)]),
            ValueError,
            "stack: tensor 2 has shape (3,), tensor 0 has shape (2,)",
        ),
        (
            lambda: stack([torch.zeros(2), torch.zeros(2).int()]),
            TypeError,
            "stack: tensor 1 has dtype torch.int32, tensor 0 has dtype torch.float32",
        ),
        (
            lambda: concat([np.zeros(2, "f4"), torch.zeros(2)]),
            TypeError,
            "concat: tensor 1 has dtype torch.float32, tensor 0 has dtype <f4",
        ),
        (
            lambda: concat([torch.zeros(2, 3), torch.zeros(2, 4)]),
            ValueError,
            "concat: tensor 1 has shape (2, 4), tensor 0 has shape (2, 3)",
        ),
        (
            lambda: concat([torch.zeros(2), torch.zeros(2, 2)], 0),
            ValueError,
            "concat: tensor 1 has shape (2, 2)",
        ),
        (lambda: concat([torch.zeros(())]), ValueError, "concat: tensor 0 has no dimension; use stack"),
        (lambda: stack([torch.zeros(2)], 2), ValueError, "stack: dim 2 is not between -2 and 1"),
        (lambda: concat([torch.zeros(2)], -2), ValueError, "concat: dim -2 is not between -1 and 0"),
        (lambda: stack([torch.zeros(2), [1.0, 2.0]]), TypeError, "stack: tensor 1: expected a torch tensor"),  # type: ignore[list-item]  # that is the test
        (
            lambda: stack([torch.eye(2).to_sparse()]),
            TypeError,
            "stack: tensor 0: cannot send a sparse tensor",
        ),
        (lambda: stack([stack([torch.zeros(2)])]), TypeError, "stack: tensor 0 is a Stacked"),  # type: ignore[list-item]  # that is the test
    ],
)
def test_what_cannot_be_combined(make: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error) as caught:
        make()
    assert str(caught.value).startswith(words)


@pytest.mark.gpu
def test_cuda_tensors_go_through_the_host() -> None:
    for tensor in (torch.arange(24.0, device="cuda").view(4, 6), torch.ones(3, device="cuda") * (1 + 2j)):
        for made in (tensor, tensor.mT if tensor.dim() > 1 else tensor.conj()):
            assert required(made).address is None
            arrived = view(filled(made), required(made).spec)
            assert isinstance(arrived, torch.Tensor)
            assert torch.equal(arrived, made.cpu().resolve_conj())
    batch = [torch.arange(6 * MIB, device="cuda") + n for n in range(2)]
    seen: list[int] = []
    for dim in (0, 1):
        assert bytes(filled(stack(batch, dim), threads=2, progress=seen.append)) == bits(
            torch.stack(batch, dim).cpu()
        )
