"""What the tests in real vLLM share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small random model."""
    from bench.hops.model import write_model

    folder = tmp_path_factory.mktemp("model")
    write_model(folder)
    return folder
