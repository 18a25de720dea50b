"""Bodies for channels that carry bytes: a small head, and tensors that are int64 vectors."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import torch

from bench.links import Body

# What arrives is read and dropped; that it may not be written is no news.
warnings.filterwarnings("ignore", message="The given (NumPy array|buffer) is not writable")


def split(body: Body) -> tuple[bytes, list[torch.Tensor]]:
    """A body as its head, msgpack, and the tensors under its key "tensors", in a list of their own.

    Of their own, because the caller empties its list after the send, and who keeps tensors keeps them then.
    """
    plain = {key: value for key, value in body.items() if key != "tensors"}
    return msgspec.msgpack.encode(plain), list(body.get("tensors", ()))


def join(head: Any, tensors: Sequence[torch.Tensor]) -> Body:
    """The body again."""
    body: Body = msgspec.msgpack.decode(head)
    return {**body, "tensors": list(tensors)} if tensors else body


def vector(buffer: Any) -> torch.Tensor:
    """An int64 vector over the bytes of `buffer`, which it keeps."""
    return torch.from_numpy(np.frombuffer(buffer, np.int64))
