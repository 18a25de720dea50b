"""Tensors between processes: `listen`, `connect`, send and receive bodies that hold tensors anywhere."""

from __future__ import annotations

from transport.backends.base import Held
from transport.config import TransportConfig
from transport.endpoint import Endpoint, PeerInfo, connect, listen
from transport.errors import Closed, Full, PeerGone, ProtocolError, Timeout, TooLarge, TransportError
from transport.receiving import Message
from transport.tensors import concat, stack

__all__ = [
    "Closed",
    "Endpoint",
    "Full",
    "Held",
    "Message",
    "PeerGone",
    "PeerInfo",
    "ProtocolError",
    "Timeout",
    "TooLarge",
    "TransportConfig",
    "TransportError",
    "concat",
    "connect",
    "listen",
    "stack",
]
