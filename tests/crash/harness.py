"""Roles of a play of three real processes that goes on while one of them is killed (`tests.crash.plays`).

front sends jobs (it is the writer), worker answers them and hands some on, next is whom they are handed on
to. Each holds messages while the others come and go. Who is killed is started again under its name; the
play is over when every job was answered right and the front's ring is empty.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.forkserver import ensure_running
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

import shm
import transport
from transport import PeerGone, ProtocolError, Timeout, TransportConfig

WAIT = 40.0  # seconds; only a failure takes as long
PEERS = ("worker", "next")
_TURN = 0.05
_LOOKS, _NAP = 500, 0.002
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["tests.crash.harness"])

Bytes = NDArray[np.uint8]


def prepare() -> None:
    """Start the fork server and the machinery of a process object, which stay."""
    ensure_running()
    with running(print):
        pass


@contextmanager
def running(function: Callable[..., None], *arguments: object) -> Iterator[BaseProcess]:
    """A process that calls a module-level function; killed at the end if it still runs."""
    process = start(function, *arguments)
    try:
        yield process
    finally:
        finish(process)


def start(function: Callable[..., None], *arguments: object) -> BaseProcess:
    """A process that calls a module-level function; `finish` it."""
    process = _PROCESSES.Process(target=function, args=arguments)
    process.start()
    return process


def finish(process: BaseProcess) -> None:
    """Kill a process that still runs, and let go of it."""
    process.kill()
    process.join()
    process.close()


@contextmanager
def folder() -> Iterator[Path]:
    """An empty folder with a short name: the path of a Unix socket has 107 bytes."""
    path = Path(tempfile.mkdtemp(prefix="tf-", dir="/tmp"))
    try:
        yield path
    finally:
        shutil.rmtree(path)


def until(condition: Callable[[], object], what: str) -> None:
    """Wait for what must come true; fails with `what` when it does not."""
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline, f"in {WAIT:g} s it did not come true that {what}"
        time.sleep(0.002)


def others_sleep() -> bool:
    """Whether no other thread of this process has anything to do: zmq's, which sends, has sent.

    Who sleeps at both looks and has not run in between slept when the first one ended, as all others did;
    by one look alone, who is seen first may be woken by who is seen later.
    """
    before = _naps()
    return before is not None and before == _naps()


def _naps() -> dict[str, str] | None:
    """How often each other thread of this process has gone to sleep; None where one does not sleep."""
    own, found = str(threading.get_native_id()), dict[str, str]()
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            lines = (task / "status").read_text().splitlines() if task.name != own else []
            told = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
            if told and not told["State"].startswith("S"):
                return None
            found[task.name] = told.get("voluntary_ctxt_switches", "")
    return found


def is_stuffed(send: Callable[[], bool]) -> bool:
    """Whether nothing more can be queued, however long one waits: all buffers on the way are full, too."""
    for _ in range(100_000):
        if not send():
            return others_sleep() and not send()
    raise AssertionError("there is no end to what is queued")


def pattern(number: int, nbytes: int) -> Bytes:
    """Bytes that differ from those of any other number and from place to place, uint8 [nbytes]."""
    words = np.arange(-(-nbytes // 8), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    words += np.uint64(number * 0xD1B54A32D192ED03 % (1 << 64))
    return words.view(np.uint8)[:nbytes]


def digest(array: Bytes) -> int:
    """A checksum of an array's bytes."""
    return zlib.crc32(np.ascontiguousarray(array).data)


def segments_of(pids: Collection[int]) -> list[str]:
    """The segments that these processes made; others run beside, and may sweep meanwhile."""
    found = []
    for name in shm.names():
        with suppress(shm.SegmentMissing):
            if shm.describe(name).pid in pids:
                found.append(name)
    return found


def unlocked(pids: Collection[int]) -> None:
    """Wait until the locks of these processes, all dead, are free.

    A lock outlives its owner while anybody reads the owner's /proc entries, as the tests beside this one do.
    """

    def is_locked(name: str) -> bool:
        with suppress(shm.SegmentMissing):
            return shm.describe(name).alive
        return False

    until(lambda: not any(map(is_locked, segments_of(pids))), "the locks of the dead are free")


