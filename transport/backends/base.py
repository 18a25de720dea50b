"""The interface of a backend: a way for the bytes of tensors to reach a peer.

Two nouns and few verbs. An `Outbound` puts the tensors of a message where readers find them and says
where in handles; an `Inbound` opens handles. Control messages, names, numbers and acknowledgements are
the endpoint's business. `docs/writing-a-backend.md` explains how to write one; `transport.conformance`
is the suite that tells whether it is right.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from transport.config import TransportConfig
from transport.devices import Piece
from transport.errors import TransportError

if TYPE_CHECKING:
    from transport.tensors import Source

Bytes = NDArray[np.uint8]
Poll = Callable[[], object]
Complete = Callable[[float], bool]
"""Waits so many seconds at most; whether all bytes are there. Errors as `Inbound.open`, and `GivenUp`."""


class Peer(NamedTuple):
    """One link to one peer: the link's number, the peer's name and pid (0: unknown).

    address: where the link runs: as it was dialled, an address for a name, or where this endpoint listens.
    dialled: whether this endpoint made it.
    """

    link: int
    name: str
    pid: int = 0
    address: str = ""
    dialled: bool = False

    def __str__(self) -> str:
        return f"{self.name!r} (pid {self.pid})" if self.pid else repr(self.name)


@dataclass(frozen=True)
class Proof:
    """What shows the sender that this process can read what it puts."""

    data: bytes


@dataclass(frozen=True)
class Refusal:
    """Why this process cannot read what the sender puts; no names of files or segments."""

    reason: str


@dataclass(frozen=True)
class Held:
    """What a peer keeps from being used again: records, their bytes, seconds that the oldest is open."""

    records: int
    nbytes: int
    oldest: float


@dataclass
class Load:
    """What one reader is sent: for each tensor (backend name, handle as msgpack), and payload frames."""

    handles: list[tuple[str, bytes]]
    frames: list[Bytes] = field(default_factory=list)


class Parcel(ABC):
    """The tensors of one message, put for some readers and kept until each of them has let go."""

    failed: Mapping[Peer, TransportError] = {}
    """The readers that the tensors could not be put for, and why; the others have a load."""

    @abstractmethod
    def load(self, reader: Peer) -> Load:
        """What to send to that reader."""

    @abstractmethod
    def release(self, reader: Peer) -> None:
        """The reader took the message, or never will. Called once for each reader."""

    def fill(self) -> None:
        """Write what `put` left until the message was posted, to readers that follow (`Inbound.open_early`).

        Raises what reading the sources raises; what the readers follow is given up then (`GivenUp`).
        """
        return

    def abandon(self) -> None:
        """In place of `fill`: nothing will be written any more."""
        return


class NoParcel(Parcel):
    """Handles that keep nothing alive."""

    def __init__(self, load: Load) -> None:
        self._load = load

    def load(self, reader: Peer) -> Load:
        return self._load

    def release(self, reader: Peer) -> None:
        return


class Outbound(ABC):
    """The sending side of a backend in one endpoint. Called by several threads."""

    name: str

    def __init__(self, config: TransportConfig) -> None:
        self.config = config

    def wants_offer(self, peer: Peer, sizes: Sequence[int]) -> bool:
        """Whether tensors of these sizes (bytes) wait for `peer` to prove that it can read them."""
        return False

    def serves(self, peer: Peer) -> bool:
        """Whether tensors can be put for `peer` now: it needs no proof, or has given it."""
        return True

    def reads(self, peer: Peer) -> str:
        """The name of the inbound that the next offer to `peer` is for."""
        return self.name

    def offer(self, peer: Peer) -> bytes:
        """What `peer` needs for its proof. `TransportError` when there can be none: the peer is refused."""
        return b""

    def admit(self, peer: Peer, answer: Proof | Refusal) -> str:
        """Judge an answer; "" admits the peer, else the reason why not."""
        return ""

    @abstractmethod
    def limit(self, peer: Peer) -> int:
        """How many bytes of one message can be put for `peer` at once; larger ones come in parts."""

    @abstractmethod
    def put(
        self, sources: Sequence[Source], readers: Sequence[Peer], *, timeout: float, poll: Poll
    ) -> Parcel:
        """Put the bytes of all sources for all readers, or nothing at all.

        Waits `timeout` seconds at most, calling `poll` now and then. `Full` later, `TooLarge` never.
        The sources may change as soon as this returns.
        """

    def lend(self, nbytes: int, timeout: float, poll: Poll) -> Bytes | None:
        """Writable memory that a later `put` sends without a copy; None: this backend has none."""
        return None

    def explain(self, peer: Peer) -> str:
        """Which backend serves `peer` and why, for people."""
        return self.name

    def alive(self, peer: Peer) -> bool | None:
        """Whether the peer's process lives, where the backend can tell; slow is not dead."""
        return None

    def fault(self, peer: Peer) -> str:
        """Why what was put for `peer` will never reach it, so that its link has to end; "" in general."""
        return ""

    def held(self, peer: Peer) -> Held | None:
        """What `peer` holds of this backend's memory, for people; None where it has none."""
        return None

    def drop(self, peer: Peer) -> None:
        """The link ended: forget what is known of `peer`. Its parcels are released separately."""
        return

    def flush(self, timeout: float) -> bool:
        """Wait until what was put can be read without this process, `timeout` seconds at most."""
        return True

    def part(self, name: str) -> Outbound | None:
        """The outbound of that name in this one: itself, or one of those that it chooses from."""
        return self if name == self.name else None

    def statistics(self) -> dict[str, object]:
        """Counters and sizes, for people and tests."""
        return {}

    def close(self) -> None:
        """Give everything back; what readers have open stays valid."""
        return


