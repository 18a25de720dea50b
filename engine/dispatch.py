"""Gives requests to the ranks by the work they have outstanding, and to others when a rank dies.

One thread at a time calls it; it works while it is called and needs no thread of its own.
"""

from __future__ import annotations

import logging
import signal
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import transport
from engine.config import EngineConfig
from engine.errors import NoRankLeft, StartError
from engine.fleet import Elsewhere, Fleet, Member
from engine.job import OUTSTANDING, Job
from engine.protocol import Joined, Ready, Reply, Stop
from engine.results import RankStatus, WorkerStatus

_log = logging.getLogger("tensorferry.engine")

_LOOK_EVERY = 0.1
_FATE_TIMEOUT = 1.0
_SAY_EVERY = 10.0
_REMEMBERED_HOPS = 10_000


@dataclass(eq=False)
class _Worker:
    """near: it reads this process's memory. joined: what the process behind the name said first.

    namesake: who else came under that name, for a person.
    """

    process: Member
    linked: bool = False
    pid: int = 0
    host: str = ""
    near: bool = False
    joined: Joined | None = None
    device: str = ""
    namesake: str = ""

    def replaced_by(self, process: Member) -> None:
        """What was known of the old one holds no more, but for where it was."""
        self.process, self.linked, self.near, self.joined, self.device = process, False, False, None, ""
        self.pid = process.pid or self.pid

    def missing(self, addresses: Sequence[str]) -> str:
        """Why it isn't ready."""
        if self.linked:
            return f"{self} is still loading the model"
        where = "" if self.process.pid else f" to {' or '.join(addresses)}"
        return f"{self} has not connected{where}"

    def __str__(self) -> str:
        name, host = self.process.name, f" on {self.host}" if self.host and not self.process.pid else ""
        return f"{name} (pid {self.pid}{host})" if self.pid else f"{name} (of another host)"


@dataclass(eq=False)
class _Rank:
    """The workers that get each request together, of which the first answers; they live and end together."""

    workers: list[_Worker]
    gone: str = ""
    since: float = 0.0  # when it went
    expected: bool = True  # whether it may come, or come back
    requests: int = 0
    outstanding: dict[int, Job] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(job.nbytes for job in self.outstanding.values())

    @property
    def load(self) -> str:
        """What it has to do, since when, for a person."""
        oldest = min((job.sent for job in self.outstanding.values()), default=0.0)
        since = f", the oldest for {time.monotonic() - oldest:.1f} s" if oldest else ""
        return f"{len(self.outstanding)} requests ({self.nbytes} bytes){since}"

    @property
    def names(self) -> list[str]:
        return [worker.process.name for worker in self.workers]

    @property
    def ready(self) -> bool:
        return all(worker.device for worker in self.workers)

    @property
    def near(self) -> bool:
        return all(worker.near for worker in self.workers)

    @property
    def free(self) -> bool:
        return self.ready and not self.gone and len(self.outstanding) < OUTSTANDING

    def __str__(self) -> str:
        return str(self.workers[0])


