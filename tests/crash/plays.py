"""The director of a play: somebody is killed and started again, and what the others saw of it is judged."""

from __future__ import annotations

import functools
import signal
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Any

from tests.crash.harness import (
    CAST,
    WAIT,
    Kill,
    Role,
    Stage,
    finish,
    folder,
    left_by,
    perform,
    segments_of,
    start,
    unlocked,
)

_RUNS_PER_EVENT = 3  # a run may have fewer steps of a kind than the one they were counted in


@dataclass
class Outcome:
    """How a play went: the reports of those who lived to its end, by role, and whether the victim died."""

    killed: bool
    reports: dict[str, list[dict[str, Any]]]
    restarted: bool
    pids: set[int]
    died: int  # monotonic ns; 0: nobody
    allowed: Mapping[str, Mapping[str, int]]  # descriptors by role and moment, when nobody dies

    @property
    def wrong(self) -> list[str]:
        return [text for reports in self.reports.values() for report in reports for text in report["wrong"]]

    def kept(self) -> list[str]:
        """The descriptors that somebody has beyond those of a play in which nobody dies.

        Fewer are none: a connection may be missing where a peer has not come back.
        """
        return [
            f"{role} has {count} descriptors {moment}, and {allowed} when nobody dies"
            for role, reports in self.reports.items()
            for report in reports
            for moment, count in report["descriptors"].items()
            if count > (allowed := self.allowed.get(role, {}).get(moment, count))
        ]

    def noticed(self, victim: str) -> dict[str, float]:
        """After how many seconds each survivor ended its link with the victim; for people."""
        found = {}
        for role, reports in self.reports.items():
            ends = [at for report in reports for at, _ in report["ended"].get(victim, ()) if at >= self.died]
            if self.died and ends and role != victim:
                found[role] = (min(ends) - self.died) / 1e9
        return found

    def left(self) -> list[str]:
        """The segments that processes of this play left, which are all dead by now."""
        return segments_of(self.pids)

    def leaked(self) -> list[str]:
        """Those that a sweep leaves."""
        return left_by(self.pids)


def play(
    victim: str = "",
    kill: Kill | None = None,
    cast: Mapping[str, Role] = CAST,
    allowed: Mapping[str, Mapping[str, int]] | None = None,
) -> Outcome:
    """Give a play once; the victim dies at `kill` and is started again without it, unless all is done."""
    with folder() as path:
        stage = Stage(path, allowed or {})
        processes = {
            name: start(perform, name, role, stage, kill if name == victim else None)
            for name, role in cast.items()
        }
        pids = {process.pid or 0 for process in processes.values()}
        killed = restarted = False
        began = time.monotonic()
        try:
            while (victim and processes[victim].is_alive()) or not stage.done:
                if victim and not killed and processes[victim].exitcode == -signal.SIGKILL:
                    killed = True
                    if not stage.done:
                        restarted = True
                        unlocked({processes[victim].pid or 0})  # so that the next start sweeps its ring
                        finish(processes[victim])
                        processes[victim] = start(perform, victim, cast[victim], stage)
                        pids.add(processes[victim].pid or 0)
                assert time.monotonic() < began + 2 * WAIT, f"the play is stuck: {_state(stage, processes)}"
                time.sleep(0.002)
            for name, process in processes.items():
                process.join(WAIT)
                assert process.exitcode is not None, f"{name} does not end"
                killed = killed or process.exitcode == -signal.SIGKILL
            reports = {name: stage.reports(name) for name in cast}
            note = path / "killed"
            died = int(note.read_text()) if note.exists() else 0
            return Outcome(killed, reports, restarted, pids, died, stage.allowed)
        finally:
            stage.end()
            for process in processes.values():
                finish(process)


def _state(stage: Stage, processes: Mapping[str, BaseProcess]) -> str:
    """What is known of a play that does not end."""
    codes = {name: process.exitcode for name, process in processes.items()}
    wrong = [text for name in processes for report in stage.reports(name) for text in report["wrong"]]
    return f"exit codes {codes}; {wrong}"


def faults(victim: str, outcome: Outcome) -> list[str]:
    """What a survivor of a play saw that it should not, or did not see that it should."""
    found = outcome.wrong + outcome.kept()
    for name, reports in outcome.reports.items():
        for report in reports if name != victim else ():
            begun, ends = report["begun"].get(victim, 0), report["ended"].get(victim, [])
            if len(ends) < begun or not all(reason for _, reason in ends):
                found.append(f"{name} had {begun} links with {victim}, and saw the end of {ends}")
    if outcome.restarted and not outcome.reports[victim]:
        found.append(f"{victim} was started again and did not come to its end")
    left = outcome.left()
    if len(left) > (victim != "front" or not outcome.restarted):  # the next start of a writer sweeps
        found.append(f"more than the ring of the dead is left: {left}")
    leaked = outcome.leaked()
    if leaked:
        found.append(f"sweeps leave {leaked}")
    return found


class Play:
    """A play that is given again and again, with another death each time. judge: finds what was wrong."""

    def __init__(self, cast: Mapping[str, Role], judge: Callable[[str, Outcome], list[str]] = faults) -> None:
        self.cast = cast
        self._judge = judge

    @functools.cached_property
    def clean(self) -> Outcome:
        """The one in which nobody dies, once for all tests of this process."""
        outcome = play(cast=self.cast)
        assert outcome.wrong == []
        assert all(len(reports) == 1 for reports in outcome.reports.values())
        assert outcome.left() == []
        return outcome

    def steps_of(self, role: str) -> dict[str, int]:
        """How often each event happens to a role when nobody dies."""
        (report,) = self.clean.reports[role]
        return dict(report["events"])

    def _descriptors(self) -> dict[str, dict[str, int]]:
        """How many each role has at which moments when nobody dies."""
        return {role: report["descriptors"] for role, (report,) in self.clean.reports.items()}

    def killed_at(self, role: str, event: str, occurrence: int) -> Outcome:
        """The role died at that event, at an earlier occurrence if there were not so many."""
        for _ in range(_RUNS_PER_EVENT):
            outcome = play(role, Kill(event, occurrence), self.cast, self._descriptors())
            if outcome.killed:
                return outcome
            occurrence = max(1, occurrence // 2)
        raise AssertionError(f"{role} lives in spite of {event}")

    def faults(
        self, role: str, events: Iterable[str], occurrences: Callable[[int], Iterable[int]]
    ) -> dict[tuple[str, int], list[str]]:
        """What was wrong when the role died at these events. occurrences: which of so many."""
        found = {}
        for event in events:
            for occurrence in sorted(set(occurrences(self.steps_of(role)[event]))):
                if wrong := self._faults_at(role, event, occurrence):
                    found[event, occurrence] = wrong
        return found

    def _faults_at(self, role: str, event: str, occurrence: int) -> list[str]:
        try:
            return self._judge(role, self.killed_at(role, event, occurrence))
        except AssertionError as error:  # a play that does not end: the others are given all the same
            return [str(error)]


def middle(times: int) -> list[int]:
    """The middle one of so many occurrences."""
    return [(times + 1) // 2]


def ends_and_middle(times: int) -> list[int]:
    """The first, the middle and the last of so many occurrences."""
    return [1, *middle(times), times]
