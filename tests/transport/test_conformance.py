"""The conformance suite over our own backends."""

from __future__ import annotations

from transport.conformance import BackendConformance


class TestInline(BackendConformance):
    backend = "inline"


class TestFrames(BackendConformance):
    backend = "frames"


class TestFramesOverTcp(BackendConformance):
    backend = "frames"
    scheme = "tcp"


class TestShm(BackendConformance):
    backend = "shm"
    holds_memory = True


class TestAuto(BackendConformance):
    backend = "auto"


class TestAutoOverTcp(BackendConformance):
    backend = "auto"
    scheme = "tcp"


class TestTcp(BackendConformance):
    backend = "tcp"
    scheme = "tcp"


class TestTcpBesideIpc(BackendConformance):
    backend = "tcp"