def left_by(pids: Collection[int]) -> list[str]:
    """The segments of these processes, all dead, that sweeps leave for good.

    The first sweep may leave one, as `unlocked` says, and another's sweep may have it in its hands.
    """
    deadline = time.monotonic() + WAIT
    while True:
        shm.sweep()
        left = segments_of(pids)
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.02)


# ------------------------------------------------------------------------------------ traces


@dataclass(frozen=True)
class Kill:
    """Die at the n-th time that an event is told."""

    event: str
    occurrence: int


class Steps:
    """The trace of one role: counts what happens, and kills its own process where it was told to."""

    def __init__(self, kill: Kill | None = None, note: Path | None = None) -> None:
        self.events: Counter[str] = Counter()
        self.begun: Counter[str] = Counter()
        self.ended: dict[str, list[tuple[int, str]]] = {}  # when (monotonic ns) and why, by peer
        self._kill = kill
        self._note = note  # the file that keeps the moment of death

    def __call__(self, event: str, now: int, fields: Mapping[str, object]) -> None:
        # Each number is somebody's, also where two threads tell the same event at once.
        occurrence = self.events[event] = self.events[event] + 1
        if self._kill and (event, occurrence) == (self._kill.event, self._kill.occurrence):
            if self._note:
                self._note.write_text(str(time.monotonic_ns()))
            os.kill(os.getpid(), signal.SIGKILL)
        if event == "link.begun":
            self.begun[str(fields["peer"])] += 1
        elif event == "link.ended":
            self.ended.setdefault(str(fields["peer"]), []).append((now, str(fields["reason"])))


def config(trace: Steps | None = None, **changes: Any) -> TransportConfig:
    """A ring so small that its bytes are reused all the time, and no way around it."""
    fields: dict[str, Any] = {
        "backend": "shm",
        "ring_bytes": 1 << 20,
        "max_tensors": 64,
        "max_readers": 8,
        "copy_threads": 1,
        "timeout": WAIT,
        "admission_timeout": WAIT,
        "linger": 0.2,
    }
    return TransportConfig(trace=trace, **{**fields, **changes})


# ------------------------------------------------------------------------------------ the stage


@dataclass(frozen=True)
class Stage:
    """The folder in which the roles find each other, and leave their reports.

    allowed: how many descriptors a role has at some moments when nobody dies; none of it is known at first.
    """

    path: Path
    allowed: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def address(self, name: str) -> str:
        return f"ipc://{self.path}/{name}.sock"

    @property
    def done(self) -> bool:
        """Whether the play is over; told by a file, which outlives whoever made it."""
        return (self.path / "done").exists()

    def end(self) -> None:
        (self.path / "done").touch()

    def descriptors(self, role: str, moment: str) -> int:
        """How many this process has open, given a second for those of who has just died.

        By looks: while this process stands still, its threads close nothing.
        """
        allowed = self.allowed.get(role, {}).get(moment, sys.maxsize)
        for _ in range(_LOOKS):
            if (count := len(os.listdir("/proc/self/fd"))) <= allowed:
                break
            time.sleep(_NAP)
        return count

    def report(self, role: str, text: Mapping[str, object]) -> None:
        temporary = self.path / f"{role}.{os.getpid()}.writing"
        temporary.write_text(json.dumps(text))
        temporary.rename(self.path / f"{role}.{os.getpid()}.json")

    def reports(self, role: str) -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in sorted(self.path.glob(f"{role}.*.json"))]


@dataclass
class Report:
    """What one process saw of the play."""

    steps: Steps
    wrong: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    answered: int = 0
    resent: int = 0
    descriptors: dict[str, int] = field(default_factory=dict)  # how many were open, by moment
    seen: dict[str, object] = field(default_factory=dict)  # what a play has besides

    def to_json(self) -> dict[str, object]:
        return {
            "events": self.steps.events,
            "begun": self.steps.begun,
            "ended": self.steps.ended,
            "wrong": self.wrong,
            "refused": self.refused,
            "answered": self.answered,
            "resent": self.resent,
            "descriptors": self.descriptors,
            **self.seen,
        }


