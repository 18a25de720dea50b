"""What the transport's tests share: what a process opens once and keeps, opened before anything is judged."""

from __future__ import annotations

import pytest

from transport import conformance


@pytest.fixture(scope="session", autouse=True)
def opened_once() -> None:
    """The fork server that peers come from."""
    conformance.prepare()
    with conformance.running(print):
        pass


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No leader of a crossing is taken for one that takes nothing, however busy this machine is."""
    monkeypatch.setattr("transport.bulk.crossing._PATIENCE", 1000.0)
