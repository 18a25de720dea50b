"""A bad network: a proxy between two ends of a TCP connection that stalls, cuts and flips bytes."""

from __future__ import annotations

import selectors
import socket
import threading
from contextlib import suppress
from types import TracebackType
from typing import Self

_TURN = 64 << 10
_WAIT = 30.0


class Proxy:
    """Forwards every connection to it to the port `to` of this host, in a thread.

    cuts, flips: after how many bytes, counted over all that was forwarded both ways, to close every
    connection, or to turn a bit over. stalled: forward nothing (`stall`). closed: refuse what comes.
    """

    def __init__(self) -> None:
        self.to = 0
        self.cuts: list[int] = []
        self.flips: list[int] = []
        self.stalled = threading.Event()
        self._stands = threading.Event()
        self.closed = threading.Event()
        self.forwarded = 0
        self.connections = 0
        self.seen = bytearray()
        self.watching = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._pairs: dict[socket.socket, socket.socket] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def cut(self) -> None:
        """Close every connection now."""
        self.cuts.append(0)

    def stall(self) -> None:
        """Forward nothing of what comes from now on, until `stalled` is cleared."""
        self._stands.clear()
        self.stalled.set()
        assert self._stands.wait(_WAIT), "the proxy does not stand still"

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            while not self._stop.is_set():
                for key, _ in selector.select(0.01):
                    if key.fileobj is self._listener:
                        self._accept(selector)
                    elif not self.stalled.is_set() and key.fileobj in self._pairs:
                        assert isinstance(key.fileobj, socket.socket)
                        self._forward(selector, key.fileobj)
                if self.cuts and self.forwarded >= self.cuts[0]:
                    self.cuts.pop(0)
                    self._hang_up(selector)
                if self.stalled.is_set():
                    self._stands.set()
                    self._stop.wait(0.01)
            self._hang_up(selector)

    def _accept(self, selector: selectors.BaseSelector) -> None:
        near, _ = self._listener.accept()
        if self.closed.is_set():
            near.close()
            return
        far = socket.create_connection(("127.0.0.1", self.to))
        self.connections += 1
        self._pairs |= {near: far, far: near}
        for end in (near, far):
            selector.register(end, selectors.EVENT_READ)

    def _forward(self, selector: selectors.BaseSelector, end: socket.socket) -> None:
        data = b""
        with suppress(OSError):
            data = end.recv(_TURN)
        if not data:
            self._hang_up(selector)
            return
        start, self.forwarded = self.forwarded, self.forwarded + len(data)
        if self.watching:
            self.seen += data
        if self.flips and self.flips[0] < self.forwarded:
            place = max(0, self.flips.pop(0) - start)
            data = data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]
        other = self._pairs[end]
        other.settimeout(0.05)
        while data and not self._stop.is_set():
            with suppress(TimeoutError):
                try:
                    data = data[other.send(data) :]
                except (BrokenPipeError, ConnectionResetError):
                    self._hang_up(selector)
                    return

    def _hang_up(self, selector: selectors.BaseSelector) -> None:
        for end in self._pairs:
            selector.unregister(end)
            end.close()
        self._pairs.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._listener.close()
