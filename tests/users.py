"""For tests: files and folders that whoever runs them, be it root, may not touch for a while."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NOBODY = 65534


@contextmanager
def forbidden(path: Path) -> Iterator[None]:
    """Nobody may read, write or enter it. Root may whatever the mode says, and is somebody else meanwhile."""
    mode, user = path.stat().st_mode, os.geteuid()
    path.chmod(0)
    if user == 0:
        os.seteuid(_NOBODY)
    try:
        yield
    finally:
        os.seteuid(user)
        path.chmod(mode)
