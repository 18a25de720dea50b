"""The suite that comes with tensorferry, over this backend."""

from __future__ import annotations

from transport.conformance import BackendConformance


class TestFile(BackendConformance):
    backend = "file"
    survives_close = False
