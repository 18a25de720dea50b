"""Bodies to bytes and back: round trips, the paths in errors, typed decoding, hostile bytes."""

from __future__ import annotations

import dataclasses
import datetime as dt
import sys
import threading
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.transport.test_tensors import NUMPY_DTYPES, TORCH_DTYPES, assert_same, numpy_sample, torch_sample
from transport.codec import EXT_TENSOR, Encoded, decode, encode
from transport.errors import ProtocolError
from transport.tensors import Source, concat, stack, view


def arrive(source: Source) -> Any:
    memory = bytearray(source.nbytes)
    destination = np.frombuffer(memory, np.uint8)
    source.fill(destination)
    return view(destination, source.spec)


def travel(body: object, type: Any = Any) -> Any:
    encoded = encode(body)
    return decode(encoded.body, [arrive(source) for source in encoded.sources], type)


def assert_equal(sent: Any, arrived: Any) -> None:
    """The same, where tuples arrive as lists."""
    if isinstance(sent, torch.Tensor | np.ndarray):
        assert_same(sent, arrived)
    elif isinstance(sent, dict):
        assert list(sent) == list(arrived)
        for key in sent:
            assert_equal(sent[key], arrived[key])
    elif isinstance(sent, list | tuple):
        assert type(arrived) is list
        assert len(sent) == len(arrived)
        for ours, theirs in zip(sent, arrived, strict=True):
            assert_equal(ours, theirs)
    else:
        assert type(arrived) is type(sent)
        assert arrived == sent


def laid_out(tensor: Any, layout: str) -> Any:
    if layout == "reversed" and isinstance(tensor, np.ndarray):
        return tensor[::-1]
    if layout == "conjugate" and isinstance(tensor, torch.Tensor) and tensor.is_complex():
        return tensor.conj()
    return tensor.swapaxes(0, -1) if layout == "transposed" and tensor.ndim else tensor


shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)
tensors = st.builds(
    laid_out,
    st.builds(torch_sample, st.sampled_from(TORCH_DTYPES), shapes)
    | st.builds(numpy_sample, st.sampled_from(NUMPY_DTYPES), shapes.filter(bool)),
    st.sampled_from(["plain", "reversed", "conjugate", "transposed"]),
)
plain = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
)
bodies = st.recursive(
    plain | tensors,
    lambda inner: st.lists(inner, max_size=4) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
    max_leaves=12,
)


@given(bodies)
def test_any_body_arrives_as_it_was(body: Any) -> None:
    assert_equal(body, travel(body))


def test_multimodal_keyword_arguments_as_vllm_builds_them() -> None:
    assert_equal(
        kwargs := {
            "pixel_values": torch.rand(59 * 4, 1176).bfloat16(),
            "image_grid_thw": torch.tensor([[1, 59, 4]]),
            "second_per_grid_ts": [1.0],
            "images": [torch.rand(3, 8, 8), torch.rand(3, 6, 9)],
            "patches": [[torch.rand(2, 2), torch.rand(3, 2)], [torch.rand(1, 2)]],
            "num_crops": np.array([2, 1]),
            "use_audio_in_video": False,
            "nothing": None,
            "empty": [],
        },
        travel(kwargs),
    )


def test_the_same_object_is_one_source() -> None:
    tensor, array = torch.zeros(3), np.zeros(3)
    batch = stack([tensor, tensor])
    encoded = encode({"a": tensor, "b": [array, tensor, array], "c": tensor[:], "d": (batch, batch)})
    assert encoded.sources[0].tensor is tensor
    assert encoded.sources[1].tensor is array
    assert len(encoded.sources) == 4
    arrived = decode(encoded.body, ["t", "a", "slice", "batch"])
    assert arrived == {"a": "t", "b": ["a", "t", "a"], "c": "slice", "d": ["batch", "batch"]}


def test_batches_arrive_as_one_tensor() -> None:
    parts = [torch.arange(6.0).view(2, 3) + n for n in range(3)]
    arrived = travel({"s": stack(parts, 1), "c": [concat(parts)], "n": stack([np.arange(3)] * 2)})
    assert_same(torch.stack(parts, 1), arrived["s"])
    assert_same(torch.cat(parts), arrived["c"][0])
    assert_same(np.stack([np.arange(3)] * 2), arrived["n"])


def test_encoding_reads_no_tensor() -> None:
    tensor = torch.zeros(4)
    encoded = encode([tensor])
    tensor += 1
    assert torch.equal(arrive(encoded.sources[0]), torch.ones(4))
    assert len(encoded.body) < 20


