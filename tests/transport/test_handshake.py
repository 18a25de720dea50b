"""How links begin: addresses, hello and welcome, names, and what is said when they do not."""

from __future__ import annotations

import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import zmq

import transport
from tests.crash.harness import until
from tests.users import forbidden
from transport import message as wire_types
from transport.conformance import WAIT, joined, left, running, serve, serving

FRAMES = transport.TransportConfig(backend="frames", timeout=WAIT)
OPTIONS = {"backend": "frames", "timeout": WAIT}


# ------------------------------------------------------------------------------------ who is there


def says(what: str, address: str, config: transport.TransportConfig, name: str = "r") -> None:
    """Try to connect until the error says so. How far a handshake gets in a short time is not said."""

    def is_said() -> bool:
        with pytest.raises(transport.Timeout) as caught:
            transport.connect(address, name=name, config=config, timeout=0.3)
        return re.search(what, str(caught.value)) is not None

    until(is_said, what)


@pytest.mark.parametrize("scheme", ["ipc", "tcp"])
def test_nobody_listens(scheme: str, short_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # bound and not listening: nobody else gets the port meanwhile
        tcp = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        address = tcp if scheme == "tcp" else f"ipc://{short_path}/nobody.sock"
        with pytest.raises(
            transport.Timeout, match=f"'r' could not connect to {address} in 0.3 s: nobody listens there"
        ):
            transport.connect(address, name="r", config=FRAMES, timeout=0.3)


def test_a_socket_of_another_user_is_not_said_to_be_nobodys(short_path: Path) -> None:
    path = short_path / "theirs.sock"
    with transport.listen(f"ipc://{path}", config=FRAMES), forbidden(path):
        may_not = r"user \d+ may not connect there: both ends have to run as one user"
        with pytest.raises(transport.Timeout, match=may_not):
            transport.connect(f"ipc://{path}", name="r", config=FRAMES, timeout=0.3)


def test_a_folder_that_may_not_be_entered_is_an_error_of_the_transport(short_path: Path) -> None:
    folder = short_path / "theirs"
    folder.mkdir()
    address = f"ipc://{folder}/inner/front.sock"
    with (
        forbidden(folder),
        pytest.raises(transport.TransportError, match=f"cannot listen at {address}: Permission denied"),
    ):
        transport.listen(address)


def test_somebody_listens_and_does_not_answer(address: str) -> None:
    with transport.listen(address, config=FRAMES):  # and makes no call
        says("somebody listens there, but does not answer", address, FRAMES)


def test_the_listener_may_come_later(address: str) -> None:
    with ThreadPoolExecutor(1) as pool:
        tried = threading.Event()

        def connect() -> transport.Endpoint:
            with pytest.raises(transport.Timeout):
                transport.connect(address, name="r", config=FRAMES, timeout=0.1)
            tried.set()
            return transport.connect(address, name="r", config=FRAMES, timeout=WAIT)

        connecting = pool.submit(connect)
        assert tried.wait(WAIT)
        with transport.listen(address, config=FRAMES) as front:
            front.wait_for_peers({"r"}, timeout=WAIT)
            with connecting.result(WAIT) as endpoint:
                assert [info.name for info in endpoint.peers] == ["front"]


def test_waiting_for_peers_says_who_is_missing(address: str) -> None:
    with transport.listen(address, config=FRAMES) as front:
        with pytest.raises(transport.Timeout, match="waited 0.01 s for 1 peers; linked: nobody"):
            front.wait_for_peers(1, timeout=0.01)
        with joined(front, "a", FRAMES):
            front.wait_for_peers(1, timeout=WAIT)
            front.wait_for_peers("a", timeout=WAIT)
            with pytest.raises(
                transport.Timeout, match=r"waited \S+ s for b, c; linked: 'a' \(pid \d+\) at ipc://"
            ):
                front.wait_for_peers({"a", "b", "c"}, timeout=0.01)


# ------------------------------------------------------------------------------------ names


def test_a_name_is_taken_while_its_owner_lives_and_free_after_its_death(address: str) -> None:
    with transport.listen(address, config=FRAMES) as front, serving(front, "r", OPTIONS) as process:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGSTOP)  # slow is not dead
        with ThreadPoolExecutor(1) as pool:
            connecting = pool.submit(transport.connect, address, name="r", config=FRAMES, timeout=WAIT)
            while not connecting.done():
                front.try_receive()
        with pytest.raises(
            transport.PeerGone,
            match=f"refuses 'r': the name 'r' is taken by pid {process.pid} over (a Unix|tcp://)",
        ):
            connecting.result()
        assert front.statistics()["dropped"] == {"refused": 1}
        process.kill()
        process.join(WAIT)
        with joined(front, "r", FRAMES) as again:
            assert [info.pid for info in front.peers] == [os.getpid()]
            front.send({"n": 1}, to="r")
            assert again.receive().body == {"n": 1}


