"""What `receive(stage=…)` takes: something that brings tensors elsewhere as they come, to a device for one.

A stage gets bytes piece by piece, as soon as they are there: tensor after tensor of a message, part after
part of one that is larger than the ring, and pieces of a tensor that its sender is still writing (unless the
configuration says no `cut_through`). It keeps each array for as long as it reads from it, which is what keeps
the sender's memory; nobody else here does.
"""

from __future__ import annotations

from typing import Protocol

import torch

from transport.devices import Piece
from transport.specs import Bytes, Tensor, TensorSpec, shaped_on_device


class Place(Protocol):
    """Where one tensor goes."""

    @property
    def tensor(self) -> torch.Tensor:
        """The bytes as the receiver is to have them, uint8 [nbytes]; they may not be there yet."""

    def write(self, start: int, array: Bytes | Piece) -> None:
        """The bytes from `start` on. In order, without gaps; from the beginning where it is tried again.

        `array` may be a view into the sender's ring, or a piece of its memory on the GPU of this process.
        """


class Batch(Protocol):
    """The tensors of one message; `Message.staged` is it. Dropped half-way when the message fails."""

    def place(self, nbytes: int) -> Place:
        """Room for one more tensor."""


class Stage(Protocol):
    """Makes a batch for each message. Called by one thread at a time."""

    def batch(self) -> Batch:
        """For the next message."""


def finished(place: Place, spec: TensorSpec) -> Tensor:
    """The tensor that all bytes of a place make; a numpy array is brought back to the host for it."""
    return shaped_on_device(place.tensor, spec)
