"""What the transport's tests share: what a process opens once and keeps, opened before anything is judged."""

from __future__ import annotations

import pytest
import zmq

from transport import conformance


@pytest.fixture(scope="session", autouse=True)
def opened_once() -> None:
    """The fork server that peers come from, and pyzmq's thread that lets go of what it sent uncopied."""
    conformance.prepare()
    with conformance.running(print):
        pass
    with zmq.Context() as context, context.socket(zmq.PAIR) as one, context.socket(zmq.PAIR) as other:
        one.bind("inproc://once")
        other.connect("inproc://once")
        one.send(bytes(1 << 20), copy=False)
        other.recv()
