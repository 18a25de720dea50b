"""One bulk connection: frames in and out of a socket that never blocks. For the thread of its hub alone."""

from __future__ import annotations

import socket as sockets
import ssl
import struct
from collections import deque
from typing import Protocol

import numpy as np

from transport.backends.base import Bytes
from transport.bulk.frames import HEADER_BYTES, Checksum, Damaged, Frame, decode

_TURN_BYTES = 4 << 20  # in one direction, before others have their turn
# Of `struct tcp_info`: unanswered probes of a closed window or an idle connection, unacknowledged segments,
# the milliseconds since the last acknowledgement came, and the bytes that were not sent yet.
_TCP_INFO = struct.Struct("=3xB20xI28xI84xI")


class Lost(Exception):
    """The connection ended, or has to; the text says why. damaged: what came is not what was sent."""

    def __init__(self, reason: str, *, damaged: bool = False) -> None:
        super().__init__(reason)
        self.damaged = damaged


class Traffic(Protocol):
    """Who sends and receives over a connection."""

    def next_chunk(self) -> tuple[bytes, Bytes] | None:
        """Header and bytes of the next chunk, once every other frame is out; None when there is none."""

    def body_of(self, frame: Frame) -> memoryview:
        """Where the body of a frame goes, writable. `Damaged` when there must be no such frame."""

    def arrived(self, frame: Frame, body: memoryview) -> None:
        """A frame is complete, and its body what was sent. `Damaged` when it makes no sense here."""


class Connection:
    """Sends whole frames in order and hands on whole frames, however the network cuts them up."""

    def __init__(self, socket: sockets.socket, traffic: Traffic) -> None:
        self.socket = socket
        self.sent = self.received = 0  # bytes
        self.closed = False
        self._traffic = traffic
        self._frames: deque[bytes] = deque()
        self._leaving: list[memoryview] = []
        self._header = bytearray(HEADER_BYTES)
        self._frame: Frame | None = None
        self._body = memoryview(b"")
        self._checksum: Checksum | None = None  # of the body
        self._filled = 0

    @property
    def sending(self) -> bool:
        """Whether the socket took less than there is: it tells when it takes more."""
        return bool(self._leaving)

    def post(self, frame: bytes) -> None:
        """Send a frame before the next chunk."""
        self._frames.append(frame)

    def silent_for(self) -> float | None:
        """Seconds since the other host acknowledged anything; None when it has all there is.

        Its kernel answers although its process is stopped, and then takes nothing: 0, as slow is not dead.
        """
        info = self.socket.getsockopt(sockets.IPPROTO_TCP, sockets.TCP_INFO, _TCP_INFO.size)
        probes, unacknowledged, milliseconds, unsent = _TCP_INFO.unpack(info)
        if probes or unacknowledged:
            return float(milliseconds) / 1000
        return 0.0 if unsent else None

    # ------------------------------------------------------------------ out

    def send(self) -> bool:
        """Send what the socket takes; True when it may take more now. `Lost`."""
        left = _TURN_BYTES
        while left > 0:
            if not self._leaving and not self._load():
                return False
            try:
                number = self._send_some()
            except (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return False
            except OSError as error:
                raise Lost(f"sending: {error.strerror or error}") from error
            self.sent += number
            left -= number
            self._pass(number)
        return True

    def _send_some(self) -> int:
        if isinstance(self.socket, ssl.SSLSocket):
            return self.socket.send(self._leaving[0])
        return self.socket.sendmsg(self._leaving)

    def _load(self) -> bool:
        if self._frames:
            self._leaving = [memoryview(b"".join(self._frames))]
            self._frames.clear()
            return True
        chunk = self._traffic.next_chunk()
        if chunk is None:
            return False
        header, body = chunk
        self._leaving = [memoryview(header), body.data]
        return True

    def _pass(self, number: int) -> None:
        leaving = self._leaving
        while leaving and number >= leaving[0].nbytes:
            number -= leaving.pop(0).nbytes
        if number:
            leaving[0] = leaving[0][number:]

    # ------------------------------------------------------------------ in

    def receive(self) -> bool:
        """Take what has come; True when there may be more now. `Lost`, also for damaged bytes."""
        left = _TURN_BYTES
        while left > 0:
            into = memoryview(self._header) if self._frame is None else self._body
            try:
                number = self.socket.recv_into(into[self._filled :])
            except (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return False
            except OSError as error:
                raise Lost(f"receiving: {error.strerror or error}") from error
            if not number:
                raise Lost("the other side closed it")
            self.received += number
            left -= number
            self._filled += number
            if self._checksum is not None:
                self._checksum.upto(self._filled)
            if self._filled == into.nbytes:
                try:
                    self._complete()
                except Damaged as error:
                    raise Lost(f"damaged bytes: {error}", damaged=True) from error
        return True

    def _complete(self) -> None:
        if self._frame is None:
            frame = decode(self._header)
            self._frame, self._filled = frame, 0
            if frame.nbytes:
                self._body = self._traffic.body_of(frame)
                self._checksum = Checksum(np.frombuffer(self._body, np.uint8))
                return
        frame, body, check = self._frame, self._body, self._checksum
        self._frame, self._body, self._checksum, self._filled = None, memoryview(b""), None, 0
        if check is not None and check.value() != frame.checksum:
            raise Damaged(f"{body.nbytes} bytes of transfer {frame.transfer} do not fit their checksum")
        self._traffic.arrived(frame, body)

    def close(self) -> None:
        """Read and write nothing any more, and hold nothing; the hub closes the socket."""
        self.closed = True
        self._leaving, self._body, self._checksum = [], memoryview(b""), None
        self._frames.clear()