Role: TypeAlias = Callable[["Stage", "Report"], None]
"""What one process of a play does; a function of a module, or a partial of one."""


def perform(name: str, role: Role, stage: Stage, kill: Kill | None = None) -> None:
    """One process of a play, from its beginning to its end."""
    report = Report(Steps(kill, stage.path / "killed"))
    try:
        role(stage, report)
    except Exception:  # noqa: BLE001  # whatever it was, the director must hear of it
        report.wrong.append(traceback.format_exc())
        print(f"[{name}] {report.wrong[-1]}", file=sys.stderr)
    report.descriptors["at its end"] = stage.descriptors(name, "at its end")
    stage.report(name, report.to_json())


# ------------------------------------------------------------------------------------ the roles


class Peer:
    """worker and next: answer what comes, hold what they are told to, come back when the front does."""

    def __init__(self, name: str, stage: Stage, report: Report, settings: TransportConfig) -> None:
        self.name = name
        self._settings = settings
        self._stage = stage
        self._report = report
        self._held: list[tuple[transport.Message, int]] = []
        self._again = True

    def play(self) -> None:
        while self._again and not self._stage.done:
            self._again = False
            with transport.Endpoint(self.name, self._settings) as endpoint:
                if self.name == "next":
                    endpoint.listen(self._stage.address("next"))
                self._serve(endpoint)
            self._check_held("after close")
            self._held.clear()

    def _serve(self, endpoint: transport.Endpoint) -> None:
        while not self._again and self._join(endpoint, "front"):
            try:
                message = endpoint.receive(timeout=_TURN)
            except Timeout:
                continue
            except (PeerGone, ProtocolError) as error:  # its owner, or who handed it on, died
                self._report.refused.append(str(error))
                continue
            try:
                self._answer(endpoint, message)
            except PeerGone:  # who asked is gone; its successor will ask again
                continue
            finally:
                del message

    def _join(self, endpoint: transport.Endpoint, name: str) -> bool:
        """Be linked with that role, however often it has to be tried; False when the play is over."""
        deadline = time.monotonic() + WAIT
        while not self._stage.done:
            if name in {peer.name for peer in endpoint.peers}:
                return True
            self._check_held(f"while {name} was away")
            if name == "front":
                self._held.clear()  # a new front knows nothing of what the old one sent
            assert time.monotonic() < deadline, f"{name} did not come back"
            try:
                endpoint.connect(self._stage.address(name), timeout=0.5)
            except (Timeout, PeerGone):
                continue
        return False

    def _answer(self, endpoint: transport.Endpoint, message: transport.Message) -> None:
        body = message.body
        answer: dict[str, Any] = {"id": body["id"], "digest": digest(body["bytes"])}
        match body["do"]:
            case "hold":
                self._held.append((message, answer["digest"]))
            case "drop":
                self._held.clear()
            case "echo":
                answer["echo"] = np.array(body["bytes"])
            case "forward" if self.name == "worker":
                self._hand_on(endpoint, message)
                return
            case "rejoin":
                self._again = True
        self._check_held("while others came and went")
        endpoint.send(answer, to="front")
        self._report.answered += 1

    def _hand_on(self, endpoint: transport.Endpoint, message: transport.Message) -> None:
        while self._join(endpoint, "next"):
            try:
                endpoint.forward(message, to="next")
                return
            except PeerGone:
                continue

    def _check_held(self, when: str) -> None:
        for message, known in self._held:
            if digest(message.body["bytes"]) != known:
                self._report.wrong.append(f"{self.name}: bytes changed under an open view {when}")


@dataclass(frozen=True)
class Job:
    """Something to be done with `nbytes` bytes; `to` gets it, `by` answer it."""

    do: str
    nbytes: int
    to: tuple[str, ...] = ("worker",)
    by: tuple[str, ...] = ("worker",)
    loan: bool = False