def test_numpy_scalars_become_python_scalars() -> None:
    sent = [np.float32(1.5), np.int64(-3), np.bool_(True), np.str_("s"), np.bytes_(b"b"), np.float64(2.5)]
    assert_equal([1.5, -3, True, "s", b"b", 2.5], travel(sent))
    assert travel({np.int64(1): 2}) == {1: 2}
    moment = travel(np.datetime64("2024-05-06T07:08:09", "s"), dt.datetime)
    assert moment == dt.datetime(2024, 5, 6, 7, 8, 9)  # noqa: DTZ001  # numpy's have no time zone


def test_moments_with_a_time_zone_keep_it_untyped() -> None:
    moment = dt.datetime(2024, 5, 6, tzinfo=dt.UTC)
    assert travel([moment]) == [moment]


# ------------------------------------------------------------------------------------------------- typed


class Mask(msgspec.Struct):
    mask: Any = None


class Images(msgspec.Struct, tag=True):
    images: list[Any]


class Request(msgspec.Struct):
    pixels: torch.Tensor
    name: str
    crops: list[torch.Tensor] = []
    grid: np.ndarray[Any, Any] | None = None
    when: dt.datetime | None = None


@dataclasses.dataclass
class Reply:
    embedding: torch.Tensor
    per_layer: dict[str, torch.Tensor]
    pair: tuple[np.ndarray[Any, Any], torch.Tensor | None]


class Pair(NamedTuple):
    left: Any
    right: Any


def test_typed_struct() -> None:
    moment = dt.datetime(2024, 5, 6, tzinfo=dt.UTC)
    sent = Request(torch.rand(2, 3), "r", [torch.rand(2), torch.rand(0)], np.arange(3), moment)
    arrived = travel(sent, Request)
    assert type(arrived) is Request
    for name in Request.__struct_fields__:
        assert_equal(getattr(sent, name), getattr(arrived, name))
    assert travel(Request(torch.rand(1), "r"), Request).grid is None


def test_typed_dataclass() -> None:
    sent = Reply(torch.rand(4), {"0": torch.rand(1)}, (np.arange(2), None))
    arrived = travel(sent, Reply)
    assert type(arrived) is Reply
    assert_same(sent.embedding, arrived.embedding)
    assert_same(sent.per_layer["0"], arrived.per_layer["0"])
    assert type(arrived.pair) is tuple


