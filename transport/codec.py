"""Any body to bytes and a list of tensors, and back; pure, nothing is copied, nothing waits."""

from __future__ import annotations

import dataclasses
import re
import reprlib
import struct
import threading
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import msgspec
import numpy as np

from .errors import ProtocolError
from .tensors import Source, source_of

EXT_TENSOR = 1  # the msgpack extension that stands for a tensor; its data is an index, little-endian u32
_INDEX = struct.Struct("<I")
_PATH_LENGTH = 200


class Encoded(NamedTuple):
    """body: msgpack, in which tensor number i is an extension that holds i. sources: those tensors."""

    body: bytes
    sources: list[Source]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum([source.nbytes for source in self.sources])


class _Collector:
    """msgspec's hook for what it does not know: a tensor becomes its index, a numpy scalar a Python one."""

    __slots__ = ("_held", "_seen", "sources")

    def __init__(self) -> None:
        self.sources: list[Source] = []
        self._seen: dict[int, msgspec.msgpack.Ext] = {}
        self._held: list[object] = []  # or an id might come again for another object

    def __call__(self, obj: object) -> object:
        stands_for = self._seen.get(id(obj))
        if stands_for is not None:
            return stands_for
        source = source_of(obj)
        if source is None:
            return _python_value(obj)
        stands_for = msgspec.msgpack.Ext(EXT_TENSOR, _INDEX.pack(len(self.sources)))
        self.sources.append(source)
        self._held.append(obj)
        self._seen[id(obj)] = stands_for
        return stands_for


def _python_value(obj: object) -> object:
    name = type(obj).__name__
    if isinstance(obj, np.generic):
        value = obj.item()
        # Nanoseconds come as a bare int, long doubles as themselves, structures as tuples.
        if isinstance(value, complex | np.generic | tuple) or (
            obj.dtype.kind in "mM" and isinstance(value, int)
        ):
            raise TypeError(f"cannot send a numpy {name} scalar of dtype {obj.dtype}; send np.asarray(value)")
        return value
    if isinstance(obj, complex):
        raise TypeError("cannot send a complex number; send it as a tensor, such as torch.tensor(value)")
    raise TypeError(f"cannot send an object of type {name}{getattr(type(obj), 'instead', '')}")


def encode(body: object) -> Encoded:
    """Replace the tensors in `body` by their indexes and encode the rest; no tensor is read or copied.

    body: nested dicts, lists, tuples, sets, dataclasses and Structs of what msgspec knows, of tensors (see
    `source_of`) and of numpy scalars. The same object twice is one source. msgspec's own `Ext` is taken.
    TypeError: something that cannot be sent, with its path, as in `body.images[3].mask: cannot send ...`.
    """
    collector = _Collector()
    try:
        return Encoded(msgspec.msgpack.Encoder(enc_hook=collector).encode(body), collector.sources)
    except Exception as error:  # a body's own properties may raise anything
        reason = _explain(body, error)
        raise TypeError(reason) from error


# ------------------------------------------------------------------------------- what could not be encoded


def _explain(body: object, error: Exception) -> str:
    """Where in the body the encoder failed, and why. Walked only now, so that success costs nothing."""
    # A stack of our own: the body may be deeper than Python's, or contain itself.
    open_nodes = [(body, _children("body", body))]
    open_ids = {id(body)}
    done: set[int] = set()
    depth = 1
    if not _is_container(body):
        return f"body: {_leaf_fault(body) or error}"
    while open_nodes:
        node, children = open_nodes[-1]
        path, child = next(children, ("", None))
        if not path:
            open_nodes.pop()
            open_ids.discard(id(node))
            done.add(id(node))
        elif id(child) in open_ids:
            return f"{_shortened(path)}: the body contains itself here"
        elif _is_container(child):
            if id(child) not in done:
                open_nodes.append((child, _children(path, child)))
                open_ids.add(id(child))
                depth = max(depth, len(open_nodes))
        elif fault := _leaf_fault(child):
            return f"{_shortened(path)}: {fault}"
    if isinstance(error, RecursionError):
        return f"body: nested {depth} levels deep, which is too deep to encode; flatten it"
    return f"body: cannot be encoded: {error}"


class _Key:
    """A dict key, told apart from a value since it has to be hashable when it arrives."""

    def __init__(self, key: object) -> None:
        self.key = key


def _is_container(node: object) -> bool:
    return isinstance(node, dict | list | tuple | set | frozenset) or bool(_fields(node))