def test_the_name_of_the_listener_itself(address: str) -> None:
    with transport.listen(address, name="f", config=FRAMES) as front, ThreadPoolExecutor(1) as pool:
        connecting = pool.submit(transport.connect, address, name="f", config=FRAMES, timeout=WAIT)
        while not connecting.done():
            front.try_receive()
        with pytest.raises(transport.PeerGone, match="the name 'f' is this endpoint's own"):
            connecting.result()


def test_two_listeners_of_one_name(short_path: Path) -> None:
    addresses = [f"ipc://{short_path}/{n}.sock" for n in "ab"]
    with (
        transport.listen(addresses[0], config=FRAMES) as one,
        transport.listen(addresses[1], config=FRAMES) as other,
        joined(one, "r", FRAMES) as endpoint,
        ThreadPoolExecutor(1) as pool,
    ):
        connecting = pool.submit(endpoint.connect, addresses[1], timeout=WAIT)
        while not connecting.done():
            other.try_receive()
        with pytest.raises(transport.PeerGone, match="two peers call themselves 'front'"):
            connecting.result()
        one.send({"n": 1})
        assert endpoint.receive().body == {"n": 1}


@pytest.mark.parametrize("name", ["", "x" * 65])
def test_names_have_a_length(name: str) -> None:
    with pytest.raises(ValueError, match="1 to 64 characters"):
        transport.Endpoint(name)


def test_another_version_is_refused_with_both_numbers(address: str) -> None:
    hello = wire_types.Hello(
        version=99, nonce=5, name="raw", pid=1, window=8, patience=0, accepts=["inline", "frames"]
    )
    with (
        transport.listen(address, config=FRAMES) as front,
        zmq.Context() as context,
        context.socket(zmq.DEALER) as raw,
    ):
        raw.connect(address)
        raw.send(wire_types.encode(hello))
        while not raw.poll(5):
            front.try_receive()
        answer = wire_types.decode(raw.recv())
        assert isinstance(answer, wire_types.Refused)
        assert answer.reason == f"this endpoint speaks version {wire_types.VERSION}, not 99"
        assert front.peers == []


def test_more_peers_than_allowed(address: str) -> None:
    config = transport.TransportConfig(backend="frames", max_peers=1)
    with transport.listen(address, config=config) as front, joined(front, "a", FRAMES):
        with ThreadPoolExecutor(1) as pool:
            connecting = pool.submit(transport.connect, address, name="b", config=FRAMES, timeout=WAIT)
            while not connecting.done():
                front.try_receive()
        with pytest.raises(transport.PeerGone, match=r"there are 1 peers \(max_peers is 1\); .*one has left"):
            connecting.result()


def test_a_peer_that_died_is_named_with_the_reason(address: str) -> None:
    with transport.listen(address, config=FRAMES) as front:
        with running(serve, address, "r", OPTIONS):
            front.wait_for_peers({"r"}, timeout=WAIT)
        left(front)  # killed by now
        assert front.statistics()["left"] == {"r": "is gone: the connection ended"}
        with pytest.raises(
            transport.PeerGone, match=r"'r' is gone: the connection ended \d+\.\d s ago; linked: nobody"
        ):
            front.send({}, to="r")
        with pytest.raises(transport.PeerGone, match="nobody is linked with 'front': 'r' is gone"):
            front.send({})


# ------------------------------------------------------------------------------------ addresses


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("front.sock", "is no address: use ipc://PATH or tcp://HOST:PORT"),
        ("udp://127.0.0.1:5", "is no address"),
        ("ipc://", "is no address"),
        ("tcp://127.0.0.1", "is no address: use tcp://HOST:PORT"),
        ("tcp://127.0.0.1:http", "is no address"),
        ("ipc:///tmp/" + "x" * 110, "longer than 107 bytes; use a shorter one"),
        ("ipc:///no/such/folder/s", "there is no folder /no/such/folder"),
        ("ipc://@abstract", "use a path in the file system"),
        ("tcp://0.0.0.0:0", "is not a loopback address, and nothing here is encrypted"),
        ("tcp://192.0.2.1:5000", "is not a loopback address"),
        ("tcp://nohost.invalid:3", "cannot listen at .*: the name 'nohost.invalid' is not known here"),
        ("tcp://" + "x" * 70 + ".com:3", "is not known here"),
        ("tcp://127.0.0.1:99999", "is no address: a port is a number from 0 to 65535"),
    ],
)
def test_addresses_that_cannot_be_listened_at(address: str, words: str) -> None:
    with pytest.raises(transport.TransportError, match=words):
        transport.listen(address)


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("tcp://127.0.0.1:0", "a port is a number from 1 to 65535"),
        ("tcp://127.0.0.1:65536", "a port is a number from 1 to 65535"),
        ("tcp://*:5000", "is no address to connect to"),
    ],
)
def test_addresses_that_cannot_be_connected_to(address: str, words: str) -> None:
    with pytest.raises(transport.TransportError, match=words):
        transport.connect(address, name="r", timeout=0.1)


