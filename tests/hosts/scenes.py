"""What the processes of a test do on their hosts: they come from the fork server and enter namespaces."""

from __future__ import annotations

import ctypes
import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import transport
from transport import TransportConfig
from transport.backends.tcp import TcpOutbound
from transport.bulk import crossing
from transport.bulk.frames import Frame, Kind
from transport.conformance import WAIT, digest, noise, serve

MIB = 1 << 20
_libc = ctypes.CDLL(None, use_errno=True)


def enter(pid: int) -> None:
    """Be on the host whose namespaces that process holds."""
    spaces = [os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY) for kind in ("net", "ipc", "uts", "mnt")]
    for space in spaces:
        if _libc.setns(space, 0):
            raise OSError(ctypes.get_errno(), f"process {os.getpid()} cannot enter a namespace of {pid}")
        os.close(space)


def _fields(options: Mapping[str, Any]) -> dict[str, Any]:
    patience = {"timeout": WAIT, "admission_timeout": WAIT}
    return {"insecure": True, "ring_bytes": 64 * MIB, **patience, **options}


def peer(pid: int, address: str, name: str, options: Mapping[str, Any]) -> None:
    """Answer what comes, as the conformance suite's peers do."""
    enter(pid)
    serve(address, name, _fields(options))


def who_asks_for_names(
    pid: int, told: Connection, address: str, name: str, options: Mapping[str, Any]
) -> None:
    """A `peer` that tells of each name that is not known."""
    enter(pid)
    ask = socket.getaddrinfo

    def asked(host: Any, *more: Any, **options: Any) -> Any:
        try:
            return ask(host, *more, **options)
        except OSError:
            told.send({"unknown": host})
            raise

    socket.getaddrinfo = asked
    serve(address, name, _fields(options))


def who_may_not_listen(pid: int, told: Connection, address: str) -> None:
    """Tell why."""
    enter(pid)
    try:
        transport.listen(address)
    except transport.TransportError as error:
        told.send({"error": str(error)})


def front(
    pid: int, told: Connection, address: str, options: Mapping[str, Any], count: int, nbytes: int
) -> None:
    """Send `count` messages of `nbytes`, all at once, and a small one after them; tell what was answered."""
    enter(pid)
    with transport.listen(address, config=TransportConfig(**_fields(options))) as endpoint:
        endpoint.wait_for_peers({"far"}, timeout=WAIT)
        first = noise(200_000)
        endpoint.send({"do": "sum", "value": first}, to="far")  # so that the ways are found
        assert endpoint.receive().body == digest(first)
        told.send({"backend": endpoint.peers[0].backend})
        try:
            told.send(_ask(endpoint, count, nbytes))
        except transport.PeerGone as error:
            told.send({"gone": str(error)})
            return
        endpoint.send({"do": "stop"}, to="far")


def _ask(endpoint: transport.Endpoint, count: int, nbytes: int) -> dict[str, Any]:
    values = [noise(nbytes, seed) for seed in range(count)]
    for value in values:
        endpoint.send({"do": "sum", "value": value}, to="far")
    began = time.monotonic()
    endpoint.send({"do": "echo", "value": "small"}, to="far")
    answers: list[int] = []
    before, seconds = -1, 0.0
    while len(answers) < count or before < 0:
        body = endpoint.receive().body
        if isinstance(body, dict):
            before, seconds = len(answers), time.monotonic() - began
        else:
            answers.append(body)
    statistics = endpoint.statistics()["backend"]
    return {
        "right": answers == [digest(value) for value in values],
        "before": before,
        "seconds": seconds,
        "nbytes": statistics["nbytes"],
        "connections": bulk(endpoint)["connections"],
    }


def idle_front(pid: int, told: Connection, address: str, options: Mapping[str, Any]) -> None:
    """Nothing is under way. Once told, say one word on either connection; tell how the link ends."""
    enter(pid)
    with transport.listen(address, config=TransportConfig(**_fields(options))) as endpoint:
        endpoint.wait_for_peers({"far"}, timeout=WAIT)
        value = noise(200_000)
        endpoint.send({"do": "sum", "value": value}, to="far")
        told.send({"right": endpoint.receive().body == digest(value)})
        told.recv()
        endpoint.send({"do": "echo", "value": "small"}, to="far")
        outbound = endpoint._exchange.sender.outbound.part("tcp")
        assert isinstance(outbound, TcpOutbound)
        for way in list(outbound.hub._ways.values()):
            outbound.hub.tell(partial(way.channel.post, Frame(Kind.CANCEL, 0)))
        deadline = time.monotonic() + WAIT
        while endpoint.peers and time.monotonic() < deadline:
            with suppress(transport.Timeout, transport.PeerGone):
                endpoint.receive(timeout=0.1)
        told.send({"left": endpoint.statistics()["left"]})


def front_of_two(
    pid: int, told: Connection, address: str, options: Mapping[str, Any], count: int, nbytes: int
) -> None:
    """Send each message to two peers of another host; tell whether both got all of it, and what it took."""
    enter(pid)
    names = ["first", "second"]
    with transport.listen(address, config=TransportConfig(**_fields(options))) as endpoint:
        endpoint.wait_for_peers(names, timeout=WAIT)
        right = []
        crossing._PATIENCE = WAIT  # of this process: who only stands still for a moment is waited for
        for seed in range(count):
            value = noise(nbytes, seed)
            endpoint.send({"do": "sum", "value": value}, to=names)
            right += [endpoint.receive().body == digest(value) for _ in names]
            deadline = time.monotonic() + WAIT
            while not bulk(endpoint)["neighbours"] and time.monotonic() < deadline:
                time.sleep(0.005)
        told.send({"right": all(right) and len(right) == 2 * count, "bulk": bulk(endpoint)})
        endpoint.send({"do": "stop"}, to=names)


def bulk(endpoint: transport.Endpoint) -> dict[str, Any]:
    """What an endpoint tells of its bulk connections."""
    backend = endpoint.statistics()["backend"]
    figures: dict[str, Any] = backend.get("tcp", backend)["bulk"]
    return figures