class Inbound(ABC):
    """The receiving side of a backend in one endpoint. `open` is called by one thread at a time, while
    another may call the rest.
    """

    name: str
    on_device = False
    """Whether what it opens is on a GPU: `open_on_device` is called then, where a torch tensor is wanted."""
    in_place = False
    """Whether what it opens is the sender's own memory, which a view keeps, and no message."""
    comes_later = False
    """Whether bytes may come after their message, which waits then: `is_ready` and `taken` are called."""

    def __init__(self, config: TransportConfig) -> None:
        self.config = config

    def begin(self, outbound: Outbound, wake: Callable[[], object]) -> None:
        """Called once, before the rest: the outbound of the same endpoint, and what to call in any thread
        when a message may have become ready."""
        return

    def accept(self, peer: Peer, offer: bytes, own_name: str) -> Proof | Refusal:
        """Prove that this process can read what `peer` puts. Offers are hostile input."""
        return Proof(b"")

    def settle(self, peer: Peer, reason: str) -> None:
        """The sender's verdict on the proof: admitted when `reason` is empty."""
        return

    @abstractmethod
    def open(self, peer: Peer, handle: bytes, nbytes: int, frames: Sequence[Bytes]) -> Bytes:
        """The bytes of one tensor, shape [nbytes]; whoever keeps the array keeps them.

        Handles are hostile input: `ProtocolError` for anything wrong, `PeerGone` for a record whose
        owner is gone, `Timeout` when it is worth trying again.
        """

    def open_early(
        self, peer: Peer, handle: bytes, nbytes: int, frames: Sequence[Bytes]
    ) -> tuple[Bytes, Complete | None]:
        """As `open`, but maybe before all bytes are there, and then what waits for the rest."""
        return self.open(peer, handle, nbytes, frames), None

    def open_on_device(self, peer: Peer, handle: bytes, nbytes: int) -> torch.Tensor:
        """As `open`: uint8 [nbytes] on a GPU, complete for what is queued on the current stream later."""
        raise NotImplementedError

    def follow(
        self, peer: Peer, handle: bytes, nbytes: int, frames: Sequence[Bytes]
    ) -> Iterator[tuple[int, Bytes | Piece]]:
        """As `open`, but in pieces (start, bytes), for who takes them elsewhere: maybe before all are there.

        The pieces follow each other; each is complete and keeps the record. Errors as `open`, at any piece,
        and `GivenUp`.
        """
        yield 0, self.open(peer, handle, nbytes, frames)

    def is_ready(self, peer: Peer, handle: bytes) -> bool:
        """Whether `open` has an answer: the bytes are there, or it is known that they are not to come."""
        return True

    def progress(self, peer: Peer, handle: bytes) -> str:
        """How much has come of what is not ready, for people."""
        return ""

    def taken(self, peer: Peer, handle: bytes) -> None:
        """The message with that handle was taken, or refused: it will not be opened again."""
        return

    def alive(self, peer: Peer) -> bool | None:
        """Whether the peer's process lives, where the backend can tell; slow is not dead."""
        return None

    def fault(self, peer: Peer) -> str:
        """Why what `peer` announced will never come, so that its link has to end; "" in general."""
        return ""

    def stores(self) -> Collection[int]:
        """The stores of others that handles can be opened of here, whoever passes them on."""
        return ()

    def store_of(self, handle: bytes) -> int | None:
        """The store that a handle belongs to when it may be handed on to another reader of it."""
        return None

    def drop(self, peer: Peer) -> None:
        """The link ended and nothing that came over it is left to open."""
        return

    def statistics(self) -> dict[str, object]:
        """Counters and sizes, for people and tests."""
        return {}

    def close(self) -> None:
        """Give everything back; arrays that `open` returned stay valid."""
        return
