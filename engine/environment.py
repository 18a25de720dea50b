"""Where this process stands among many, as torchrun, SLURM or a script of the user's says in the environment.

Every process runs the same command line. The one with rank 0 is the head, and starts rank 0 on its own host;
each of the others is a headless host of one rank.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from engine.config import EngineConfig
from engine.options import ConfigError

_SOURCE = "environment"
# Rank, number of ranks, place on the host: torch's names, then those of SLURM for the tasks of a step.
_NAMES = (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"))
_NODES = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")


def placed(config: EngineConfig, environ: Mapping[str, str]) -> EngineConfig:
    """`config` with the rank of this process, their number and the head's address from the environment.

    The head is at MASTER_ADDR, else on the first node of the SLURM step; an address or a port that was given
    goes first. The port is the one after MASTER_PORT, which is torch.distributed's own.

    Raises:
        ConfigError: the environment lacks something or says nonsense, or contradicts `data_parallel_size`.
    """
    rank, size, place = _numbers(environ)
    if config.data_parallel_size not in (1, size):
        raise ConfigError(
            f"data_parallel_size = {config.data_parallel_size} ({config.sources['data_parallel_size']}): "
            f"the environment says {size} ranks; leave it out with data_parallel_backend env"
        )
    values: dict[str, Any] = {
        "data_parallel_size": size,
        "data_parallel_size_local": 1,
        "data_parallel_start_rank": rank,
        "data_parallel_rank_local": place,
        "data_parallel_address": config.data_parallel_address or _head(environ),
        "headless": rank > 0,
    }
    if config.sources["data_parallel_rpc_port"] == "default" and "MASTER_PORT" in environ:
        values["data_parallel_rpc_port"] = _number(environ, "MASTER_PORT") + 1
    found = dataclasses.replace(config, **values)
    found.sources.update(config.sources | dict.fromkeys(values, _SOURCE))
    return found


def _numbers(environ: Mapping[str, str]) -> tuple[int, int, int]:
    for names in _NAMES:
        if names[0] in environ:
            rank, size = (_number(environ, name) for name in names[:2])
            if not rank < size:
                raise ConfigError(f"{names[0]} is {rank} and {names[1]} {size}: ranks count from 0")
            return rank, size, _number(environ, names[2]) if names[2] in environ else 0
    raise ConfigError(
        "data_parallel_backend is env, but neither RANK nor SLURM_PROCID is set: start every rank with "
        "torchrun or srun, or set RANK, WORLD_SIZE and MASTER_ADDR yourself"
    )


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "")
    if not text.isdecimal():
        raise ConfigError(f"environment variable {name} = {text!r}: must be a whole number")
    return int(text)


def _head(environ: Mapping[str, str]) -> str:
    for name in _NODES if "MASTER_ADDR" not in environ and "RANK" not in environ else ():
        if environ.get(name):
            return first_node(environ[name])
    head = environ.get("MASTER_ADDR") or environ.get("SLURM_LAUNCH_NODE_IPADDR")
    if not head:
        raise ConfigError("where is the head? Set MASTER_ADDR, or give --data-parallel-address")
    return head


def first_node(nodes: str) -> str:
    """The first of a SLURM list of nodes: `gpu07` of `gpu[07-09,12],login1`."""
    match = re.match(r"([^\[,]*)(?:\[([^\],-]+)[^\]]*\])?([^\[,]*)", nodes)
    assert match is not None  # every part of it may be empty
    return "".join(part or "" for part in match.groups())
