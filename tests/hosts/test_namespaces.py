"""The two hosts of the tests are two: what the one has in /dev/shm, the other has not."""

from __future__ import annotations

import socket

import pytest

from tests.hosts.namespaces import two_hosts

pytestmark = pytest.mark.netns

_SAY = "import socket, sys; s = socket.create_server(('', 7000)); print('up', flush=True); s.accept()"
_ASK = "import socket, sys; socket.create_connection((sys.argv[1], 7000), timeout=20)"


@pytest.mark.parametrize("one_network", [False, True])
def test_hosts_share_the_network_and_no_memory(one_network: bool) -> None:
    with two_hosts(one_network=one_network, names=("same", "same")) as (head, far):
        head.done(["sh", "-c", "echo > /dev/shm/mine"])
        assert head.done(["ls", "/dev/shm"]) == "mine\n"
        assert far.done(["ls", "/dev/shm"]) == ""
        assert {host.done(["hostname"]) for host in (head, far)} == {"same\n"}
        with head.run(["python3", "-c", _SAY]) as server:
            assert server.stdout is not None
            assert server.stdout.readline() == "up\n"
            far.done(["python3", "-c", _ASK, head.address])
            assert server.wait(20) == 0
    assert socket.gethostname() != "same"


def test_a_pulled_cable_is_a_network_that_is_gone() -> None:
    with two_hosts() as (head, far):
        ask = ["python3", "-c", _ASK, far.address]
        with pytest.raises(OSError, match="Connection refused"):  # there, and nobody listens
            head.done(ask)
        head.cable("down")
        with pytest.raises(OSError, match="Network is unreachable"):
            head.done(ask)
        head.cable("up")
        with pytest.raises(OSError, match="Connection refused"):
            head.done(ask)
