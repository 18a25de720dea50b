"""Two ends on two hosts for `bench.tcp`: an endpoint each, and a plain socket beside it."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transport
from bench import cable

MIB, GIB = 1 << 20, 1 << 30
TIMEOUT = 60.0
RING_BYTES, WINDOW = 2 * GIB, 256 * MIB


class Ends:
    """What both parts of a row share: the network, the keys, the configuration."""

    def __init__(self, folder: Path, way: str, network: str) -> None:
        self.folder = folder
        self.way = way
        self.address = f"tcp://{cable.host(network)}:29700"
        self.floor = (cable.host(network), 29701)
        self._keys = way.endswith("keys")
        if network == "veth":
            cable.own_host()

    def config(self, *, near: bool) -> transport.TransportConfig:
        """`near` listens, and makes the keys."""
        fields: dict[str, Any] = {"insecure": True, "ring_bytes": RING_BYTES, "tcp_window": WINDOW}
        fields["backend"] = "frames" if self.way.startswith("frames") else "tcp"
        fields["detour_bytes"] = 2 * GIB
        if self._keys:
            who = "near" if near else "far"
            fields["curve_key"] = str(self.folder / f"{who}.key_secret")
            fields["curve_clients"] = str(self.folder)
            fields["curve_server"] = str(self.folder / "near.key")
        return transport.TransportConfig(timeout=TIMEOUT, handshake_timeout=TIMEOUT, **fields)

    def make_keys(self) -> None:
        """For both ends, by near."""
        if self._keys:
            for who in ("near", "far"):
                transport.make_keys(self.folder, who, public=self.folder)


@contextlib.contextmanager
def near_end(folder: Path, way: str, network: str) -> Iterator[tuple[transport.Endpoint, socket.socket]]:
    """Listens: the endpoint, linked with the far one, and the floor's socket."""
    ends = Ends(folder, way, network)
    if network == "veth":
        cable.join_far(folder)
    ends.make_keys()
    with (
        transport.listen(ends.address, config=ends.config(near=True)) as endpoint,
        socket.create_server(ends.floor) as server,
    ):
        cable.leave(folder / "listening", "yes")
        server.settimeout(TIMEOUT)
        floor, _ = server.accept()
        with floor:
            floor.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            floor.settimeout(TIMEOUT)
            endpoint.wait_for_peers(1, timeout=TIMEOUT)
            yield endpoint, floor


@contextlib.contextmanager
def far_end(folder: Path, way: str, network: str) -> Iterator[tuple[transport.Endpoint, socket.socket]]:
    """Connects: the same."""
    ends = Ends(folder, way, network)
    if network == "veth":
        cable.join_near(folder)
    cable.wait_for(folder / "listening")
    with (
        socket.create_connection(ends.floor, timeout=TIMEOUT) as floor,
        transport.connect(ends.address, name="far", config=ends.config(near=False)) as endpoint,
    ):
        floor.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield endpoint, floor
