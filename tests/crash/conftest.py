"""What the crash tests share: the fork server that roles come from is there before anything is judged."""

from __future__ import annotations

import pytest

from tests.crash import harness


@pytest.fixture(scope="session", autouse=True)
def opened_once() -> None:
    """What a process opens once and keeps is not the first test's doing."""
    harness.prepare()
