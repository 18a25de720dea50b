"""The wire: every control message as a `msgspec.Struct`, encoded as one msgpack frame.

A link is one handshake of one peer. Each direction numbers its messages from 1 (`Data`, `Part`,
`Abandon`, `Ping`), and each of them says in `seen` up to which number its sender has taken the other
direction's. An `Acknowledgement` says just that. Other kinds are not numbered.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from msgspec import Meta

from transport.errors import ProtocolError
from transport.tensors import TensorSpec

VERSION: Final = 1
MAX_WINDOW_BYTES: Final = (1 << 63) - 1

Word = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Name = Annotated[str, Meta(min_length=1, max_length=64)]
Reason = Annotated[str, Meta(max_length=500)]
Mark = Annotated[bytes, Meta(max_length=32)]
Accepts = Annotated[list[Name], Meta(max_length=64)]


class _Message(msgspec.Struct, array_like=True, forbid_unknown_fields=True, gc=False):
    pass


class Greeting(_Message, tag=1, forbid_unknown_fields=False):
    """What a hello of any version begins with; `Refused` is the same in every version, too."""

    version: int
    nonce: Word


class Hello(Greeting, tag=1, forbid_unknown_fields=True):
    """From who connects: `nonce` comes back in the welcome.

    window: so many messages may be unacknowledged, of window_bytes in all. patience: so many bytes may wait
    for an acknowledgement that travels with something else; ring_patience: so many that are read in place.
    process: `transport.process.own_mark`.
    """

    name: Name
    pid: Word
    window: Annotated[int, Meta(ge=1)]
    patience: Word
    accepts: Accepts
    window_bytes: Annotated[int, Meta(ge=1)] = MAX_WINDOW_BYTES
    ring_patience: Word = 0
    process: Mark = b""


class Welcome(_Message, tag=2):
    """From who listens: the link is made."""

    nonce: Word
    link: Word
    name: Name
    pid: Word
    window: Annotated[int, Meta(ge=1)]
    patience: Word
    accepts: Accepts
    window_bytes: Annotated[int, Meta(ge=1)] = MAX_WINDOW_BYTES
    ring_patience: Word = 0
    process: Mark = b""


class Refused(_Message, tag=3):
    """From who listens: no link is made."""

    nonce: Word
    reason: Reason


class Offered(_Message, tag=4):
    """A backend of the sender could serve this peer, if the peer proves that it can read."""

    link: Word
    backend: Name
    offer: bytes


class Answered(_Message, tag=5):
    """The proof, or the reason why there is none."""

    link: Word
    backend: Name
    proof: bytes | None
    reason: Reason = ""


class Settled(_Message, tag=6):
    """The verdict on a proof: admitted when the reason is empty."""

    link: Word
    backend: Name
    reason: Reason = ""


class Attached(_Message, tag=7):
    """The stores (such as ring segments) that the sender can open handles of, for hand-on."""

    link: Word
    stores: Annotated[list[Word], Meta(max_length=4096)]


class Reference(_Message):
    """Where one tensor of a message is."""

    spec: TensorSpec
    backend: Name
    handle: msgspec.Raw


class Piece(_Message):
    """Where `nbytes` bytes of tensor `index` are, from its byte `start` on."""

    index: Word
    start: Word
    nbytes: Word
    backend: Name
    handle: msgspec.Raw


class Data(_Message, tag=8):
    """A message: its body with the tensors taken out, and where they are."""

    link: Word
    number: Word
    seen: Word
    body: bytes
    tensors: list[Reference]


class Part(_Message, tag=9):
    """Some bytes of a message that is too large to go at once; `sizes` of its tensors in the first one."""

    link: Word
    number: Word
    seen: Word
    sizes: list[Word]
    pieces: list[Piece]


class Abandon(_Message, tag=10):
    """The rest of a message in parts will not come."""

    link: Word
    number: Word
    seen: Word


class Ping(_Message, tag=11):
    """Nothing, numbered: its acknowledgement settles everything before it."""

    link: Word
    number: Word
    seen: Word


class Acknowledgement(_Message, tag=12):
    """Every message up to `seen` was taken."""

    link: Word
    seen: Word


class Goodbye(_Message, tag=13):
    """The link ends here."""

    link: Word
    reason: Reason = ""


Numbered = Data | Part | Abandon | Ping
Control = (
    Hello | Welcome | Refused | Offered | Answered | Settled | Attached | Numbered | Acknowledgement | Goodbye
)

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Control] = msgspec.msgpack.Decoder(Control)
_greeting_decoder = msgspec.msgpack.Decoder(Greeting)
_MALFORMED = (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError, RecursionError)


def encode(message: Control) -> bytes:
    """The one frame of a control message."""
    return _encoder.encode(message)


def decode(frame: bytes | memoryview) -> Control:
    """`ProtocolError` unless the frame is a control message of this version."""
    try:
        return _decoder.decode(frame)
    except _MALFORMED as error:
        raise ProtocolError(f"not a control message: {error}") from error


def decode_greeting(frame: bytes | memoryview) -> Greeting | None:
    """How the hello of another version begins, whatever its other fields are; None when it is none.

    These fields are passed over and take no memory.
    """
    try:
        greeting = _greeting_decoder.decode(frame)
    except _MALFORMED:
        return None
    return None if greeting.version == VERSION else greeting
