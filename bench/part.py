"""The child process of a row: calls one function and leaves what it returned, or why it failed, as JSON.

Started by `bench.harness` as `python -m bench.part SPEC`. What a part returns is a `Report`; whatever else
happens (an exception, a signal, an exit without a result) the harness shows as FAILED with the reason.
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeAlias

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"

_PR_SET_PDEATHSIG = 1


class WrongAnswerError(Exception):
    """The bytes that arrived are not the bytes that were sent."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one part measured, how many answers it expects to be checked, and how many it checked."""

    values: Mapping[str, Json] = field(default_factory=dict)
    expected: int = 0
    verified: int = 0


def result_path(folder: Path, role: str) -> Path:
    """Where the part ``role`` leaves its result."""
    return folder / f"{role}.json"


def _die_with_parent() -> None:
    # A harness that was killed must not leave parts behind that go on loading the machine.
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _function(call: str) -> Callable[..., Report]:
    module, _, name = call.partition(":")
    function: Callable[..., Report] = getattr(importlib.import_module(module), name)
    return function


def _write(path: Path, result: Mapping[str, Json]) -> None:
    # Renamed into place: a part that dies while it writes has left no result, not half of one.
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(result))
    os.replace(draft, path)


def record(folder: Path, role: str, call: Callable[[], Report]) -> None:
    """Leave what `call` returned as the result of `role`, or why it failed, and raise that again."""
    path = result_path(folder, role)
    try:
        _write(path, asdict(call()))
    except Exception as error:
        _write(path, {"failure": f"{type(error).__name__}: {error}"})
        raise


def main(spec: Mapping[str, Json]) -> int:
    """Run the part that `spec` (call, role, folder, arguments) describes; return the exit status."""
    _die_with_parent()
    faulthandler.enable()
    folder, arguments = Path(str(spec["folder"])), spec["arguments"]
    assert isinstance(arguments, Mapping)
    record(folder, str(spec["role"]), lambda: _function(str(spec["call"]))(folder, **arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
