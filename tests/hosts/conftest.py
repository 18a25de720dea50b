"""What the tests over two hosts share: the fork server, opened before anything is judged."""

from __future__ import annotations

import pytest

from transport import conformance


@pytest.fixture(scope="session", autouse=True)
def opened_once() -> None:
    conformance.prepare()
    with conformance.running(print):
        pass