_NEXT = ("next",)
SCRIPT = (
    Job("sum", 700_000),  # more than a peer's share: in parts, and before anything is held of it
    Job("hold", 70_000),
    Job("hold", 50_000, _NEXT, _NEXT),
    Job("sum", 90_000),
    Job("forward", 60_000, by=_NEXT),
    Job("echo", 80_000),
    Job("sum", 120_000, PEERS, PEERS),
    Job("rejoin", 1000, _NEXT, _NEXT),
    Job("hold", 40_000, _NEXT, _NEXT),
    Job("forward", 60_000, by=_NEXT),
    Job("sum", 150_000, loan=True),
    *[Job("sum", 20_000 + 4096 * number) for number in range(8)],
    Job("sum", 100_000, PEERS, PEERS),
    Job("echo", 300_000),
    Job("forward", 200_000, by=_NEXT),
    Job("drop", 1000, PEERS, PEERS),
)


class Front:
    """Does the script job by job, each again for as long as those who must answer come and go."""

    def __init__(self, stage: Stage, report: Report, settings: TransportConfig) -> None:
        self._settings = settings
        self._stage = stage
        self._report = report
        self._steps = report.steps

    def play(self) -> None:
        address = self._stage.address("front")
        with transport.listen(address, config=self._settings) as self._endpoint:
            for number, job in enumerate(SCRIPT, 1):
                while not self._try(number, job):
                    self._report.resent += 1
            self._empty_ring()
            self._endpoint.wait_for_peers(PEERS, timeout=WAIT)
            self._report.descriptors["while linked"] = self._stage.descriptors("front", "while linked")
            self._stage.end()

    def _try(self, number: int, job: Job) -> bool:
        """Send a job and take its answers; False when somebody who matters came or went meanwhile."""
        self._endpoint.wait_for_peers(PEERS, timeout=WAIT)
        before = dict(self._steps.begun)
        data = pattern(number, job.nbytes)
        try:
            self._send(number, job, data)
        except PeerGone:
            return False
        missing = set(job.by)
        deadline = time.monotonic() + WAIT
        while missing:
            assert time.monotonic() < deadline, f"job {number} ({job.do}) was never answered by {missing}"
            try:
                message = self._endpoint.receive(timeout=_TURN)
            except Timeout:
                if before != dict(self._steps.begun) or set(PEERS) - self._there():
                    return False
                continue
            except (PeerGone, ProtocolError) as error:
                self._report.refused.append(str(error))
                continue
            missing -= self._judge(message, number, data)
            del message
        return True

    def _send(self, number: int, job: Job, data: Bytes) -> None:
        body = {"id": number, "do": job.do, "bytes": data}
        if not job.loan:
            self._endpoint.send(body, to=job.to)
            return
        with self._endpoint.loan((job.nbytes,), np.uint8) as out:
            out[:] = data
            self._endpoint.send(body | {"bytes": out}, to=job.to)

    def _judge(self, message: transport.Message, number: int, data: Bytes) -> set[str]:
        """Who answered the job that is asked now; an answer to an earlier asking of another is old."""
        answer = message.body
        if answer["id"] != number:
            return set()
        right = answer["digest"] == digest(data) and np.array_equal(answer.get("echo", data), data)
        if not right:
            self._report.wrong.append(f"job {number}: {message.sender} has other bytes than were sent")
        self._report.answered += 1
        return {message.sender}

    def _there(self) -> set[str]:
        return {peer.name for peer in self._endpoint.peers}

    def _empty_ring(self) -> None:
        """Everything was dropped: all space is back once that is acknowledged and seen."""
        deadline = time.monotonic() + WAIT
        while (ring := self._endpoint.statistics()["backend"]["ring"]).live:
            assert time.monotonic() < deadline, f"space is lost: {ring}"
            try:
                self._endpoint.receive(timeout=_TURN)
            except (Timeout, PeerGone, ProtocolError):
                continue


def play_front(stage: Stage, report: Report, **changes: Any) -> None:
    """The front, with these changes of the config."""
    Front(stage, report, config(report.steps, **changes)).play()


def play_peer(name: str, stage: Stage, report: Report, **changes: Any) -> None:
    """worker or next, with these changes of the config."""
    Peer(name, stage, report, config(report.steps, **changes)).play()


def cast_with(**changes: Any) -> dict[str, Role]:
    """The roles of the play, by name."""
    return {
        "front": partial(play_front, **changes),
        **{name: partial(play_peer, name, **changes) for name in PEERS},
    }


CAST = cast_with()
