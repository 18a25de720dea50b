"""The first bytes of a bulk connection: each side shows the half of a secret that its control link gave it.

The side that made the control link dials. Nothing is allocated, and nothing believed, before that.
"""

from __future__ import annotations

import hmac
import os
import socket as sockets
import ssl
import struct
from collections.abc import Callable
from contextlib import suppress

from transport.bulk.connection import Lost

MAGIC = b"tfbulk02"
HALF = 16
TOKEN_BYTES = 2 * HALF
_HELLO = struct.Struct(f"<8sQ{HALF}s")
_ANSWER = struct.Struct(f"<8s{HALF}s")
_TCP_RTO_MAX_MS = 44  # Linux 6.15 and later
_LONGEST_RETRY = 5000  # ms between two tries of the kernel to reach a host that does not answer

Find = Callable[[int], bytes | None]
"""The token of a link that is expected, by its number."""


def prepare(socket: sockets.socket, timeout: float) -> None:
    """Never block, send at once, and notice within `timeout` seconds that an idle peer's host is gone."""
    socket.setblocking(False)
    socket.setsockopt(sockets.IPPROTO_TCP, sockets.TCP_NODELAY, 1)
    socket.setsockopt(sockets.SOL_SOCKET, sockets.SO_KEEPALIVE, 1)
    socket.setsockopt(sockets.IPPROTO_TCP, sockets.TCP_KEEPIDLE, max(1, int(timeout / 2)))
    socket.setsockopt(sockets.IPPROTO_TCP, sockets.TCP_KEEPINTVL, max(1, int(timeout / 8)))
    socket.setsockopt(sockets.IPPROTO_TCP, sockets.TCP_KEEPCNT, 4)
    with suppress(OSError):
        socket.setsockopt(sockets.IPPROTO_TCP, _TCP_RTO_MAX_MS, _LONGEST_RETRY)


class Handshake:
    """One that is under way. `step` is called when the socket can go on, until `link` is not None.

    link: of a dialled connection, known before. find: of an accepted one.
    """

    def __init__(
        self,
        socket: sockets.socket,
        deadline: float,
        *,
        link: int = 0,
        token: bytes = b"",
        find: Find | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.socket = socket
        self.deadline = deadline
        self.link = link
        self.done = False
        self.accepted = find is not None
        self.writing = find is None  # a dialled socket is writable once it is connected
        self._find = find
        self._tls = tls
        self._token = token
        self._came = b""
        self._greeted = False

    def step(self) -> None:
        """Go on. `Lost` when this cannot become a bulk connection."""
        try:
            if self._tls is not None:
                self._secure(self._tls)
            if self._find is not None:
                self._answer(self._find)
            elif not self._greeted:
                self._greet()
            else:
                self._check()
        except (BlockingIOError, InterruptedError):
            return
        except ssl.SSLWantReadError:
            self.writing = False
        except ssl.SSLWantWriteError:
            self.writing = True
        except OSError as error:
            raise Lost(error.strerror or str(error)) from error

    @property
    def certificate(self) -> bytes:
        """What the other side showed (DER); empty without TLS."""
        shown = self.socket.getpeercert(binary_form=True) if isinstance(self.socket, ssl.SSLSocket) else None
        return shown or b""

    def _secure(self, context: ssl.SSLContext) -> None:
        if not isinstance(self.socket, ssl.SSLSocket):
            self._raise_if_refused()
            self.socket = context.wrap_socket(
                self.socket, server_side=self._find is not None, do_handshake_on_connect=False
            )
        self.socket.do_handshake()
        self._tls = None

    def _raise_if_refused(self) -> None:
        error = self.socket.getsockopt(sockets.SOL_SOCKET, sockets.SO_ERROR)
        if error:
            raise OSError(error, os.strerror(error))

    def _greet(self) -> None:
        self._raise_if_refused()
        self._send(_HELLO.pack(MAGIC, self.link, self._token[:HALF]))
        self._greeted, self.writing = True, False

    def _check(self) -> None:
        if not self._receive(_ANSWER.size):
            return
        magic, half = _ANSWER.unpack(self._came)
        if magic != MAGIC or not hmac.compare_digest(half, self._token[HALF:]):
            raise Lost("who listens there is somebody else")
        self.done = True

    def _answer(self, find: Find) -> None:
        if not self._receive(_HELLO.size):
            return
        magic, link, half = _HELLO.unpack(self._came)
        token = find(link)
        if magic != MAGIC or token is None or not hmac.compare_digest(half, token[:HALF]):
            raise Lost("it does not know the secret")
        self._send(_ANSWER.pack(MAGIC, token[HALF:]))
        self.link, self.done = link, True

    def _send(self, data: bytes) -> None:
        if self.socket.send(data) != len(data):  # these are the first bytes: there is room
            raise Lost("the socket takes nothing")

    def _receive(self, number: int) -> bool:
        data = self.socket.recv(number - len(self._came))
        if not data:
            raise Lost("the other side closed it")
        self._came += data
        return len(self._came) == number
