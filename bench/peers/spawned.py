"""Both ends of a row whose channel only a child can inherit: the near end starts the far end."""

from __future__ import annotations

import contextlib
import importlib
import json
import signal
from collections.abc import Callable, Mapping
from multiprocessing.context import SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from bench import ways
from bench.floor import TIMEOUT
from bench.links import Link
from bench.part import Report, record, result_path

OpenLink = Callable[[], Link]


def context() -> SpawnContext:
    """The multiprocessing of torch, whose queues pass tensors in shared memory."""
    return importlib.import_module("torch.multiprocessing").get_context("spawn")  # type: ignore[no-any-return]


def run(
    spawner: SpawnContext,
    folder: Path,
    ends: str,
    rest: Mapping[str, Any],
    *,
    open_near: OpenLink,
    open_far: OpenLink,
) -> Report:
    """Start `far` as a child with its end, run `near` here, and add up what both report."""
    child = spawner.Process(target=_far, args=(folder, open_far, ends, rest), name="far")

    def look(_signal: int, _frame: object) -> None:
        # Whatever near waits for from a child that died, it need not wait for its time-out.
        if child.exitcode not in (None, 0):
            raise ChildProcessError("far died")

    signal.signal(signal.SIGCHLD, look)
    child.start()
    try:
        with contextlib.closing(open_near()) as link:
            mine = ways.near_of(ends, folder, link, rest)
        child.join(TIMEOUT)
    except Exception as error:
        raise RuntimeError(f"near: {error!r}; far: {_end_of(child, folder)}") from error
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        child.kill()
        child.join()
    return _sum(mine, _result(child, folder))


def _far(folder: Path, open_far: OpenLink, ends: str, rest: Mapping[str, Any]) -> None:
    def report() -> Report:
        with contextlib.closing(open_far()) as link:
            return ways.far_of(ends, folder, link, rest)

    record(folder, "far", report)


def _result(child: BaseProcess, folder: Path) -> Mapping[str, Any]:
    path = result_path(folder, "far")
    result: Mapping[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if "failure" in result or not result:
        raise RuntimeError(f"far: {_end_of(child, folder)}")
    return result


def _end_of(child: BaseProcess, folder: Path) -> str:
    path = result_path(folder, "far")
    if path.exists():
        return str(json.loads(path.read_text()).get("failure", "ended well"))
    return "still running" if child.exitcode is None else f"ended with status {child.exitcode}"


def _sum(mine: Report, theirs: Mapping[str, Any]) -> Report:
    return Report(
        values={**mine.values, **theirs["values"]},
        expected=mine.expected + theirs["expected"],
        verified=mine.verified + theirs["verified"],
    )
