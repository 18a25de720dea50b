"""What the thread of a hub sleeps in: epoll over its sockets, and an event by which others wake it."""

from __future__ import annotations

import os
import select
import socket as sockets
from collections.abc import Iterator
from contextlib import suppress

IN, OUT = select.EPOLLIN, select.EPOLLOUT
_EVENTS = 64


class Poller:
    """Sockets by descriptor, and what is waited for on each. For one thread, `open` and `wake` excepted."""

    def __init__(self) -> None:
        self.opened = False
        self._epoll: select.epoll
        self._event: int
        self._interest: dict[int, int] = {}

    def open(self) -> None:
        """Before anything else: who sends to no other host takes no descriptors."""
        self._epoll = select.epoll()
        self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._event, IN)
        self.opened = True

    def wake(self) -> None:
        """End the sleep of `ready`, or the next one; for any thread."""
        os.eventfd_write(self._event, 1)

    def ready(self, seconds: float | None) -> Iterator[tuple[int, int]]:
        """The descriptors that can go on, and how; none after `seconds`, None: wait until there are some."""
        for descriptor, events in self._epoll.poll(seconds, _EVENTS):
            if descriptor == self._event:
                os.eventfd_read(descriptor)
            else:
                yield descriptor, events

    def watch(self, socket: sockets.socket, events: int) -> int:
        """Wait for a socket, too; its descriptor."""
        descriptor = socket.fileno()
        self._epoll.register(descriptor, events)
        self._interest[descriptor] = events
        return descriptor

    def want(self, descriptor: int, events: int) -> None:
        """From now on wait for these events of a socket that is watched."""
        if self._interest.get(descriptor, events) != events:
            self._interest[descriptor] = events
            self._epoll.modify(descriptor, events)

    def wants(self, descriptor: int) -> int:
        """What is waited for."""
        return self._interest[descriptor]

    def hang_up(self, socket: sockets.socket) -> None:
        """Close a socket and wait for it no more."""
        self._interest.pop(socket.fileno(), None)
        with suppress(OSError, ValueError):
            self._epoll.unregister(socket.fileno())
        socket.close()

    def close(self) -> None:
        """Wait for nothing any more; the sockets stay open. Twice is fine."""
        if self.opened:
            self.opened = False
            try:
                self._epoll.close()
            finally:
                os.close(self._event)
