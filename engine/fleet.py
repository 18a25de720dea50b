"""All the ranks of a run as its head sees them: those it starts here, and those of other hosts."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

from engine.cluster import RayRanks
from engine.config import EngineConfig
from engine.launch import LocalRanks, tcp_address


class Member(Protocol):
    """One worker of a rank, wherever it runs. `RankProcess` is one; what can't be known is "" or 0."""

    @property
    def name(self) -> str: ...

    @property
    def pid(self) -> int:
        """0 until it has connected, for one of another host."""

    @property
    def running(self) -> bool:
        """False once it is known to have ended."""

    def fate(self) -> str:
        """How it ended, in words."""

    def last_words(self) -> str:
        """The last line that it wrote."""

    def wait(self, timeout: float) -> bool:
        """Whether it ended within `timeout` seconds; at once where that can't be known."""

    def send_signal(self, number: signal.Signals) -> None:
        """Signal it, where that is possible."""


class Elsewhere:
    """A worker that somebody else starts and ends, on another host: only its link tells anything of it."""

    pid = 0
    running = True

    def __init__(self, name: str) -> None:
        self.name = name

    def fate(self) -> str:
        return ""

    def last_words(self) -> str:
        return ""

    def wait(self, timeout: float) -> bool:  # noqa: ARG002  # there is nothing to wait for
        return False

    def send_signal(self, number: signal.Signals) -> None:
        """Its own host ends it together with its rank."""


class Fleet:
    """The ranks of a run, and who starts each of them again.

    addresses: where the head listens for them. members: by rank its workers, the first of which answers.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._restarts: Counter[str] = Counter()
        self._ray = RayRanks(config) if config.data_parallel_backend == "ray" else None
        self.members: dict[str, Sequence[Member]] = {}
        self.addresses: list[str] = []
        if len(config.local_ranks) < config.data_parallel_size:
            host = config.data_parallel_address or (self._ray.own_address if self._ray else "127.0.0.1")
            self.addresses.append(tcp_address(host, config.data_parallel_rpc_port))
        self._local = LocalRanks(config)
        if config.local_ranks:
            self.addresses.insert(0, self._local.address)

    def start(self, addresses: Sequence[str]) -> None:
        """Start what is started from here. `addresses`: where the head listens now, ports filled in.

        Raises:
            StartError: a process, or the ranks of Ray, can't be had; what was started is still to be stopped.
        """
        config = self._config
        self._local.start()
        self.members |= self._local.processes
        for number in range(config.data_parallel_size):
            if number not in config.local_ranks:
                names = config.worker_names(f"rank{number}")
                self.members[names[0]] = [Elsewhere(name) for name in names]
        if self._ray is not None:
            self._ray.start(addresses[-1])

    def check(self) -> None:
        """`StartError` when who places ranks elsewhere says that one of them could not start."""
        if self._ray is not None:
            self._ray.check()

    def restart(self, rank: str) -> Sequence[Member] | None:
        """The workers that take the place of a rank that died, or may come from where it was; None: nobody.

        Raises:
            StartError: the system refuses to make a process.
        """
        if rank not in self._local.processes:
            return self.members[rank]
        self._restarts[rank] += 1
        if self._restarts[rank] > self._config.rank_restarts:
            return None
        return self._local.restart(rank)

    def stop(self, *, polite: bool = True) -> None:
        """End what was started from here. polite: they were asked to leave and may take some seconds."""
        try:
            self._local.stop(polite=polite)
        finally:
            if self._ray is not None:
                self._ray.stop()