@pytest.mark.parametrize(
    ("body", "type_", "words"),
    [
        (
            {"pixels": np.zeros(2), "name": "r"},
            Request,
            "Expected `Tensor`, got `numpy.ndarray` - at `$.pixels`",
        ),
        ({"pixels": [1.0], "name": "r"}, Request, "Expected `Tensor`, got `list` - at `$.pixels`"),
        ({"pixels": torch.zeros(2)}, Request, "Object missing required field `name`"),
        (
            {"pixels": torch.zeros(2), "name": "r", "crops": [torch.zeros(1), np.zeros(1)]},
            Request,
            "at `$.crops[1]`",
        ),
        ([1, "x"], list[int], "Expected `int`, got `str` - at `$[1]`"),
        (torch.zeros(1), int, "Expected `int`, got `ext`"),
    ],
)
def test_type_mismatch(body: object, type_: Any, words: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        travel(body, type_)
    assert words in str(caught.value)


class Strict(msgspec.Struct, forbid_unknown_fields=True):
    kind: msgspec.Raw | None = None


class Refuses(msgspec.Struct):
    secret: str

    def __post_init__(self) -> None:
        if self.secret == "key":
            raise KeyError(self.secret)
        raise ValueError(f"secret {self.secret}")


@pytest.mark.parametrize(
    ("body", "type_"),
    [
        ({"s3cr3t": 1}, Strict),
        ({"s3cr3t - at `$.kind`": 1}, Strict),
        ({"type": "s3cr3t"}, Images),
        ({"secret": "s3cr3t"}, Refuses),
        ({"secret": "key"}, Refuses),
        (["s3cr3t"], list[dt.datetime]),
        ({"s3cr3t": "x"}, dict[str, int]),
        (["s3cr3t"], list[Annotated[str, msgspec.Meta(pattern="^a$")]]),
    ],
)
def test_errors_about_what_arrived_do_not_quote_it(body: object, type_: Any) -> None:
    with pytest.raises(ProtocolError) as caught:
        travel(body, type_)
    assert "s3cr3t" not in str(caught.value)
    assert "'key'" not in str(caught.value)


def test_a_type_that_cannot_be_decoded_is_the_callers_mistake() -> None:
    with pytest.raises(TypeError, match="custom type"):
        decode(b"\xc0", [], torch.Tensor | np.ndarray)


def test_a_type_that_cannot_be_hashed() -> None:
    unhashable = Annotated[int, msgspec.Meta(extra_json_schema={"examples": [1]}), ["note"]]
    assert decode(encode(3).body, [], unhashable) == 3


# ------------------------------------------------------------------------------------ what cannot be sent


class Foo:
    pass


def _cycle() -> object:
    inner: list[Any] = [1]
    body = {"a": [0, inner]}
    inner.append(body)
    return body


def _struct_cycle() -> object:
    body = Mask()
    body.mask = [body]
    return body


def _sparse() -> torch.Tensor:
    return torch.eye(2).to_sparse()


@dataclasses.dataclass
class Named:
    names: list[str]


NOT_SENT: list[tuple[Callable[[], object], str, str]] = [
    (
        lambda: Images([Mask(), Mask(), Mask(torch.zeros(1)), Mask(_sparse())]),
        "body.images[3].mask",
        "cannot send a sparse tensor; call .to_dense() first",
    ),
    (lambda: {"meta": [Foo()]}, "body['meta'][0]", "cannot send an object of type Foo"),
    (Foo, "body", "cannot send an object of type Foo"),
    (_sparse, "body", "cannot send a sparse tensor; call .to_dense() first"),
    (
        lambda: {"a": (1, {"b": 2**64})},
        "body['a'][1]['b']",
        "cannot send an int beyond 64 bits; send it as str",
    ),
    (lambda: [-(2**63) - 1], "body[0]", "cannot send an int beyond 64 bits; send it as str"),
    (lambda: 2**64, "body", "cannot send an int beyond 64 bits; send it as str"),
    (lambda: Pair(1, Foo), "body[1]", "cannot send an object of type type"),
    (
        lambda: Named(["a", "\ud800"]),
        "body.names[1]",
        "cannot send a str with lone surrogates, which UTF-8 does not have; send it as bytes",
    ),
    (
        lambda: {"x": {Foo: 1}},
        "body['x']: the key <class 'tests...st_codec.Foo'>",
        "cannot send an object of type type",
    ),
    (
        lambda: {1: {2**70: 1}},
        "body[1]: the key 1180591620717411303424",
        "cannot send an int beyond 64 bits; send it as str",
    ),
    (_cycle, "body['a'][1][1]", "the body contains itself here"),
    (_struct_cycle, "body.mask[0]", "the body contains itself here"),
    (
        lambda: [1j],
        "body[0]",
        "cannot send a complex number; send it as a tensor, such as torch.tensor(value)",
    ),
    (
        lambda: [np.complex64(1j)],
        "body[0]",
        "cannot send a numpy complex64 scalar of dtype complex64; send np.asarray(value)",
    ),
    (
        lambda: [np.longdouble(1)],
        "body[0]",
        f"cannot send a numpy longdouble scalar of dtype {np.dtype('g')}; send np.asarray(value)",
    ),
    (
        lambda: [np.datetime64(1, "ns")],
        "body[0]",
        "cannot send a numpy datetime64 scalar of dtype datetime64[ns]; send np.asarray(value)",
    ),
    (lambda: [torch.float32], "body[0]", "cannot send an object of type dtype"),
    (
        lambda: [np.array([None])],
        "body[0]",
        "cannot send a numpy array of dtype object; "
        "send a list, or convert it to a numeric or fixed-width dtype",
    ),
    (lambda: {"k" * 100: Foo()}, "body['kkkkkkkkkkkk...kkkkkkkkkkkkk']", "cannot send an object of type Foo"),
]


@pytest.mark.parametrize(("make", "path", "reason"), NOT_SENT)
def test_what_cannot_be_sent_is_named_with_its_path(
    make: Callable[[], object], path: str, reason: str
) -> None:
    with pytest.raises(TypeError) as caught:
        encode(make())
    assert str(caught.value) == f"{path}: {reason}"


def nested(levels: int) -> object:
    body: object = 1
    for _ in range(levels):
        body = [body]
    return body


def test_too_deep_a_body() -> None:
    with pytest.raises(TypeError, match="body: nested 20000 levels deep"):
        encode(nested(20_000))


def test_a_fault_far_down_has_a_short_path() -> None:
    body: object = Foo()
    for _ in range(300):
        body = [body]
    with pytest.raises(TypeError, match="object of type Foo") as caught:
        encode(body)
    assert len(str(caught.value)) < 300


def test_a_shared_fault_among_many_shared_nodes_is_found() -> None:
    node: list[Any] = [1]
    for _ in range(15):
        node = [node, node]
    with pytest.raises(TypeError, match=r"body\[1\]: cannot send"):
        encode([node, Foo()])


def test_unset_fields_are_not_the_fault() -> None:
    class Sparse(msgspec.Struct):
        left: Any = msgspec.UNSET
        right: Any = None

    with pytest.raises(TypeError, match="^body.right: cannot send an object of type Foo$"):
        encode(Sparse(right=Foo()))


# ------------------------------------------------------------------------------------------ hostile bytes


def ext(code: int, data: bytes) -> bytes:
    return msgspec.msgpack.encode(msgspec.msgpack.Ext(code, data))


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (ext(EXT_TENSOR, b"\1\0\0\0"), "tensor 1 of a message with 1"),
        (ext(EXT_TENSOR, b"\xff\xff\xff\xff"), "tensor 4294967295 of a message with 1"),
        (ext(EXT_TENSOR, b"\0"), "a tensor index of 1 bytes instead of 4"),
        (ext(EXT_TENSOR, b""), "a tensor index of 0 bytes"),
        (ext(7, b"\0\0\0\0"), "unknown extension code 7"),
        (b"", "malformed"),
        (b"\xc1", "malformed"),
        (b"\xc0\xc0", "malformed"),
        (b"\xdd\xff\xff\xff\xff", "malformed"),
        (b"\xdf\xff\xff\xff\xff", "malformed"),
        (b"\xc6\xff\xff\xff\xff", "malformed"),
        (b"\xa2\xff\xff", "malformed"),
        (b"\x81\x80\xc0", "malformed"),
        (b"\x91" * 1_000_000, "nested too deeply"),
        (b"\x81\x91" * 500_000, "nested too deeply"),
    ],
)
@pytest.mark.parametrize("as_view", [False, True])
def test_malformed_bodies(body: bytes, words: str, as_view: bool) -> None:
    with pytest.raises(ProtocolError, match=words):
        decode(memoryview(body) if as_view else body, [torch.zeros(1)])


