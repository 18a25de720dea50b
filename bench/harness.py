"""Runs the rows of a benchmark in fresh processes, in an order shuffled each round, and says which failed.

A row is what one set of processes measures, a cell of a table or a line of it: a few parts (usually a near
and a far end), each a process of its own, started for this round alone. A part that crashes, raises, finds
wrong bytes or is not done in time, and a row in which fewer answers were checked than were sent, make the row
FAILED with the reason; the others go on.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import selectors
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.part import Json, result_path

ROOT = Path(__file__).resolve().parent.parent

# How long the other parts may go on after one failed: enough for them to say what they saw of it.
_GRACE = 0.5


@dataclass(frozen=True, kw_only=True)
class Row:
    """What a benchmark measures in one set of processes.

    `parts` maps a role to "module:function"; each function is called as function(folder, **arguments) in a
    fresh process, `folder` being an empty directory that the parts of this round share. `limit`: seconds.
    `accept` is called with the values of a round and raises ValueError where they do not suffice. `lacking`
    says why the row can't be measured here (a peer that is not installed); such a row is not run.
    """

    name: str
    parts: Mapping[str, str]
    arguments: Mapping[str, Json] = field(default_factory=dict)
    limit: float = 120.0
    sample_memory: bool = False
    accept: Callable[[Mapping[str, Json]], object] | None = None
    lacking: str | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One round of one row: its values, or the reason why there are none."""

    round: int
    position: int
    seconds: float
    values: Mapping[str, Json]
    failure: str | None


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Median, lowest and highest of one figure over the rounds."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(figures: Sequence[float]) -> Spread:
        """ValueError (StatisticsError) when there are none."""
        return Spread(median=statistics.median(figures), low=min(figures), high=max(figures))


@dataclass(frozen=True, kw_only=True)
class Result:
    """All rounds of one row."""

    row: Row
    outcomes: Sequence[Outcome]

    @property
    def failure(self) -> str | None:
        """Why the row has no figure: one bad round is enough; None when every round is good."""
        if not self.outcomes:
            return self.row.lacking or "not run"
        reasons = [outcome.failure for outcome in self.outcomes if outcome.failure is not None]
        if not reasons:
            return None
        return f"{len(reasons)} of {len(self.outcomes)} rounds: {reasons[0]}"

    def spread(self, measure: Callable[[Mapping[str, Json]], float]) -> Spread:
        """`measure` of each round's values. ValueError for a failed row: a failure is never a number."""
        if self.failure is not None:
            raise ValueError(f"{self.row.name} failed: {self.failure}")
        return Spread.of([measure(outcome.values) for outcome in self.outcomes])


def numbers(value: Json) -> list[float]:
    """A measured series as floats; ValueError if it is anything else or empty."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise ValueError(f"expected a series of numbers, not {type(value).__name__}")
    series = [item for item in value if isinstance(item, int | float)]
    if len(series) != len(value):
        raise ValueError("expected a series of numbers, found something else in it")
    return [float(item) for item in series]


def number(value: Json) -> float:
    """One measured number as float; ValueError if it is anything else."""
    if not isinstance(value, int | float):
        raise ValueError(f"expected a number, not {type(value).__name__}")
    return float(value)


def run(
    rows: Sequence[Row],
    *,
    rounds: int,
    first: int = 0,
    seed: int = 0,
    done: Callable[[Row, Outcome], None] | None = None,
) -> list[Result]:
    """Run every row once in each round, in an order drawn anew each time; `done` hears of each outcome.

    `first` is the number of the first round, for a caller that asks for one round after the other.
    """
    outcomes: dict[str, list[Outcome]] = {row.name: [] for row in rows}
    if len(outcomes) != len(rows):
        raise ValueError("two rows have the same name")
    draw = random.Random(seed + first)
    there = [row for row in rows if row.lacking is None]
    for number_ in range(first, first + rounds):
        for position, row in enumerate(draw.sample(there, len(there))):
            outcome = _run_once(row, round_=number_, position=position)
            outcomes[row.name].append(outcome)
            if done is not None:
                done(row, outcome)
    return [Result(row=row, outcomes=tuple(outcomes[row.name])) for row in rows]


def _run_once(row: Row, *, round_: int, position: int) -> Outcome:
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="tfbench.") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        stack.callback(_remove_segments, folder)
        children = [stack.enter_context(_started(row, role, folder)) for role in row.parts]
        pids = [child.process.pid for child in children]
        sampler = stack.enter_context(sampling(pids, folder)) if row.sample_memory else None
        failure = _wait(children, limit=row.limit)
        values: Mapping[str, Json] = {}
        if failure is None:
            values, failure = _merge([child.result() for child in children])
        if failure is None and sampler is not None:
            samples, failure = sampler.result()
            values = {**values, "memory": samples}
    if failure is None:
        failure = _refusal(row, values)
    seconds = time.monotonic() - start
    kept = values if failure is None else {}
    return Outcome(round=round_, position=position, seconds=seconds, values=kept, failure=failure)


def _remove_segments(folder: Path) -> None:
    """What a part that died left in /dev/shm under the name of the row's folder."""
    for segment in Path("/dev/shm").glob(f"{folder.name}.*"):
        segment.unlink(missing_ok=True)