def _fields(node: object) -> tuple[str, ...]:
    if isinstance(node, msgspec.Struct):
        return node.__struct_fields__
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        return tuple(field.name for field in dataclasses.fields(node))
    return tuple(field.name for field in getattr(type(node), "__attrs_attrs__", ()))


def _children(path: str, node: object) -> Iterator[tuple[str, object]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield path, _Key(key)
            yield f"{path}[{reprlib.repr(key)}]", value
    elif isinstance(node, list | tuple | set | frozenset):
        for index, value in enumerate(node):
            yield f"{path}[{index}]", value
    for name in _fields(node):
        value = getattr(node, name, msgspec.UNSET)
        if value is not msgspec.UNSET:
            yield f"{path}.{name}", value


def _leaf_fault(node: object) -> str | None:
    """Why this cannot be sent on its own; None if it can."""
    if isinstance(node, _Key):
        fault = _leaf_fault(node.key)
        return f"the key {reprlib.repr(node.key)}: {fault}" if fault else None
    try:
        msgspec.msgpack.Encoder(enc_hook=_Collector()).encode(node)
    except OverflowError:
        return "cannot send an int beyond 64 bits; send it as str"
    except UnicodeEncodeError:
        return "cannot send a str with lone surrogates, which UTF-8 does not have; send it as bytes"
    except RecursionError:
        return "cannot send what is nested this deep; flatten it"
    except Exception as error:  # noqa: BLE001  # the hooks of foreign types may raise anything
        return str(error)
    return None


def _shortened(path: str) -> str:
    half = _PATH_LENGTH // 2
    return path if len(path) <= _PATH_LENGTH else f"{path[:half]}...{path[-half:]}"


# ------------------------------------------------------------------------------------------------ decoding


class _Arrived(threading.local):
    """The tensors of the message that this thread decodes now: cached decoders have one hook for all."""

    tensors: Sequence[object] = ()


_arrived = _Arrived()


def _tensor_at(code: int, data: memoryview) -> object:
    if code != EXT_TENSOR:
        raise ProtocolError(f"unknown extension code {code}")
    if len(data) != _INDEX.size:
        raise ProtocolError(f"a tensor index of {len(data)} bytes instead of {_INDEX.size}")
    index: int = _INDEX.unpack(data)[0]
    if index >= len(_arrived.tensors):
        raise ProtocolError(f"tensor {index} of a message with {len(_arrived.tensors)}")
    return _arrived.tensors[index]


@lru_cache(maxsize=128)
def _cached_decoder(type_: Any) -> msgspec.msgpack.Decoder[Any]:
    return msgspec.msgpack.Decoder(type_, ext_hook=_tensor_at)


def _decoder(type_: Any) -> msgspec.msgpack.Decoder[Any]:
    try:
        hash(type_)
    except TypeError:  # such as Annotated with a list in it
        return msgspec.msgpack.Decoder(type_, ext_hook=_tensor_at)
    return _cached_decoder(type_)


def decode(body: bytes | memoryview, tensors: Sequence[object], type: Any = Any) -> Any:
    """The body that `encode` was given, with `tensors[i]` in the place of source number i.

    type: what the body must be, as msgspec understands it; fields may be `torch.Tensor`, `np.ndarray`, lists
    of them or None. Without it Structs and dataclasses arrive as dicts, tuples as lists. TypeError: a type
    that msgspec cannot decode to, such as a union of two tensor types (use `Any` there). ProtocolError:
    bytes, an index or a value that do not fit; the text holds nothing of the body.
    """
    decoder = _decoder(type)
    outer, _arrived.tensors = _arrived.tensors, tensors
    try:
        return decoder.decode(body)
    except ProtocolError:
        raise
    except msgspec.ValidationError as error:
        raise ProtocolError(f"the body is of another type: {_mismatch(error)}") from error
    except RecursionError as error:
        raise ProtocolError("the body is nested too deeply") from error
    except Exception as error:  # a type's own __post_init__ may raise anything
        raise ProtocolError(f"the body is malformed ({error.__class__.__name__})") from error
    finally:
        _arrived.tensors = outer


# msgspec's messages in which all words are its own or the type's; others quote keys and values.
_SAFE_MISMATCH = re.compile(
    r"(Expected `[\w.|, \[\]]+`(?:, got `[\w.]+`| of length [\w<>=, ]+)"
    r"|Object missing required field `\w+`)"
    r"( - at `[\w.$\[\]]+`)?",
    re.ASCII,
)


def _mismatch(error: msgspec.ValidationError) -> str:
    text = str(error)
    return text if _SAFE_MISMATCH.fullmatch(text) else "a value that the type does not allow"
