"""What `tensorferry doctor` tries on a machine with a GPU."""

from __future__ import annotations

import pytest

import transport

pytestmark = pytest.mark.gpu


def test_shared_memory_can_be_registered_here_again_and_again() -> None:
    assert [transport.try_registration() for _ in range(3)] == [""] * 3
