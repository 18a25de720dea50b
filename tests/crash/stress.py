"""Random kills, stalls, sizes, lease times and hand-ons over real processes, for as long as you like.

    python -m tests.crash.stress --seconds 120 --processes 8 --backend tcp

Fronts (a quarter of the processes) send to workers, which check every byte when it comes and again before
they let go of it, answer, and hand some messages on to each other. A director kills and stops them at
random and starts the dead again under their names. At the end everything is let go of: what is still
taken is leaked, what a living peer never answered is lost, who does not get on is stuck.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np

import transport
from tests.crash.harness import Stage, Steps, config, finish, folder, left_by, pattern, prepare, start
from transport import Full, PeerGone, ProtocolError, Timeout, TransportError

FIELDS = (
    "messages",
    "nbytes",
    "answers",
    "handed_on",
    "full",
    "refused",
    "corrupt",
    "leaked",
    "lost",
    "turns",
)
_STUCK_AFTER = 30.0  # seconds without a turn, for who is not stopped
_QUIET_WITHIN = 40.0
_HAPPENS = ("messages", "answers", "handed_on")  # and kills and stalls, however short and slow a run is
_RING = 2 << 20
_LARGEST = 300_000


class Counters:
    """What one process did, in words of a file, which survive it; its successor counts on."""

    def __init__(self, path: Path, index: int) -> None:
        with path.open("r+b") as file:
            self._words = memoryview(mmap.mmap(file.fileno(), 0)).cast("Q")
        self._first = 16 * index

    def add(self, name: str, number: int = 1) -> None:
        self._words[self._first + FIELDS.index(name)] += number

    def get(self, name: str) -> int:
        return self._words[self._first + FIELDS.index(name)]


@dataclass(frozen=True)
class Cast:
    """Who takes part, and where."""

    stage: Stage
    processes: int
    seed: int
    backend: str = "auto"

    @property
    def fronts(self) -> list[str]:
        return [f"front{number}" for number in range(max(1, self.processes // 4))]

    @property
    def workers(self) -> list[str]:
        return [f"worker{number}" for number in range(self.processes - len(self.fronts))]

    @property
    def names(self) -> list[str]:
        return [*self.fronts, *self.workers]

    @property
    def quiet(self) -> bool:
        """Whether no more is to be sent, and everything to be let go of."""
        return (self.stage.path / "quiet").exists()

    def note(self, text: str) -> None:
        """A line for whoever reads what went wrong."""
        with (self.stage.path / "notes").open("a") as file:
            file.write(text + "\n")

    @property
    def notes(self) -> str:
        path = self.stage.path / "notes"
        return path.read_text() if path.exists() else ""

    def counters(self, name: str) -> Counters:
        return Counters(self.stage.path / "counters", self.names.index(name))


def take_part(cast: Cast, name: str, life: int) -> None:
    """One process; `life` tells how often that name was started before."""
    steps = Steps()
    settings = config(
        steps, backend=cast.backend, inline_below=2000, ring_bytes=_RING, max_readers=16, detour_after=0.05
    )
    draw = random.Random(f"{cast.seed} {name} {life}")
    with transport.Endpoint(name, settings) as endpoint:
        endpoint.listen(cast.stage.address(name))
        if name in cast.fronts:
            Front(cast, endpoint, steps, draw).run()
        else:
            Worker(cast, endpoint, draw).run()


class Front:
    """Sends whatever to whomever, and remembers what was not answered."""

    def __init__(self, cast: Cast, endpoint: transport.Endpoint, steps: Steps, draw: random.Random) -> None:
        self._cast = cast
        self._endpoint = endpoint
        self._steps = steps
        self._draw = draw
        self._counters = cast.counters(endpoint.name)
        self._number = 0
        self._asked: dict[tuple[int, str], int] = {}  # by number and worker: which link of it

    def run(self) -> None:
        while not self._cast.quiet:
            self._counters.add("turns")
            there = [peer.name for peer in self._endpoint.peers]
            if there:
                self._send(there)
            self._take_answers(0.0 if there else 0.02)
        self._settle()

    def _send(self, there: list[str]) -> None:
        draw = self._draw
        to = draw.sample(there, min(len(there), draw.choice((1, 1, 1, 2))))
        others = [name for name in self._cast.workers if name not in to]
        hand_on = draw.choice(others) if len(to) == 1 and others and draw.random() < 0.2 else ""
        self._number += 1
        number, nbytes = self._number, int(10 ** draw.uniform(0, np.log10(_LARGEST)))
        body: dict[str, object] = {
            "id": number,
            "hold": draw.choice((0.0, 0.0, draw.uniform(0, 0.3), draw.uniform(0, 2))),
            "hand_on": hand_on,
            "echo": draw.random() < 0.1,
        }
        links = {name: self._steps.begun[name] for name in to}
        try:
            if draw.random() < 0.3:
                with self._endpoint.loan((nbytes,), np.uint8, timeout=1) as out:
                    out[:] = pattern(number, nbytes)
                    self._endpoint.send(body | {"bytes": out}, to=to, timeout=0.5)
            else:
                self._endpoint.send(body | {"bytes": pattern(number, nbytes)}, to=to, timeout=0.5)
        except (Full, PeerGone) as error:
            self._counters.add("full", isinstance(error, Full))
            to = list(error.delivered)
        self._counters.add("messages", len(to))
        self._counters.add("nbytes", nbytes * len(to))
        if not hand_on:
            self._asked |= {(number, name): links[name] for name in to}

    def _take_answers(self, timeout: float) -> None:
        while True:
            try:
                message = self._endpoint.receive(timeout=timeout)
            except Timeout:
                return
            except (PeerGone, ProtocolError):
                self._counters.add("refused")
                continue
            self._counters.add("answers")
            self._asked.pop((message.body["id"], message.sender), None)
            echo = message.body.get("echo")
            if echo is not None and not np.array_equal(echo, pattern(message.body["id"], len(echo))):
                self._counters.add("corrupt")
            timeout = 0.0

    def _settle(self) -> None:
        """Everybody lets go: all answers come, all space comes back."""
        deadline = time.monotonic() + _QUIET_WITHIN
        while time.monotonic() < deadline:
            self._counters.add("turns")
            self._take_answers(0.05)
            if not self._open_questions() and not self._live():
                break
        if self._open_questions() or self._live():
            peers = [(peer.name, peer.unacknowledged) for peer in self._endpoint.peers]
            self._cast.note(f"{self._endpoint.name} {peers} {self._endpoint.statistics()}")
        self._counters.add("lost", self._open_questions())
        self._counters.add("leaked", self._live())

    def _open_questions(self) -> int:
        there = {peer.name for peer in self._endpoint.peers}
        return sum(
            name in there and self._steps.begun[name] == link for (_, name), link in self._asked.items()
        )

    def _live(self) -> int:
        figures = self._endpoint.statistics()["backend"]
        figures = figures.get("shm", figures)  # of `auto` those of its part
        return figures["ring"].live if "ring" in figures else 0


class Worker:
    """Checks what comes, holds it for a while, checks it again; hands on what it is told to."""

    def __init__(self, cast: Cast, endpoint: transport.Endpoint, draw: random.Random) -> None:
        self._cast = cast
        self._endpoint = endpoint
        self._draw = draw
        self._counters = cast.counters(endpoint.name)
        self._held: list[tuple[float, transport.Message]] = []
        self._tried: dict[str, float] = {}

    def run(self) -> None:
        while not self._cast.stage.done:
            self._counters.add("turns")
            for name in self._cast.fronts:
                self._join(name)
            try:
                message = self._endpoint.receive(timeout=0.02)
            except Timeout:
                message = None
            except (PeerGone, ProtocolError):
                self._counters.add("refused")
                message = None
            if message is not None:
                self._check(message)
                self._answer(message)
                self._held.append((time.monotonic() + message.body["hold"], message))
                del message
            self._let_go()
        self._let_go(everything=True)

    def _join(self, name: str) -> bool:
        """Be linked with that one, if it is there; not tried all the time."""
        if any(peer.name == name for peer in self._endpoint.peers):
            return True
        now = time.monotonic()
        if now < self._tried.get(name, 0.0):
            return False
        self._tried[name] = now + 0.2
        try:
            self._endpoint.connect(self._cast.stage.address(name), timeout=0.2)
        except TransportError:
            return False
        return True

    def _check(self, message: transport.Message) -> None:
        data = message.body["bytes"]
        if not np.array_equal(data, pattern(message.body["id"], len(data))):
            self._counters.add("corrupt")

    def _answer(self, message: transport.Message) -> None:
        body = message.body
        hand_on = body["hand_on"]
        if hand_on and hand_on != self._endpoint.name and message.sender in self._cast.fronts:
            if self._join(hand_on):
                try:
                    self._endpoint.forward(message, to=hand_on, timeout=0.5)
                    self._counters.add("handed_on")
                except (Full, PeerGone, Timeout):
                    pass  # nobody waits for its answer
            return
        if message.sender not in self._cast.fronts:
            return
        answer = {"id": body["id"]} | ({"echo": np.array(body["bytes"])} if body["echo"] else {})
        while not self._cast.stage.done:
            try:
                self._endpoint.send(answer, to=message.sender, timeout=1)
                return
            except Full:
                self._counters.add("turns")
            except PeerGone:
                return

    def _let_go(self, *, everything: bool = False) -> None:
        now = float("inf") if everything or self._cast.quiet else time.monotonic()
        for entry in [entry for entry in self._held if entry[0] <= now]:
            self._check(entry[1])
            self._held.remove(entry)


# ------------------------------------------------------------------------------------ the director


class Director:
    """Starts, kills, stops and watches everybody."""

    def __init__(self, cast: Cast) -> None:
        self._cast = cast
        self._draw = random.Random(cast.seed)
        size = len(cast.names) * 16 * 8
        (cast.stage.path / "counters").write_bytes(bytes(size))
        self._counters = {name: cast.counters(name) for name in cast.names}
        self._lives = dict.fromkeys(cast.names, 0)
        self._processes: dict[str, BaseProcess] = {}
        self._stopped: dict[str, float] = {}
        self._turns: dict[str, tuple[int, float]] = {}
        self.pids: set[int] = set()
        self.kills = self.stalls = self.restarts = self.stuck = self.failed = 0

    def run(self, seconds: float) -> None:
        """The whole performance, longer where little happens; everybody has ended when this returns."""
        try:
            for name in self._cast.names:
                self._start(name)
            end = time.monotonic() + seconds
            while time.monotonic() < end or (time.monotonic() < end + _STUCK_AFTER and not self._is_enough()):
                time.sleep(self._draw.uniform(0.01, 0.15))
                self._disturb()
                self._watch()
            self._come_to_rest()
        finally:
            for process in self._processes.values():
                finish(process)

    def _is_enough(self) -> bool:
        """Whether everything that is to happen has."""
        return bool(self.kills and self.stalls) and all(map(self._total, _HAPPENS))

    def _total(self, field: str) -> int:
        return sum(counters.get(field) for counters in self._counters.values())

    def _start(self, name: str) -> None:
        process = start(take_part, self._cast, name, self._lives[name])
        self._lives[name] += 1
        self._processes[name] = process
        self._turns[name] = 0, time.monotonic()
        self.pids.add(process.pid or 0)

    def _disturb(self) -> None:
        now = time.monotonic()
        for name in [name for name, until in self._stopped.items() if until <= now]:
            self._signal(name, signal.SIGCONT)
            del self._stopped[name]
        name = self._draw.choice(self._cast.names)
        dice = self._draw.random()
        if dice < 0.35:
            self._signal(name, signal.SIGKILL)
            self._stopped.pop(name, None)
            self.kills += 1
            self._processes[name].join()
            self._restart(name)
        elif dice < 0.6 and name not in self._stopped:
            self._signal(name, signal.SIGSTOP)
            self._stopped[name] = now + self._draw.uniform(0.02, 1.5)
            self.stalls += 1

    def _restart(self, name: str) -> None:
        finish(self._processes.pop(name))
        self._start(name)
        self.restarts += 1

    def _signal(self, name: str, number: signal.Signals) -> None:
        pid = self._processes[name].pid
        assert pid is not None
        os.kill(pid, number)

    def _watch(self) -> None:
        """Who ended by itself failed; who takes no turn for long is stuck."""
        now = time.monotonic()
        for name, process in list(self._processes.items()):
            turns, since = self._turns[name]
            latest = self._counters[name].get("turns")
            if latest != turns or name in self._stopped:
                self._turns[name] = latest, now
            elif now - since > _STUCK_AFTER:
                self.stuck += 1
                self._turns[name] = latest, now
            if process.exitcode is not None:
                self.failed += 1
                self._restart(name)

    def _come_to_rest(self) -> None:
        for name in self._stopped:
            self._signal(name, signal.SIGCONT)
        (self._cast.stage.path / "quiet").touch()
        for names in (self._cast.fronts, self._cast.workers):
            for name in names:
                self._processes[name].join(_QUIET_WITHIN + _STUCK_AFTER)
                code = self._processes[name].exitcode
                self.stuck += code is None
                self.failed += code not in (None, 0)
            self._cast.stage.end()

    def totals(self) -> dict[str, int]:
        """What happened in all."""
        figures = {field: self._total(field) for field in FIELDS[:-1]}
        for name in left_by(self.pids):
            self._cast.note(f"left in /dev/shm: {name}")
            figures["leaked"] += 1
        return figures | {
            "kills": self.kills,
            "stalls": self.stalls,
            "restarts": self.restarts,
            "stuck": self.stuck,
            "failed": self.failed,
        }


def perform(seconds: float, processes: int, seed: int, backend: str = "auto") -> tuple[dict[str, int], str]:
    """Totals of one run, and what there is to say of what went wrong."""
    with folder() as path:
        cast = Cast(Stage(path), processes, seed, backend)
        director = Director(cast)
        director.run(seconds)
        return director.totals(), cast.notes


def faults(totals: Mapping[str, int]) -> dict[str, int]:
    """What must be 0 and is not."""
    wrong = ("corrupt", "leaked", "lost", "stuck", "failed")
    return {name: totals[name] for name in wrong if totals[name]}


def main() -> int:
    """The command line; 1 when anything was corrupt, leaked, lost or stuck."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--backend", choices=("auto", "tcp"), default="auto")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    given = parser.parse_args()
    prepare()
    totals, notes = perform(given.seconds, given.processes, given.seed, given.backend)
    print(notes, end="", file=sys.stderr)
    print(json.dumps({"seed": given.seed, **totals}, indent=2))
    return 1 if faults(totals) else 0


if __name__ == "__main__":
    sys.exit(main())
