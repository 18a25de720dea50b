"""Ranks for a head on another host: started here, and started again when they die or lose their head."""

from __future__ import annotations

import logging
from collections import Counter

from engine.config import EngineConfig
from engine.errors import HEAD_LOST, NO_HEAD, StartError
from engine.launch import LocalRanks, RankProcess, tcp_address, wait_for_an_end

_log = logging.getLogger("tensorferry.headless")

_LOOK_EVERY = 1.0


class Headless:
    """The ranks of this host, until the head says that its run is over.

    A rank that lost its head starts anew and waits for the next one, as long as `head_timeout`: its host
    serves one head after the other. One that died is started again, `rank_restarts` times.
    """

    def __init__(self, config: EngineConfig) -> None:
        host, port = config.data_parallel_address or "127.0.0.1", config.data_parallel_rpc_port
        self.address = tcp_address(host, port)
        self._config = config
        self._restarts: Counter[str] = Counter()
        self._failed: dict[str, str] = {}

    def run(self) -> None:
        """Until every rank has ended.

        Raises:
            StartError: a rank ended otherwise than because the head told it to; which, and why.
        """
        ranks = LocalRanks(self._config, address=self.address, patience=self._config.head_timeout)
        try:
            ranks.start()
            running = dict(ranks.processes)
            while running:
                wait_for_an_end([one for workers in running.values() for one in workers], _LOOK_EVERY)
                for rank, workers in list(running.items()):
                    if all(worker.running for worker in workers):
                        continue
                    if self._starts_again(rank, workers):
                        running[rank] = ranks.restart(rank)
                    elif not any(worker.running for worker in workers) or rank in self._failed:
                        del running[rank]
        finally:
            ranks.stop(polite=False)
        if self._failed:
            raise StartError("; ".join(self._failed.values()))

    def _starts_again(self, rank: str, workers: list[RankProcess]) -> bool:
        """Whether a rank of which a worker has ended is to be started again; if not, whether it failed."""
        ended = [worker for worker in workers if not worker.running]
        if any(worker.code == 0 for worker in ended):
            return False
        # What killed one says more than that the others missed it then.
        first = min(ended, key=lambda worker: worker.code in (HEAD_LOST, 1))
        if first.code == HEAD_LOST:
            _log.warning(
                "%s lost the head at %s; it waits up to %g s for the next", rank, self.address, self._patience
            )
            return True
        what = f"{first.name} {first.fate()}"
        if first.code == NO_HEAD:
            self._failed[rank] = (
                f"no head in {self._patience:g} s (head_timeout): {first.last_words() or what}"
            )
            return False
        if first.code == 1:
            self._failed[rank] = f"{first.name}: {first.last_words() or first.fate()}"
            return False
        self._restarts[rank] += 1
        if self._restarts[rank] > self._config.rank_restarts:
            words = first.last_words()
            self._failed[rank] = f"{what}{f'; it wrote: {words}' if words else ''}"
            _log.error("%s; it is not started again (rank_restarts)", self._failed[rank])
            return False
        _log.warning("%s; it is started again", what)
        return True

    @property
    def _patience(self) -> float:
        return self._config.head_timeout
