"""An endpoint whose messages a thread takes as they come and keeps until somebody asks for them.

vLLM's messages and ours travel beside each other: ours carries the tensor (through the ring, held by the
link's own rules until it was opened), vLLM's the key by which the receiver finds it here. A message that is
opened at once is acknowledged at once, so that a sender's ring depends on nobody's asking.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from engine.vllm.settings import exists
from transport import (
    Closed,
    Endpoint,
    Message,
    PeerGone,
    ProtocolError,
    RateLimit,
    Timeout,
    TransportError,
)

_log = logging.getLogger("vllm.tensorferry")

_LOOK_SOON, _LOOK = 0.05, 1.0
_DIAL_SOON, _DIAL_LATER, _DIAL_SOON_FOR = 0.1, 2.0, 60.0
_SAY_AFTER = 900.0  # seconds: loading a model takes long
_DIAL_TIMEOUT = 2.0
_REFUSED_FOR = 1.0  # seconds to wait where the last message that came could not be opened: it was that one

Key = tuple[str, int, int]  # who put the tensor first, for which of its messages, and its number there
Arrival = tuple[torch.Tensor, Message | None]  # without a message the tensor is a copy


class Mailbox:
    """What came to `endpoint`, by sender, in order.

    `notice` is called with (sender, body) for a message without a tensor, `look` again and again: soon while
    it says True, else every second. Both run in the thread.
    """

    def __init__(
        self, endpoint: Endpoint, notice: Callable[[str, dict[str, Any]], None], look: Callable[[], bool]
    ) -> None:
        self.endpoint = endpoint
        self._notice = notice
        self._look = look
        self._queues: dict[str, deque[tuple[Key, Arrival]]] = {}
        self._latest: dict[str, int] = {}  # by sender: the number of its own that came last
        self._linked: dict[str, tuple[str, Callable[[str], None]]] = {}  # who was dialled, as `dial` was told
        self._left: set[str] = set()
        self._refused = math.inf  # when a message could not be opened, after which no tensor came
        self._came = threading.Condition()
        self._closed = threading.Event()
        self._warnings = RateLimit()
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._serve, name="tensorferry-mailbox", daemon=True)

    def start(self) -> None:
        """Begin to take messages."""
        self._thread.start()

    def take(self, sender: str, key: Key, timeout: float) -> Arrival:
        """The tensor of that key. LookupError when it does not come in time, or cannot come any more.

        Those of one message may be asked for in any order. What came from the same sender before, and for
        another message, is never asked for: that message was not sent, or its request is gone.
        """
        what = f"tensor {key[2]} of {key[0]} did not come from {sender}"
        begun = time.monotonic()
        with self._came:
            while (arrival := self._pop(sender, key)) is None:
                now = time.monotonic()
                patience = min(timeout, max(0.0, self._refused - begun) + _REFUSED_FOR)
                left = begun + patience - now
                why = self._why_lost(sender, key) or ("" if left > 0 else f"in {patience:.3g} s")
                if why:
                    raise LookupError(f"{what} {why}: {self._account(sender)}")
                self._came.wait(min(left, _LOOK))
                # A process that was stopped did not wait meanwhile: what came is still to be taken.
                begun += max(0.0, time.monotonic() - now - _LOOK)
            return arrival

    def dial(self, address: str, done: Callable[[str], None] = lambda _: None) -> None:
        """Link with who will listen at an `ipc://` address, in a thread, however late that is, and again when
        the link has ended; `done` gets the peer's name.
        """
        self._start_dialling(address, done, _DIAL_SOON)

    def close(self) -> None:
        """End the thread and the endpoint. Tensors that were taken stay."""
        if os.getpid() == self._pid:
            self._closed.set()
            self.endpoint.close()
            if self._thread.is_alive():
                self._thread.join(_LOOK)
            with self._came:
                self._queues.clear()
                self._came.notify_all()

    def _pop(self, sender: str, key: Key) -> Arrival | None:
        queue = self._queues.get(sender, deque())
        place = next((place for place, (found, _) in enumerate(queue) if found == key), None)
        if place is None:
            return None
        _, arrival = queue[place]
        del queue[place]
        for _ in range(place):
            if queue[0][0][:2] == key[:2]:
                break
            queue.popleft()
        return arrival

    def _why_lost(self, sender: str, key: Key) -> str:
        """Why what did not come will not; "" while it may."""
        if self._closed.is_set():
            return "before this end was closed"
        if sender in self._left:
            return "before that left"
        if key[0] == sender and key[2] <= self._latest.get(sender, 0):  # what one sends comes in order
            return "before later ones"
        return ""

    def _account(self, sender: str) -> str:
        try:
            return self.endpoint.account(sender)
        except Closed as error:
            return str(error)

    # ------------------------------------------------------------------ in the threads

    def _serve(self) -> None:
        next_look = 0.0
        while not self._closed.is_set():
            try:
                left = next_look - time.monotonic()
                if left <= 0:
                    next_look = time.monotonic() + _LOOK  # should this one fail
                    self._forget_the_dead()
                    left = _LOOK_SOON if self._look() else _LOOK
                    next_look = time.monotonic() + left
                self._sort(self.endpoint.receive(timeout=left))
            except Closed:
                return
            except Timeout:
                continue
            except PeerGone:  # nobody is linked of whom something could come
                self._closed.wait(_LOOK_SOON)
            except Exception as error:  # noqa: BLE001  # without this thread no peer is answered
                # After `close` it may be that the poller was closed under this thread's feet.
                if not self._closed.is_set():
                    kind = type(error).__name__
                    self._warnings.tell(_log.warning, f"tensorferry: {kind}: {error}", kind)
                    if isinstance(error, ProtocolError):
                        self._refuse()
                    self._closed.wait(_LOOK_SOON)

    def _sort(self, message: Message) -> None:
        body = message.body
        if "tensor" not in body:
            self._notice(message.sender, body)
            return
        tensor: torch.Tensor = body["tensor"]
        arrival: Arrival = (tensor.clone(), None) if body["copy"] else (tensor, message)
        with self._came:
            who, of, number = body["key"]
            self._queues.setdefault(message.sender, deque()).append(((who, of, number), arrival))
            if who == message.sender:
                self._latest[who] = number
            self._refused = math.inf
            self._came.notify_all()

    def _refuse(self) -> None:
        """Of whom and with which key it was cannot be said."""
        with self._came:
            self._refused = time.monotonic()
            self._came.notify_all()

    def _forget_the_dead(self) -> None:
        linked = set(self._linked)  # before the look: who links meanwhile has not left
        there = {peer.name for peer in self.endpoint.peers}
        with self._came:
            left = [self._linked.pop(name) for name in linked - there]
            self._left |= linked - there
            for gone in set(self._queues) - there:
                del self._queues[gone]
            self._came.notify_all()
        for address, done in left:  # for as long as it is gone, this looks for a socket
            self._start_dialling(address, done, _DIAL_LATER)

    def _start_dialling(self, address: str, done: Callable[[str], None], pause: float) -> None:
        arguments = (address, done, pause)
        threading.Thread(target=self._dial, args=arguments, name="tensorferry-dial", daemon=True).start()

    def _dial(self, address: str, done: Callable[[str], None], pause: float) -> None:
        start = time.monotonic()
        refused = said = False
        while not self._closed.wait(pause):
            try:
                if exists(address):
                    self._link(address, done)
                    return
                why = "no socket is there"
            except Closed:
                return
            except Timeout as error:
                why = str(error)
            except TransportError as error:  # such as that it knows the link before for alive
                why = str(error)
                if not refused:
                    text = "tensorferry: %s; its tensors go another way; asked again every %g s"
                    _log.warning(text, error, _DIAL_LATER)
                refused = True
            waited = time.monotonic() - start
            if refused or waited > _DIAL_SOON_FOR:
                pause = _DIAL_LATER
            if waited > _SAY_AFTER and not said:
                said = True
                text = (
                    "tensorferry: no link with %s in %g s (%s): who is to listen there loads a model, has"
                    " ended or is on another host; tensors go another way until then; looked for every %g s"
                )
                _log.info(text, address, _SAY_AFTER, why, _DIAL_LATER)

    def _link(self, address: str, done: Callable[[str], None]) -> None:
        name = self.endpoint.connect(address, timeout=_DIAL_TIMEOUT)
        with self._came:
            self._linked[name] = address, done
            self._left.discard(name)
        done(name)
