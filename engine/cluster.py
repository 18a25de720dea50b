"""Ranks as Ray actors: Ray chooses their nodes, keeps their resources, and starts them again elsewhere.

An actor is what `--headless` is on another host: it starts the workers of one rank, which connect to the head
by themselves. What Ray carries is the configuration and the end, never a tensor. Ray is optional.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import closing, suppress
from typing import Any

from engine.config import EngineConfig
from engine.errors import StartError
from engine.folders import PrivateFolder
from engine.headless import Headless

_POLITE = 5.0
_LOOK_EVERY = 0.5
_A_LITTLE = 0.001  # of the resource that every node has of its own: enough to be there


class RankActor:
    """One rank on one node, as an actor that Ray has made."""

    def serve(self, config: str) -> None:
        """Until the head says that its run is over. config: as TOML. `StartError` as `Headless.run`."""
        with closing(PrivateFolder()) as folder:
            file = folder.path / "config.toml"
            file.write_text(config, encoding="utf-8")
            given = EngineConfig.load({}, environ={}, file=file)
        Headless(given).run()


class RayRanks:
    """A placement group with a bundle for each rank, and the actors in it.

    Raises:
        StartError: Ray is not installed, or no cluster of it runs here.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._ray = _ray()
        self._ours = _connect(self._ray)
        self._group: Any = None
        self._actors: list[Any] = []
        self._serving: list[Any] = []

    @property
    def own_address(self) -> str:
        """Of this node, as the others of the cluster reach it."""
        return str(self._ray.util.get_node_ip_address())

    def start(self, address: str) -> None:
        """Place all ranks; `data_parallel_size_local` of them on this node.

        address: where the head listens, `tcp://HOST:PORT`.

        Raises:
            StartError: the cluster hasn't the resources for them within `startup_timeout`.
        """
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        bundles = self._bundles()
        self._group = placement_group(bundles, strategy="SPREAD")
        self._wait_for_place(bundles)
        actor = self._ray.remote(RankActor)
        host, _, port = address.removeprefix("tcp://").rpartition(":")
        for number, bundle in enumerate(bundles):
            made = actor.options(
                num_cpus=bundle["CPU"],
                num_gpus=bundle.get("GPU", 0),
                max_restarts=self._config.rank_restarts,
                max_task_retries=-1,  # a restarted actor serves again by itself
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    placement_group=self._group, placement_group_bundle_index=number
                ),
            ).remote()
            self._actors.append(made)
            self._serving.append(made.serve.remote(self._of_rank(number, host.strip("[]"), int(port))))

    def _bundles(self) -> list[dict[str, float]]:
        config = self._config
        each: dict[str, float] = {"CPU": 1}
        if config.device == "cuda" or (
            config.device == "auto" and self._ray.cluster_resources().get("GPU", 0)
        ):
            each["GPU"] = config.tensor_parallel_size
        here = {f"node:{self.own_address}": _A_LITTLE}
        local = config.data_parallel_size_local or 0
        return [each | (here if number < local else {}) for number in range(config.data_parallel_size)]

    def _wait_for_place(self, bundles: list[dict[str, float]]) -> None:
        placed = self._group.ready()
        deadline = time.monotonic() + self._config.startup_timeout
        while not self._ray.wait([placed], timeout=_LOOK_EVERY)[0]:
            if time.monotonic() > deadline:
                there = {k: v for k, v in self._ray.cluster_resources().items() if k in ("CPU", "GPU")}
                raise StartError(
                    f"Ray can't place {len(bundles)} ranks of {bundles[-1]} within "
                    f"{self._config.startup_timeout:g} s (startup_timeout); all of the cluster: {there}"
                )

    def _of_rank(self, number: int, host: str, port: int) -> str:
        """What the actor of one rank is configured with."""
        values = {name: getattr(self._config, name) for name in self._config.sources}
        values |= {
            "data_parallel_backend": "mp",
            "headless": True,
            "data_parallel_start_rank": number,
            "data_parallel_size_local": 1,
            "data_parallel_address": host,
            "data_parallel_rpc_port": port,
        }
        return EngineConfig(**values).to_toml()

    def check(self) -> None:
        """Ask Ray, without waiting, whether an actor has ended, as none does before the run is over.

        Raises:
            StartError: one has; whose, and what Ray says of it.
        """
        ended, _ = self._ray.wait(self._serving, timeout=0)
        for serving in ended:
            rank = f"rank{self._serving.index(serving)}"
            try:
                self._ray.get(serving)
            except self._ray.exceptions.RayError as error:
                why = getattr(error, "cause", None) or error  # the cause without the actor's traceback
                raise StartError(f"Ray's actor for {rank} failed: {why}") from error
            raise StartError(f"Ray's actor for {rank} ended before the run began")

    def stop(self) -> None:
        """End the actors: those whose ranks were told to leave are about to end by themselves."""
        from ray.util.placement_group import remove_placement_group

        if self._serving:
            self._ray.wait(self._serving, num_returns=len(self._serving), timeout=_POLITE)
        for actor in self._actors:
            self._ray.kill(actor)
        if self._group is not None:
            remove_placement_group(self._group)
        if self._ours:
            self._ray.shutdown()


def _ray() -> Any:
    # Whether a cluster reports its use is for those to say who run it; this process reports nothing.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise StartError(
            "data_parallel_backend is ray, which is not installed: pip install ray"
            " (tensorferry's extra `ray`)"
        ) from error
    return ray


def _connect(ray: Any) -> bool:
    """Join the cluster of this node, or the one of RAY_ADDRESS; whether this process had not before."""
    if ray.is_initialized():
        return False
    handler = signal.getsignal(signal.SIGTERM)
    try:
        # What ranks write stays in Ray's logs, since Ray would print it where our results go.
        ray.init(address=os.environ.get("RAY_ADDRESS", "auto"), log_to_driver=False)
    except ConnectionError as error:
        raise StartError(
            f"no Ray cluster runs here: `ray start --head`, or set RAY_ADDRESS ({error})"
        ) from error
    finally:
        with suppress(ValueError):  # only the main thread may, and only there Ray has put its own in place
            signal.signal(signal.SIGTERM, handler)
    return True
