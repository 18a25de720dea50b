"""Tensors between processes: `listen`, `connect`, send and receive bodies that hold tensors anywhere."""

from __future__ import annotations

from transport.backends.base import Held
from transport.config import TransportConfig, log_trace
from transport.curve import make_keys
from transport.devices import Piece, copies_from_host, copy_in
from transport.endpoint import Endpoint, PeerInfo, connect, listen
from transport.errors import Closed, Full, PeerGone, ProtocolError, Timeout, TooLarge, TransportError
from transport.received import Message
from transport.registration import Registered, register_rings, registered, try_registration
from transport.specs import Bytes
from transport.staging import Batch, Place, Stage
from transport.tensors import concat, stack
from transport.waiting import RateLimit

__all__ = [
    "Batch",
    "Bytes",
    "Closed",
    "Endpoint",
    "Full",
    "Held",
    "Message",
    "PeerGone",
    "PeerInfo",
    "Piece",
    "Place",
    "ProtocolError",
    "RateLimit",
    "Registered",
    "Stage",
    "Timeout",
    "TooLarge",
    "TransportConfig",
    "TransportError",
    "concat",
    "connect",
    "copies_from_host",
    "copy_in",
    "listen",
    "log_trace",
    "make_keys",
    "register_rings",
    "registered",
    "stack",
    "try_registration",
]