def test_an_array_as_a_dict_key_is_refused() -> None:
    with pytest.raises(ProtocolError):
        decode(b"\x81" + ext(EXT_TENSOR, bytes(4)) + b"\xc0", [np.zeros(2)])


def test_deep_bytes_in_a_thread_with_a_raised_recursion_limit() -> None:
    outcome: list[object] = []

    def work() -> None:
        try:
            decode(b"\x91" * 100_000, [])
        except ProtocolError as error:
            outcome.append(str(error))

    before = sys.getrecursionlimit()
    sys.setrecursionlimit(3000)
    try:
        worker = threading.Thread(target=work)
        worker.start()
        worker.join(60)
    finally:
        sys.setrecursionlimit(before)
    assert outcome == ["the body is nested too deeply"]


TYPES = st.sampled_from([Any, Request, Reply, Images, list[torch.Tensor], dict[str, int], Refuses])


def decode_hostile(body: bytes, type_: Any) -> None:
    try:
        decode(body, [torch.zeros(2), np.zeros(2)], type_)
    except ProtocolError:
        return


@settings(max_examples=300)
@given(st.binary(max_size=200), TYPES)
def test_random_bytes_give_protocol_errors_only(body: bytes, type_: Any) -> None:
    decode_hostile(body, type_)


SAMPLE: Encoded = encode(
    {
        "pixels": torch.zeros(2),
        "name": "n",
        "crops": [torch.zeros(1), np.zeros(2)],
        "type": "Images",
        "images": [{"mask": [1.5, None, True, b"x", 2**63, -5]}],
        "embedding": [dt.datetime(2024, 1, 1, tzinfo=dt.UTC), "long" * 20],
    }
)


@settings(max_examples=500)
@given(
    st.lists(st.tuples(st.integers(0, len(SAMPLE.body) - 1), st.integers(0, 255)), min_size=1, max_size=4),
    st.integers(0, len(SAMPLE.body)),
    TYPES,
)
def test_mutated_bytes_give_protocol_errors_only(
    edits: list[tuple[int, int]], length: int, type_: Any
) -> None:
    body = bytearray(SAMPLE.body)
    for position, value in edits:
        body[position] = value
    decode_hostile(bytes(body), type_)
    decode_hostile(bytes(body[:length]), type_)


# ------------------------------------------------------------------------- decoding inside of decoding


class Outer(msgspec.Struct):
    inner: bytes
    after: torch.Tensor

    def __post_init__(self) -> None:
        self.decoded = decode(self.inner, ["inner tensor"])


class Nesting(Outer, dict=True):
    pass


def test_decoding_within_decoding_keeps_the_tensors_apart() -> None:
    inner = encode([torch.zeros(1)]).body
    body = encode([{"inner": inner, "after": torch.ones(2)}] * 2)
    arrived = decode(body.body, [torch.ones(2)], list[Nesting])
    assert [item.decoded for item in arrived] == [["inner tensor"]] * 2
    assert torch.equal(arrived[1].after, torch.ones(2))


def test_threads_decode_their_own_tensors() -> None:
    body = encode([torch.zeros(1)] * 50).body
    wrong: list[object] = []

    def work(name: str) -> None:
        for _ in range(300):
            wrong.extend(found for found in decode(body, [name]) if found != name)

    workers = [threading.Thread(target=work, args=(str(n),)) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert not any(worker.is_alive() for worker in workers)
    assert not wrong
