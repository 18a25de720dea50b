"""The workers of one tensor-parallel rank: how they find each other, add up their parts, and stay in step.

They are processes of one host, each with a part of the model. All of them get every request; a model adds
up partial results with `Parallel.sum`; the worker with rank 0 answers for all.

Technique: sums after row-parallel layers as in Shoeybi et al., "Megatron-LM" (arXiv 1909.08053), section 3.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import FileStore, PrefixStore, Store  # type: ignore[attr-defined]  # not in its stubs

# What the store says of a worker that is there.
_HERE = "here/"
_FAILED = "failed/"
_LOOK_EVERY = 0.05
_OTHERS_MAY_TAKE = 1.0  # seconds from the failure of a step in one worker to that in all who are in it


class ParallelError(Exception):
    """The workers of a rank can't go on together; the message says which worker is missing, late or ahead."""


@dataclass(frozen=True, eq=False)
class Parallel:
    """One worker's place among the `size` workers of its rank, `rank` from 0. Alone it has nobody to ask.

    group: for a model that needs other collectives than `sum`; None alone. Every one of them ends after the
    time-out given to `join`. An error in one leaves the workers out of step: let it pass as it is.
    """

    rank: int = 0
    size: int = 1
    names: Sequence[str] = ("rank0",)
    group: dist.ProcessGroup | None = None
    # Apart from the model's, so that a worker that failed in the middle of a pass can't take part in a sum.
    control: dist.ProcessGroup | None = None
    # Where they met, and say that a step has failed.
    store: Store | None = None

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor`, with those of all workers added to it in place. It may not be a view into the ring.

        Raises:
            ParallelError: a worker is gone, or didn't take part in time; this rank is at its end.
        """
        if self.group is not None:
            with self._named("a sum over the workers"):
                dist.all_reduce(tensor, group=self.group)
        return tensor

    def agree(self, step: int, *, failed: bool) -> list[str]:
        """Meet the others after a step; the names of those that failed in it.

        Raises:
            ParallelError: as `sum`, or another worker is at another step.
        """
        if self.control is None:
            return [self.names[self.rank]] if failed else []
        mine = torch.tensor([step, int(failed)])
        reports = [torch.empty_like(mine) for _ in range(self.size)]
        with self._named("the meeting after a step"):
            dist.all_gather(reports, mine, group=self.control)
        steps = [int(report[0]) for report in reports]
        if len(set(steps)) > 1:
            places = ", ".join(f"{name} at {at}" for name, at in zip(self.names, steps, strict=True))
            raise ParallelError(f"the workers are out of step: {places}")
        return [name for name, report in zip(self.names, reports, strict=True) if report[1]]

    def leave(self) -> None:
        """Part in peace, when no request is left; whoever failed just ends."""
        if self.group is not None:
            dist.destroy_process_group()

    @contextmanager
    def _named(self, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise ParallelError(f"{what} failed{self._but_for_whom()}: {error}") from error

    def _but_for_whom(self) -> str:
        """Who does not say that it failed there, too, for a person; "" where nobody can be asked."""
        if self.store is None:
            return ""
        try:
            absent = _absent(self.store, self.rank, self.names)
        except RuntimeError:  # who started them is gone, and the place of their meeting with it
            return ""
        if not absent:
            return " in every worker"
        return (
            f"; {', '.join(absent)} did not come to its end in {_OTHERS_MAY_TAKE:g} s: gone, stopped or slow"
        )


def join(
    rank: int,
    names: Sequence[str],
    rendezvous: Path,
    *,
    device: torch.device,
    patience: float,
    timeout: float,
) -> Parallel:
    """Meet the other workers of this rank over a file in a private folder and the loopback interface.

    rank: our place in `names`. device: where the model runs, CUDA gets NCCL and the CPU gloo. patience:
    seconds until all have to be there; timeout: seconds that any collective may take afterwards.

    Raises:
        ParallelError: somebody didn't come; who, is said.
    """
    gpus = torch.cuda.device_count()
    if device.type == "cuda" and gpus < len(names):
        raise ParallelError(
            f"tensor_parallel_size {len(names)} takes as many GPUs, and there are {gpus} here"
        )
    # The addresses that are exchanged are those of these interfaces; the default is what the host name
    # resolves to, which other hosts can reach.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    store = FileStore(str(rendezvous), len(names))
    _wait_for_all(store, rank, names, patience)
    limit = timedelta(seconds=timeout)
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=PrefixStore("group", store),
            rank=rank,
            world_size=len(names),
            timeout=limit,
            device_id=device if device.type == "cuda" else None,
        )
        control = dist.new_group(backend="gloo", timeout=limit)
    except RuntimeError as error:
        met = ", ".join(_with_pid(store, place, name) for place, name in enumerate(names))
        raise ParallelError(f"{met} met and could not connect: {error}") from error
    return Parallel(rank, len(names), names, dist.group.WORLD, control, store)


def _wait_for_all(store: Store, rank: int, names: Sequence[str], patience: float) -> None:
    store.set(f"{_HERE}{rank}", str(os.getpid()))
    deadline = time.monotonic() + patience
    while missing := [name for place, name in enumerate(names) if not store.check([f"{_HERE}{place}"])]:
        if time.monotonic() > deadline:
            raise ParallelError(
                f"{names[rank]} waited {patience:g} s (startup_timeout) for {', '.join(missing)}, "
                "which did not come to the meeting of this rank's workers"
            )
        time.sleep(_LOOK_EVERY)


def _absent(store: Store, rank: int, names: Sequence[str]) -> list[str]:
    """Who does not fail within a moment after this worker did. Those in one step fail together."""
    store.set_timeout(timedelta(seconds=_OTHERS_MAY_TAKE))
    store.set(f"{_FAILED}{rank}", "")
    deadline = time.monotonic() + _OTHERS_MAY_TAKE
    while absent := [place for place in range(len(names)) if not store.check([f"{_FAILED}{place}"])]:
        if time.monotonic() > deadline:
            break
        time.sleep(_LOOK_EVERY)
    return [_with_pid(store, place, names[place]) for place in absent]


def _with_pid(store: Store, place: int, name: str) -> str:
    """A worker that came to the meeting, with its pid."""
    return f"{name} (pid {store.get(f'{_HERE}{place}').decode()})"
