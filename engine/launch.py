"""Starts ranks as processes of this host and ends them: politely, then by SIGTERM, then by SIGKILL."""

from __future__ import annotations

import itertools
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from engine.config import EngineConfig
from engine.errors import StartError
from engine.folders import PrivateFolder

_LAST_WORDS = 20
_POLITE, _TERMINATE, _KILL = 5.0, 2.0, 10.0


class RankProcess:
    """The process of one worker of a rank. What it writes appears on our standard error, after its name."""

    def __init__(self, name: str, arguments: Sequence[str]) -> None:
        self.name = name
        # -P: a folder or file called `engine` where the user happens to be must not be taken for ours.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "engine.worker", *arguments],
            stdin=subprocess.PIPE,  # nothing is ever written: that it ends tells the worker that we are gone
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=_environment(),
            process_group=0,  # Ctrl-C is for the front end, which ends its ranks
        )
        self._last_words: deque[str] = deque(maxlen=_LAST_WORDS)
        self._reader = threading.Thread(target=self._forward_output, name=f"output of {name}", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def fate(self) -> str:
        """How the process ended, in words; "" while it runs."""
        code = self._process.poll()
        if code is None:
            return ""
        if code < 0:
            return f"was killed by {_signal_name(-code)}"
        return "exited" if code == 0 else f"exited with code {code}"

    @property
    def code(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._process.poll()

    def last_words(self) -> str:
        """The last line that it wrote, once it has ended."""
        self._reader.join(timeout=1.0)
        return self._last_words[-1] if self._last_words else ""

    def wait(self, timeout: float) -> bool:
        """Whether it ended within `timeout` seconds."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.0, timeout))
        return not self.running

    def send_signal(self, number: signal.Signals) -> None:
        """Signal this process, and no other that has its pid by now."""
        self._process.send_signal(number)

    def finish(self) -> None:
        """Give back what is left of an ended process: its pipes and the thread that reads one."""
        self._reader.join(timeout=1.0)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        # A grandchild may keep the other end open: then the daemon thread keeps the pipe.
        if not self._reader.is_alive():
            self._process.stdout.close()

    def _forward_output(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            text = line.decode(errors="replace").rstrip()
            self._last_words.append(text)
            print(f"[{self.name}] {text}", file=sys.stderr, flush=True)


class LocalRanks:
    """The ranks of this host, and a private folder for what they need to find each other and their head.

    address: where their head listens; None: at a socket in that folder. patience: for how many seconds each
    waits for it; 0: it is there already, and they end with it. processes: by rank, those of its workers, the
    first of which answers.
    """

    def __init__(self, config: EngineConfig, *, address: str | None = None, patience: float = 0.0) -> None:
        self._config = config
        self._patience = patience
        self._folder = PrivateFolder()
        self.address = address or f"ipc://{self._folder.path}/front.sock"
        self.processes: dict[str, list[RankProcess]] = {}
        self._starts = itertools.count()

    def start(self) -> None:
        """Start every worker of every rank. They come to `address`; this waits for nobody.

        Raises:
            StartError: the system refuses to make a process; what was started is still to be stopped.
        """
        self._file.write_text(self._config.to_toml(), encoding="utf-8")
        for number in self._config.local_ranks:
            self.processes[f"rank{number}"] = []
            self._start(number)

    def restart(self, rank: str) -> list[RankProcess]:
        """End what is left of a rank and start it again; its new processes. `StartError` as `start`."""
        number = next(number for number in self._config.local_ranks if f"rank{number}" == rank)
        for process in self.processes[rank]:
            process.send_signal(signal.SIGKILL)
        for process in self.processes[rank]:
            process.wait(_KILL)
            process.finish()
        self.processes[rank] = []
        self._start(number)
        return self.processes[rank]

    @property
    def _file(self) -> Path:
        return self._folder.path / "config.toml"

    def _start(self, number: int) -> None:
        rank, size = f"rank{number}", self._config.tensor_parallel_size
        # Never that of an earlier start, where its dead have been.
        rendezvous = self._folder.path / f"{rank}.{next(self._starts)}.meeting"
        place_here = self._config.data_parallel_rank_local + number - self._config.local_ranks.start
        for place, name in enumerate(self._config.worker_names(rank)):
            arguments = ["--rank", rank, "--worker", str(place), "--address", self.address]
            arguments += ["--config", str(self._file), "--rendezvous", str(rendezvous)]
            arguments += ["--gpu", str(place_here * size + place), "--patience", str(self._patience)]
            try:
                self.processes[rank].append(RankProcess(name, arguments))
            except OSError as error:
                raise StartError(f"{name} could not be started: {error}") from error

    def stop(self, *, polite: bool = True) -> None:
        """End every process that still runs, and remove the folder.

        polite: they were asked to leave; give them a few seconds before SIGTERM.
        """
        try:
            running = self._wait(_POLITE if polite else 0.0)
            running = self._signal(running, signal.SIGTERM, _TERMINATE)
        except KeyboardInterrupt:  # a second Ctrl-C: no more patience, but nothing is left behind
            running = self._running()
        self._signal(running, signal.SIGKILL, _KILL)
        for process in self._all():
            process.finish()
        self._folder.close()

    def _all(self) -> Iterator[RankProcess]:
        return itertools.chain.from_iterable(self.processes.values())

    def _running(self) -> list[RankProcess]:
        return [process for process in self._all() if process.running]

    def _wait(self, seconds: float) -> list[RankProcess]:
        deadline = time.monotonic() + seconds
        return [process for process in self._running() if not process.wait(deadline - time.monotonic())]

    def _signal(
        self, running: Sequence[RankProcess], number: signal.Signals, seconds: float
    ) -> list[RankProcess]:
        for process in running:
            process.send_signal(number)
        return self._wait(seconds) if running else []


def wait_for_an_end(processes: Sequence[RankProcess], timeout: float) -> None:
    """Until one more of these processes has ended, or `timeout` seconds are over."""
    with ExitStack() as stack:
        watched = [os.pidfd_open(process.pid) for process in processes if process.running]
        for descriptor in watched:
            stack.callback(os.close, descriptor)
        select.select(watched, [], [], timeout)


def tcp_address(host: str, port: int) -> str:
    """Where a head listens for ranks of other hosts; `host` is a name or an address, of IPv6 as well."""
    host = host.strip("[]")
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def _environment() -> dict[str, str]:
    """Ours, and our search path: what can be imported here, `--model` for one, can be there."""
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    # TENSORFERRY_* has gone into the configuration file already.
    # A model comes from its folder: nobody is to look for a newer one elsewhere.
    return os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}


def _signal_name(number: int) -> str:
    with suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"