def _refusal(row: Row, values: Mapping[str, Json]) -> str | None:
    try:
        if row.accept is not None:
            row.accept(values)
    except ValueError as error:
        return f"the values do not suffice: {error}"
    return None


def _merge(results: Sequence[Mapping[str, Json]]) -> tuple[dict[str, Json], str | None]:
    values: dict[str, Json] = {}
    for result in results:
        part_values = result["values"]
        assert isinstance(part_values, Mapping)
        twice = values.keys() & part_values.keys()
        if twice:
            return {}, f"two parts report {', '.join(sorted(twice))}"
        values.update(part_values)
    expected = sum(int(number(result["expected"])) for result in results)
    verified = sum(int(number(result["verified"])) for result in results)
    if expected == 0 or expected != verified:
        return {}, f"{expected} answers expected, {verified} checked"
    return values, None


class _Child:
    """One part as a process, watched through its pidfd; its session dies with it."""

    def __init__(self, role: str, process: subprocess.Popen[bytes], folder: Path) -> None:
        self.role = role
        self.process = process
        self.pidfd = os.pidfd_open(process.pid)
        self._folder = folder

    def result(self) -> Mapping[str, Json]:
        path = result_path(self._folder, self.role)
        result: Mapping[str, Json] = json.loads(path.read_text()) if path.exists() else {}
        return result

    def failure(self) -> str | None:
        """Why the ended process is no good, or None."""
        # WNOWAIT: the zombie keeps the process group's number ours until the group was killed.
        ended = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOWAIT)
        result = self.result()
        if "failure" in result:
            return f"{self.role}: {result['failure']}"
        assert ended is not None
        if ended.si_code != os.CLD_EXITED:
            return f"{self.role}: killed by {signal.Signals(ended.si_status).name}{self._last_words()}"
        if ended.si_status != 0 or not result:
            return f"{self.role}: ended with status {ended.si_status} and no result{self._last_words()}"
        return None

    def _last_words(self) -> str:
        lines = self._folder.joinpath(f"{self.role}.err").read_text(errors="replace").splitlines()
        said = [line.strip() for line in lines if line.strip()]
        # faulthandler writes the stack after what happened, and what led to it (an assertion, an exception of
        # C++) stands before; a traceback says it last.
        fatal = [number_ for number_, line in enumerate(said) if line.startswith("Fatal")]
        said = said[max(0, fatal[0] - 2) : fatal[0] + 1] if fatal else said[-1:]
        return f" ({'; '.join(line[:160] for line in said)})" if said else ""

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self.pidfd)


@contextlib.contextmanager
def _started(row: Row, role: str, folder: Path) -> Iterator[_Child]:
    spec = {"call": row.parts[role], "role": role, "folder": str(folder), "arguments": row.arguments}
    with folder.joinpath(f"{role}.err").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "bench.part", json.dumps(spec)],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    child = _Child(role, process, folder)
    try:
        yield child
    finally:
        child.stop()


def _wait(children: Sequence[_Child], *, limit: float) -> str | None:
    """Wait for every child; the reasons of those that failed, first to fail first, or None."""
    deadline = time.monotonic() + limit
    reasons: list[str] = []
    with selectors.DefaultSelector() as selector:
        for child in children:
            selector.register(child.pidfd, selectors.EVENT_READ, child)
        while selector.get_map():
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if not ready:
                late = ", ".join(key.data.role for key in selector.get_map().values())
                return "; ".join(reasons) or f"{late}: not done after {limit:g} s"
            for key, _ in ready:
                selector.unregister(key.fileobj)
                reason = key.data.failure()
                if reason is not None:
                    reasons.append(reason)
                    deadline = min(deadline, time.monotonic() + _GRACE)
    return "; ".join(reasons) or None


class Sampler:
    """The memory sampler's process; closing its standard input ends it."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def result(self) -> tuple[Json, str | None]:
        """End the sampler; what it saw, or why there is nothing."""
        out, said = self._process.communicate(timeout=60)
        if self._process.returncode != 0:
            return None, f"memory sampler: {said.decode(errors='replace').strip()[-160:]}"
        samples: Json = json.loads(out)
        return samples, None


@contextlib.contextmanager
def sampling(pids: Sequence[int], folder: Path, *flags: str) -> Iterator[Sampler]:
    """Memory of these processes and their descendants is sampled meanwhile (`bench/sampler.py`)."""
    command = [sys.executable, "-m", "bench.sampler", *flags, str(folder), *map(str, pids)]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            yield Sampler(process)
        finally:
            process.kill()
