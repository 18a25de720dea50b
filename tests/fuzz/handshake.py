"""What a stranger at a socket can say: greetings, offers, proofs, messages, in any order, right or wrong."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np
import zmq

import shm
import transport
from tests.fuzz.draw import Draw
from transport import message as wire_types
from transport.message import Control, Piece, Reference
from transport.process import own_mark
from transport.specs import TensorSpec
from transport.wire import Arrived, Route

_WAIT = 30.0
_IDENTITY = b"stranger"
_NONCE = 5
_MOST_STEPS = 24
_GREETING = 25  # bytes of an input that a greeting takes when all is right in it
_BACKENDS = ["shm", "frames", "inline", "parts", "warp"]
_BODY = msgspec.msgpack.encode({"x": msgspec.msgpack.Ext(1, bytes(4))})
_CONFIG = transport.TransportConfig(
    ring_bytes=1 << 16,
    inline_below=64,
    max_tensors=8,
    max_readers=2,
    max_peers=2,
    max_queued_messages=4,
    max_control_bytes=8192,
    max_message_bytes=1 << 16,
    detour_bytes=1 << 16,
    handshake_timeout=_WAIT,
    linger=0.0,
)
_KINDS: tuple[type[msgspec.Struct], ...] = get_args(Control)


class Handshake:
    """A real endpoint with a real socket to a stranger; whatever it hears, it goes on and keeps nothing.

    What the stranger says goes straight to where messages from the socket go, so that an input is the same
    each time; what the endpoint answers goes out.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._front = transport.listen(f"ipc://{self._folder}/front.sock", config=_CONFIG)
        self._exchange = self._front._exchange
        self._context = zmq.Context()
        self._dealer = self._context.socket(zmq.DEALER)
        self._dealer.setsockopt(zmq.IDENTITY, _IDENTITY)
        self._dealer.connect(self._front.addresses[0])
        self._router = self._context.socket(zmq.ROUTER)
        self._router.bind(f"ipc://{self._folder}/other.sock")
        (listening,) = self._exchange.wire._routers
        self._listening = Route(listening, _IDENTITY)
        self._ring = shm.RingWriter(1 << 16, slots=8, columns=2)
        self._meet()

    def _meet(self) -> None:
        """The endpoint knows the connection by what came over it."""
        self._dealer.send(b"")
        deadline = time.monotonic() + _WAIT
        while not self._front.statistics()["dropped"]:
            assert time.monotonic() < deadline, "the stranger does not get through"
            time.sleep(0.001)

    def close(self) -> None:
        self._front.close()
        self._ring.close()
        self._context.destroy(linger=0)

    def seeds(self) -> list[bytes]:
        """Inputs to begin with: a greeting, and after it every kind of message once, as right as can be."""
        hello = bytes((1, 0)) + bytes(_GREETING)
        return [
            b"\0" + hello,
            *(b"\0" + hello + bytes((1, kind)) + bytes(24) for kind in range(len(_KINDS))),
            b"\1" + bytes((1, 1)) + bytes(20),
            *(b"\0" + hello + bytes((step,)) + bytes(24) for step in (2, 3, 4, 5)),
            b"\0" + hello + bytes((1, _KINDS.index(wire_types.Offered), 0, 0, 0, 0, 0, 1)),  # and withdrawn
        ]

    def __call__(self, data: bytes) -> None:
        draw = Draw(data)
        dials = draw.chance(8)
        route = self._dial() if dials else self._listening
        self._arrived = 0
        try:
            for _ in range(_MOST_STEPS):
                if not draw.left:
                    break
                self._step(draw, route)
            self._let_go()
        finally:
            if dials:
                self._exchange._dialling.pop(route.socket, None)
                self._exchange.wire.hang_up(route.socket)
        self._check()

    def _dial(self) -> Route:
        number = self._exchange.wire.dial(f"ipc://{self._folder}/other.sock")
        self._exchange._dialling[number] = _NONCE, None
        return Route(number)

    def _step(self, draw: Draw, route: Route) -> None:
        """The stranger says something, or the endpoint does something with what it heard."""
        match draw.byte() % 6:
            case 0:
                self._say(route, draw.take(255))
            case 1:
                self._say(route, draw.spoilt(wire_types.encode(self._message(draw, route))), draw)
            case 2:
                with suppress(transport.TransportError):
                    self._front.try_receive(draw.pick((Any, dict[str, np.ndarray[Any, Any]], int)))
            case 3:
                with suppress(transport.TransportError, ValueError):
                    self._front.try_send({"x": np.zeros(draw.pick((3, 200, 20_000, 60_000)), np.uint8)})
            case 4:
                assert len(self._front.peers) <= _CONFIG.max_peers
            case 5:
                # A peer that proves what it was offered, as far as a mapping of the same process can.
                self._say(route, wire_types.encode(wire_types.Answered(self._link(route), "shm", b"")))

    def _say(self, route: Route, control: bytes, draw: Draw | None = None) -> None:
        frames = [np.frombuffer(draw.take(200), np.uint8) for _ in range(draw.byte() % 3)] if draw else []
        self._exchange._handle(Arrived(route, control, frames))

    def _link(self, route: Route) -> int:
        link = self._exchange.roster.at(route)
        return 1 if link is None else link.peer.link

    # ------------------------------------------------------------------ what can be said

    def _message(self, draw: Draw, route: Route) -> Control:
        """A message of some kind; each of its fields right, or not."""
        kind = draw.pick(_KINDS)
        fields = {name: self._field(draw, name, route) for name in kind.__struct_fields__}
        message: Control = kind(**fields)  # type: ignore[assignment]  # all kinds there are
        return message

    def _field(self, draw: Draw, name: str, route: Route) -> Any:
        wrong = draw.chance(6)
        match name:
            case "link":
                return draw.word() if wrong else self._link(route)
            case "number":
                link = self._exchange.roster.at(route)
                return draw.word() if wrong or link is None else link.arrived + 1
            case "version":
                return draw.number() if wrong else wire_types.VERSION
            case "nonce":
                return draw.word() if wrong else _NONCE
            case "name":
                return draw.text() if wrong else draw.pick(("stranger", "other", "third", "front"))
            case "window" | "window_bytes":
                return draw.number() if wrong else 1 << draw.byte() % 32
            case "patience" | "ring_patience" | "seen" | "pid":
                return draw.number()
            case "accepts":
                return [draw.text() for _ in range(draw.byte() % 70)] if wrong else _BACKENDS[:3]
            case "process":
                return draw.take(40) if wrong else draw.pick((own_mark(), b""))
            case "reason":
                return draw.text()
            case "backend":
                return draw.pick(_BACKENDS)
            case "proof":
                return draw.pick((b"", None, draw.take(20)))
            case "offer":
                return self._offer(draw)
            case "stores" | "sizes":
                return [draw.word() for _ in range(draw.byte() % 10)]
            case "body":
                return draw.take(60) if wrong else _BODY
            case "tensors":
                return [Reference(self._spec(draw), *self._place(draw)) for _ in range(draw.byte() % 10)]
            case "pieces":
                return [self._piece(draw) for _ in range(draw.byte() % 10)]
        raise AssertionError(f"a field {name} that nobody taught this fuzzer")

    def _spec(self, draw: Draw) -> TensorSpec:
        shape = tuple(draw.number() for _ in range(draw.byte() % 70)) if draw.chance(4) else (draw.byte(),)
        return TensorSpec(draw.pick(("|u1", "torch.float32", "<U3", "object", draw.text())), shape)

    def _piece(self, draw: Draw) -> Piece:
        return Piece(draw.word(), draw.word(), draw.word(), *self._place(draw))

    def _place(self, draw: Draw) -> tuple[str, msgspec.Raw]:
        """A backend and a handle of it, or not of it."""
        handle = draw.pick(
            (draw.byte() % 3, draw.take(60), [draw.number() for _ in range(7 + draw.byte() % 2)])
        )
        return draw.pick(_BACKENDS), msgspec.Raw(msgspec.msgpack.encode(handle))

    def _offer(self, draw: Draw) -> bytes:
        """An offer of a ring that is there, spoilt or not."""
        if draw.chance(3):
            return draw.take(80)
        try:
            offer = self._ring.offer()
        except shm.RingFull:
            return b""
        if draw.chance(4):
            self._ring.withdraw(offer)
        return draw.spoilt(msgspec.msgpack.encode(list(offer)))

    # ------------------------------------------------------------------ what must be

    def _let_go(self) -> None:
        """All links end and all messages are taken, so that the next input finds what this one found."""
        for link in self._exchange.roster.links():
            self._exchange._finish(link, "the input is over")
        while self._exchange.receiver.queue:
            with suppress(transport.TransportError):
                self._front.try_receive()
        for socket in (self._dealer, self._router):
            with suppress(zmq.Again):
                while True:
                    self._hear(socket.recv_multipart(zmq.NOBLOCK))

    def _hear(self, frames: list[bytes]) -> None:
        """What the endpoint answers names neither the ring that it was offered nor a path of its own."""
        for frame in frames:
            assert self._ring.name.split(".")[2].encode() not in frame
            assert str(self._folder).encode() not in frame

    def _check(self) -> None:
        """Nothing of what was said is kept."""
        figures = self._front.statistics()
        assert self._front.peers == []
        ring = figures["backend"]["shm"].get("ring")
        assert ring is None or ring.live == 0
        inbound = self._exchange.receiver.inbounds["shm"]
        assert inbound.statistics()["rings"] == 0
        assert not inbound._proved  # type: ignore[attr-defined]
        assert not inbound._identities  # type: ignore[attr-defined]
        assert not self._exchange.receiver._assemblies
        assert not self._exchange.sender.introductions._offers