class Dispatcher:
    """Knows the ranks, what each has outstanding, and which are gone."""

    def __init__(self, front: transport.Endpoint, fleet: Fleet, config: EngineConfig) -> None:
        self._front = front
        self._fleet = fleet
        self._ranks = {
            name: _Rank([_Worker(one, pid=one.pid) for one in members])
            for name, members in fleet.members.items()
        }
        self._workers = {
            worker.process.name: (rank, worker) for rank in self._ranks.values() for worker in rank.workers
        }
        self._warnings = transport.RateLimit()
        self._timeout = config.request_timeout
        self._patience = config.startup_timeout
        self._here = Joined.here(config)
        self._started = False
        self._again: deque[Job] = deque()
        self.hops: deque[int] = deque(maxlen=_REMEMBERED_HOPS)
        self.requests = 0
        self.late = 0
        self.nbytes = 0

    # ------------------------------------------------------------------ start

    def wait_until_ready(self, timeout: float) -> None:
        """Until every worker of every rank has loaded its model. Those of other hosts may come and go.

        Raises:
            StartError: one could not, died before, or is not ready in time.
        """
        began = said = time.monotonic()
        while waiting := [worker for _, worker in self._workers.values() if not worker.device]:
            now = time.monotonic()
            if now - min(began + timeout, said + _SAY_EVERY) > 0:
                states = "; ".join(worker.missing(self._front.addresses[-1:]) for worker in waiting)
                if now > began + timeout:
                    namesakes = [worker.namesake for _, worker in self._workers.values() if worker.namesake]
                    states = "; ".join([states, *namesakes])
                    raise StartError(f"not ready within {timeout:g} s (startup_timeout): {states}")
                if any(isinstance(worker.process, Elsewhere) for worker in waiting):
                    _log.warning("waiting for %.0f s, %g at most: %s", now - began, timeout, states)
                said = now
            self.progress()
            self._fleet.check()
        self._started = True

    # ------------------------------------------------------------------ work

    def submit(self, job: Job) -> None:
        """Send a job to the rank with the least outstanding, waiting until one has room.

        What goes wrong with the job itself is told to its photographs.

        Raises:
            NoRankLeft: every rank has died; the job failed, too.
        """
        deadline = time.monotonic() + self._timeout
        self._again.append(job)
        self._send_waiting()
        while job in self._again:
            if time.monotonic() > deadline:
                self._again.remove(job)
                job.fail(f"no rank had room for it within {self._timeout:g} s: {self._busy()}")
                return
            self.progress()

    def progress(self) -> None:
        """Wait a moment for something to come, and handle all that came.

        Raises:
            NoRankLeft: every rank has died; all jobs have failed.
        """
        self._receive(_LOOK_EVERY)
        while self._receive(0.0):
            pass
        # After receiving: an answer that a rank sent before it died counts.
        self._look_for_gone()
        if self._started and not any(map(self._may_serve, self._ranks.values())):
            self._give_up()
        self._look_for_overdue()
        self._send_waiting()

    def _receive(self, seconds: float) -> bool:
        kinds, message = Joined | Ready | Reply, None
        try:
            if seconds:
                message = self._front.receive(kinds, timeout=seconds)
            else:  # without the text of a time-out
                message = self._front.try_receive(kinds)
        except transport.Timeout:
            return False
        except (transport.ProtocolError, transport.PeerGone) as error:
            self._warnings.tell(_log.error, f"an answer could not be read: {error}", "unreadable")
            return True
        if message is None:
            return False
        rank, worker = self._workers.get(message.sender, (None, None))
        if rank is None or worker is None:
            self._met_stranger(message.sender, message.body)
        elif isinstance(message.body, Reply):
            self._answered(rank, message.body)
        elif self._is_namesake(worker):
            self._met_namesake(worker, message.body)
        elif isinstance(message.body, Joined):
            self._came(rank, worker, message.body)
        elif message.body.error and rank.gone and self._started:
            # Of the old process, or of the new one, whose end is seen by itself.
            _log.error("%s could not serve: %s", worker, message.body.error)
        elif message.body.error:
            self._cannot_serve(rank, worker, message.body.error)
        else:
            worker.device = message.body.device
            if rank.ready and rank.gone:
                _log.warning("%s is back", rank)
                rank.gone = ""
        return True

    def _came(self, rank: _Rank, worker: _Worker, joined: Joined) -> None:
        if worker.joined is not None and not rank.gone:
            self._lose(rank, worker, "was replaced by a new process before its end was seen")
        worker.joined, worker.linked = joined, True
        worker.host, worker.pid = joined.host, joined.pid
        if joined.serves != self._here.serves:
            why = self._compared(joined)
            self._send_away(worker.process.name, why)
            self._cannot_serve(rank, worker, why)

    def _compared(self, joined: Joined) -> str:
        return f"it serves {joined.serves}, its head {self._here.serves}"

    def _send_away(self, name: str, why: str) -> None:
        with suppress(transport.TransportError):
            self._front.try_send(Stop(why), to=name)  # who takes nothing is not waited for

    def _met_stranger(self, name: str, said: Joined | Ready | Reply) -> None:
        if not isinstance(said, Joined):
            text = f"{name!r} is none of the ranks; what it sent is ignored"
            self._warnings.tell(_log.error, text, "stranger")
            return
        text = f"{name!r} (pid {said.pid} on {said.host:.100}) is none of the ranks; it is sent away"
        self._warnings.tell(_log.error, text, "stranger came")
        why = "compare --data-parallel-size and --data-parallel-start-rank"
        self._send_away(name, f"{name!r} is none of the head's ranks; {why} ({self._compared(said)})")

    def _is_namesake(self, worker: _Worker) -> bool:
        """Whether who has the name of a worker that was started here is another: he came by tcp.

        Not told by the pid: processes in different containers may have equal ones.
        """
        if not worker.process.pid:
            return False
        addresses = [peer.address for peer in self._front.peers if peer.name == worker.process.name]
        return any(address.startswith("tcp://") for address in addresses)

    def _met_namesake(self, worker: _Worker, said: Joined | Ready) -> None:
        if not isinstance(said, Joined):
            return
        name = worker.process.name
        worker.namesake = (
            f"pid {said.pid} on {said.host} came as {name}, which the head starts itself: "
            "that host lacks its --data-parallel-start-rank"
        )
        self._warnings.tell(_log.error, worker.namesake, "namesake", name)
        self._send_away(
            name, f"its head starts {name} itself; give this host its own --data-parallel-start-rank"
        )

    def _cannot_serve(self, rank: _Rank, worker: _Worker, error: str) -> None:
        if not self._started:
            raise StartError(f"{worker} could not start: {error}")
        # It lost another worker, whose death says more, and may be known a moment later only.
        others = [other for other in rank.workers if other is not worker]
        ended = (other for other in others if other.process.wait(_FATE_TIMEOUT / len(others)))
        if first := next(ended, None):
            self._lose(rank, first, self._fate(first))
        else:
            self._lose(rank, worker, f"can't go on: {error}")

    def _answered(self, rank: _Rank, reply: Reply) -> None:
        job = rank.outstanding.pop(reply.id, None)
        if job is None or job.settled:
            self.late += 1
            text = f"{rank} answers a request too late, which went to another or was given up"
            self._warnings.tell(_log.warning, f"{text}; it has {rank.load}", "late", str(rank))
            return
        rank.requests += 1
        self.requests += 1
        joined = rank.workers[0].joined
        if joined is not None and joined.boot == self._here.boot:  # else its clock is another
            self.hops.append(reply.hop_ns)
        errors = {place: f"{rank}: {why}" for place, why in reply.errors.items()}
        job.settle(reply.embeddings, errors, reply.texts)

    def _send_waiting(self) -> None:
        while self._again:
            free = [rank for rank in self._ranks.values() if rank.free]
            if not free:
                return
            # Of equal ranks the near ones first, since they read in place; then they take turns, so that
            # a slow start of one doesn't leave the others idle.
            rank = min(free, key=lambda rank: (rank.nbytes, not rank.near, rank.requests))
            job = self._again[0]
            if self._send(job, rank):
                self._again.popleft()

    def _send(self, job: Job, rank: _Rank) -> bool:
        """Whether the job is done with, sent or failed; False when the rank is gone."""
        job.rank, job.sent = rank.names[0], time.monotonic()
        try:
            job.prepare()
            self._front.send(job.request(), to=rank.names, timeout=self._timeout)
        except transport.TransportError as error:
            self._look_for_gone()
            if isinstance(error, transport.PeerGone | transport.Full) and error.delivered and not rank.gone:
                # Some workers would wait in vain for the others, and answer the next request with this one.
                self._lose(rank, rank.workers[0], f"got a request only in part: {error}")
            if rank.gone:
                return False
            if isinstance(error, transport.PeerGone):  # it is back already, or the next look finds it gone
                self._receive(_LOOK_EVERY)
                return False
            job.fail(f"could not be sent to {rank}: {error}")
            return True
        job.tensors = []
        rank.outstanding[job.id] = job
        self.nbytes += job.nbytes
        return True

    # ------------------------------------------------------------------ who is gone or late

    def _look_for_gone(self) -> None:
        if next(self._gone(), None) is None:
            return
        # What it sent before it went may have come since the last look for messages.
        self._receive(_LOOK_EVERY)
        while self._receive(0.0):
            pass
        for rank, worker in self._gone():
            # Of several that went, one that was killed: the others only missed it.
            killed = (w for w in rank.workers if w.process.fate().startswith("was killed"))
            culprit = next(killed, worker)
            self._lose(rank, culprit, self._fate(culprit))

    def _gone(self) -> Iterator[tuple[_Rank, _Worker]]:
        """The workers whose links or processes have ended, one after the other."""
        peers = {peer.name: peer for peer in self._front.peers}
        for name, (rank, worker) in self._workers.items():
            peer = peers.get(name)
            # The link of one that was just killed may still be there when another takes its place.
            if peer and worker.process.pid in (0, peer.pid):
                worker.linked = True
                worker.near = peer.backend.startswith("shm")
            elif worker.linked or (rank.expected and not worker.process.running):
                yield rank, worker

    def _may_serve(self, rank: _Rank) -> bool:
        return not rank.gone or (rank.expected and time.monotonic() - rank.since < self._patience)

    def _fate(self, worker: _Worker) -> str:
        # The connection ends a moment before the process can be asked how it ended.
        worker.process.wait(_FATE_TIMEOUT)
        left = self._front.statistics()["left"].get(worker.process.name, "is gone")
        return worker.process.fate() or left

    def _lose(self, rank: _Rank, culprit: _Worker, fate: str) -> None:
        """The rank is at its end since one of its workers is, and its requests go to others."""
        if not self._started and not culprit.process.running:
            words = culprit.process.last_words()
            said = f"; it wrote: {words}" if words else ""
            said += f"; {culprit.namesake}" if culprit.namesake else ""
            raise StartError(f"{culprit} {fate} before it was ready{said}")
        rank.gone = fate if culprit is rank.workers[0] else f"ended with {culprit}, which {fate}"
        rank.since = time.monotonic()
        self._end_together(rank)
        orphans = [job for job in rank.outstanding.values() if not job.settled]
        rank.outstanding.clear()
        _log.error("%s %s; %d requests go to the others", rank, rank.gone, len(orphans))
        self._replace(rank)
        for job in orphans:
            if job.lost:
                job.fail(f"{' and '.join([*job.lost, f'{rank} {rank.gone}'])} while it had this request")
            else:
                job.lost.append(f"{rank} {rank.gone}")
                self._again.append(job)

    def _replace(self, rank: _Rank) -> None:
        """Another process may take the place of each worker, started here or where they were."""
        try:
            members = self._fleet.restart(rank.workers[0].process.name)
        except StartError as error:
            _log.error("%s is not started again: %s", rank, error)
            members = None
        rank.expected = members is not None
        for worker, member in zip(rank.workers, members or [w.process for w in rank.workers], strict=True):
            worker.replaced_by(member)

    def _end_together(self, rank: _Rank) -> None:
        """SIGKILL, since they may be in a sum that nothing else ends, on a GPU."""
        if len(rank.workers) > 1:
            for worker in rank.workers:
                worker.process.send_signal(signal.SIGKILL)
            for worker in rank.workers:
                worker.process.wait(_FATE_TIMEOUT)

    def _give_up(self) -> None:
        reasons = "; ".join(f"{rank} {rank.gone}" for rank in self._ranks.values())
        while self._again:
            self._again.popleft().fail(f"no rank is left: {reasons}")
        raise NoRankLeft(f"no rank is left: {reasons}")

    def _look_for_overdue(self) -> None:
        latest = time.monotonic() - self._timeout
        for rank in self._ranks.values():
            for job in rank.outstanding.values():
                if job.sent < latest and not job.settled:
                    # It stays outstanding: slow is not dead, and the rank still has it to do.
                    late = f"{rank} has not answered within {self._timeout:g} s (request_timeout)"
                    job.fail(f"{late}; it has {rank.load}")
                    self._warnings.tell(_log.error, f"{late}; it has {rank.load}", "overdue", str(rank))

    def _busy(self) -> str:
        return ", ".join(f"{rank} has {rank.load}" for rank in self._ranks.values() if rank.outstanding)

    def status(self) -> list[RankStatus]:
        """Every rank as it is now, those that are gone included."""
        while self._receive(0.0):
            pass
        self._look_for_gone()
        peers = {peer.name: peer for peer in self._front.peers}
        found = []
        for name, rank in self._ranks.items():
            workers = tuple(_status(worker, peers.get(worker.process.name)) for worker in rank.workers)
            found.append(RankStatus(name, workers, rank.requests, len(rank.outstanding), error=rank.gone))
        return found


def _status(worker: _Worker, peer: transport.PeerInfo | None) -> WorkerStatus:
    return WorkerStatus(
        name=worker.process.name,
        pid=worker.pid,
        host=worker.host,
        address=peer.address if peer else "",
        device=worker.device,
        backend=peer.backend if peer else "",
    )