def test_a_name_that_is_never_known() -> None:
    with pytest.raises(
        transport.Timeout,
        match="'r' could not connect to tcp://nohost.invalid:5 in 0.1 s: the name 'nohost.invalid' is",
    ):
        transport.connect("tcp://nohost.invalid:5", name="r", timeout=0.1)


def test_a_peer_is_shown_where_it_was_dialled() -> None:
    with transport.listen("tcp://localhost:0", config=FRAMES) as front:
        address = f"tcp://localhost:{front.addresses[0].rpartition(':')[2]}"
        with ThreadPoolExecutor(1) as pool:
            connecting = pool.submit(transport.connect, address, name="r", config=FRAMES, timeout=WAIT)
            front.wait_for_peers({"r"}, timeout=WAIT)
            with connecting.result(WAIT) as endpoint:
                assert [info.address for info in endpoint.peers] == [address]


def test_who_listens_closes_every_connection() -> None:
    """As a proxy does that has nobody behind it."""
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:

        def close_all() -> None:
            while True:
                accepted, _ = server.accept()
                with accepted, suppress(ConnectionResetError):
                    if accepted.recv(4) == b"done":
                        return

        closing = pool.submit(close_all)
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        try:
            says("closes the connection .* it is no endpoint at all", address, FRAMES)
        finally:
            with socket.create_connection(server.getsockname()) as last:
                last.sendall(b"done")
            closing.result(WAIT)


def test_another_host_may_be_dialled() -> None:
    with pytest.raises(transport.Timeout):  # and not: refused as an address
        transport.connect("tcp://127.0.0.2:9", name="r", timeout=0.1)


def test_insecure_allows_every_address() -> None:
    config = transport.TransportConfig(backend="frames", insecure=True)
    with transport.listen("tcp://0.0.0.0:0", config=config) as front:
        assert not front.addresses[0].endswith(":0")


def test_a_living_listener_keeps_its_address(address: str) -> None:
    with transport.listen(address, config=FRAMES) as front:
        with pytest.raises(transport.TransportError, match="somebody is listening there already"):
            transport.listen(address, config=FRAMES)
        with joined(front, "r", FRAMES):
            pass


def test_the_socket_of_a_dead_listener_is_replaced(address: str) -> None:
    code = "import os, sys, transport; transport.listen(sys.argv[1]); os._exit(0)"
    subprocess.run([sys.executable, "-c", code, address], check=True)
    assert stat.S_ISSOCK(os.stat(address.removeprefix("ipc://")).st_mode)
    with transport.listen(address, config=FRAMES) as front, joined(front, "r", FRAMES):
        pass


def test_other_files_are_left_alone(short_path: Path) -> None:
    path = short_path / "file"
    path.write_text("precious")
    with pytest.raises(transport.TransportError, match="a file that is no socket is there"):
        transport.listen(f"ipc://{path}")
    assert path.read_text() == "precious"


def test_a_taken_port() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            transport.TransportError,
            match=f"cannot listen at tcp://127.0.0.1:{port}: Address already in use$",
        ):
            transport.listen(f"tcp://127.0.0.1:{port}")


def test_a_socket_file_is_for_its_owner_only_and_goes_at_close(address: str) -> None:
    path = Path(address.removeprefix("ipc://"))
    with transport.listen(address, config=FRAMES):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not path.exists()


def test_several_addresses_of_both_kinds(address: str) -> None:
    with transport.listen([address, "tcp://127.0.0.1:0"], config=FRAMES) as front:
        assert front.addresses[0] == address
        for way in front.addresses:
            with ThreadPoolExecutor(1) as pool:
                connecting = pool.submit(transport.connect, way, name="r", config=FRAMES, timeout=WAIT)
                front.wait_for_peers({"r"}, timeout=WAIT)
                with connecting.result(WAIT) as endpoint:
                    assert [info.address for info in front.peers] == [way]
                    assert [info.address for info in endpoint.peers] == [way]
            left(front)
