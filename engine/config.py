"""The engine's one frozen configuration; flags, TOML file and environment derive from its fields."""

from __future__ import annotations

import dataclasses
from typing import Literal

from engine.options import ConfigError, Settings, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig(Settings):
    """Everything that can be set, under vLLM's names where it has them.

    `EngineConfig(...)` and `EngineConfig.load(...)` check every value and raise `engine.options.ConfigError`.
    """

    tensor_transport: Literal["auto", "shm", "tcp", "frames", "inline"] = option(
        "auto",
        help="How tensors travel; auto takes shared memory for every peer that proves to map it, else tcp.",
    )
    shm_ring_gb: float = option(
        1.0,
        unit="GiB",
        minimum=0.001,
        help="Size of each sender's ring; its memory is taken as it is first used.",
    )
    inline_below_kb: int = option(
        64,
        unit="KiB",
        minimum=0,
        help="Tensors smaller than this ride inside the control message.",
    )
    peer_share: float = option(
        0.5,
        minimum=0.01,
        maximum=1.0,
        help="Part of a ring that one peer may hold.",
    )
    copy_threads: int = option(
        0,
        minimum=0,
        help="Threads that copy one large tensor into the ring; 0: by cores.",
    )
    data_parallel_size: int = option(
        1,
        minimum=1,
        short="-dp",
        help="Number of data-parallel ranks, each with its own copy of the model.",
    )
    data_parallel_size_local: int | None = option(
        None,
        minimum=0,
        short="-dpl",
        help="How many of the ranks this host starts; the others come from other hosts. Unset: all.",
    )
    data_parallel_start_rank: int = option(
        0,
        minimum=0,
        short="-dpr",
        help="With --headless, the first of the ranks of this host.",
    )
    data_parallel_rank_local: int = option(
        0,
        minimum=0,
        help="The place of the first rank here among all of its host, which chooses its GPU.",
    )
    data_parallel_address: str | None = option(
        None,
        short="-dpa",
        help="Where the head listens for ranks of other hosts; unset: 127.0.0.1, with ray the node's own.",
    )
    data_parallel_rpc_port: int = option(
        29550,
        minimum=0,
        maximum=65535,
        short="-dpp",
        help="The port there; 0, for the head with ray: any that is free.",
    )
    data_parallel_backend: Literal["mp", "ray", "env"] = option(
        "mp",
        short="-dpb",
        help="Who places ranks: this command and --headless ones, Ray, or the environment (torchrun, SLURM).",
    )
    headless: bool = option(
        False,
        help="Only start ranks of this host, for the head at --data-parallel-address.",
    )
    head_timeout: float = option(
        300.0,
        unit="seconds",
        minimum=0.001,
        help="How long ranks of another host wait for the head, at the start and after they lost it.",
    )
    rank_restarts: int = option(
        3,
        minimum=0,
        help="How often a rank that died is started again, where it was and while the others go on.",
    )
    insecure: bool = option(
        False,
        help="Allow ranks of other hosts without encryption, on a network that you trust.",
    )
    tensor_parallel_size: int = option(
        1,
        minimum=1,
        short="-tp",
        help="Number of workers that share the model of one rank; each has a GPU of its own.",
    )
    device: Literal["auto", "cpu", "cuda"] = option(
        "auto",
        help="Where the model runs; auto takes CUDA where there is one.",
    )
    model: str = option(
        "builtin",
        help="The built-in encoder, package.module:Class, or a folder with a Hugging Face model.",
    )
    generate: str | None = option(
        None,
        help="Have a generating model from a folder write about every image, asked this.",
    )
    max_tokens: int = option(
        64,
        minimum=1,
        unit="tokens",
        help="How much it may write.",
    )
    seed: int = option(
        0,
        minimum=0,
        maximum=2**63 - 1,
        help="Seed of the built-in encoder's weights.",
    )
    prompts: int = option(
        0,
        minimum=0,
        help="Number of prompts; 0: as many as it takes to send every image once.",
    )
    images_per_prompt: int = option(
        4,
        minimum=1,
        help="Images in one prompt.",
    )
    megapixels: float | None = option(
        None,
        unit="megapixels",
        minimum=0.01,
        maximum=100.0,
        help="Scale every image to about this size; unset: leave it as it is.",
    )
    startup_timeout: float = option(
        120.0,
        unit="seconds",
        minimum=0.001,
        help="How long the ranks may take until all are ready.",
    )
    request_timeout: float = option(
        120.0,
        unit="seconds",
        minimum=0.001,
        help="How long a prompt may take from sending to its answer.",
    )
    tcp_port: int = option(
        0,
        minimum=0,
        maximum=65535,
        help="Port for the bytes of tensors beside the messages over TCP, on who listens; 0: any.",
    )
    curve_key: str | None = option(
        None,
        help="File of this side's key pair (`tensorferry keys`): links over TCP are encrypted then.",
    )
    curve_server: str | None = option(
        None,
        help="File of the public key of who listens, for who connects to it.",
    )
    curve_clients: str | None = option(
        None,
        help="Folder of the public keys of who may connect.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = option(
        "warning",
        help="The least severe messages that go to standard error.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        size, local = self.data_parallel_size, self.data_parallel_size_local
        if self.data_parallel_start_rank and not self.headless and self.data_parallel_backend != "env":
            raise ConfigError(
                "data_parallel_start_rank is for --headless: the head's own ranks are the first"
            )
        if self.headless and self.data_parallel_backend == "ray":
            raise ConfigError("headless: Ray starts the ranks of other nodes by itself; run the head alone")
        if self.headless and not self.local_ranks:
            raise ConfigError(
                f"headless: no rank is left for this host (data_parallel_size {size}, "
                f"data_parallel_start_rank {self.data_parallel_start_rank}, data_parallel_size_local {local})"
            )
        if not (self.data_parallel_rpc_port or self.data_parallel_backend == "ray") and (
            self.headless or len(self.local_ranks) < size
        ):
            raise ConfigError(
                "data_parallel_rpc_port = 0: give the head and the ranks of other hosts the same port, from 1"
                " to 65535; only Ray tells them which was free"
            )
        if local is not None and self.data_parallel_start_rank + local > size:
            raise ConfigError(
                f"data_parallel_size_local = {local}: with data_parallel_start_rank "
                f"{self.data_parallel_start_rank} that is more than data_parallel_size, {size}"
            )
        for name in ("curve_clients", "curve_server"):
            if getattr(self, name) and not self.curve_key:
                raise ConfigError(
                    f"{name} without curve_key encrypts nothing: give this side's own key pair, too"
                )

    @property
    def local_ranks(self) -> range:
        """The numbers of the ranks that this process starts; with Ray none."""
        start, local = self.data_parallel_start_rank, self.data_parallel_size_local
        if self.data_parallel_backend == "ray":
            return range(0)
        return range(start, self.data_parallel_size if local is None else start + local)

    def worker_names(self, rank: str) -> list[str]:
        """The workers of a rank: the first, which answers, has the rank's own name."""
        return [rank, *(f"{rank}.tp{number}" for number in range(1, self.tensor_parallel_size))]

    @property
    def ring_bytes(self) -> int:
        """`shm_ring_gb` in bytes."""
        return int(self.shm_ring_gb * 2**30)

    @property
    def inline_below(self) -> int:
        """`inline_below_kb` in bytes."""
        return self.inline_below_kb * 2**10
