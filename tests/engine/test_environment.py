"""Rank, size and head from the environment, as torchrun and SLURM say them; real processes under each."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import transport
from engine import ConfigError, EngineConfig
from engine.environment import first_node, placed
from tests.engine.pictures import expected, picture, save
from tests.engine.processes import ROOT, held_ports, python

TORCHRUN = {
    "RANK": "2",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29400",
}
SLURM = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_NODELIST": "gpu[07-09,12]"}


def place(environ: dict[str, str], **options: object) -> tuple[int, int, int, bool, str | None, int]:
    config = placed(EngineConfig.load(options, environ={}), environ)
    assert list(config.local_ranks) == [config.data_parallel_start_rank]
    return (
        config.data_parallel_start_rank,
        config.data_parallel_size,
        config.data_parallel_rank_local,
        config.headless,
        config.data_parallel_address,
        config.data_parallel_rpc_port,
    )


class TestPlaced:
    def test_as_torchrun_says(self) -> None:
        assert place(TORCHRUN) == (2, 4, 1, True, "10.0.0.1", 29401)

    def test_the_first_is_the_head(self) -> None:
        assert place(TORCHRUN | {"RANK": "0", "LOCAL_RANK": "0"}) == (0, 4, 0, False, "10.0.0.1", 29401)

    def test_as_slurm_says(self) -> None:
        assert place(SLURM) == (3, 8, 1, True, "gpu07", 29550)

    def test_torchrun_within_slurm_goes_first(self) -> None:
        assert place(SLURM | TORCHRUN) == (2, 4, 1, True, "10.0.0.1", 29401)

    def test_where_srun_was_called_is_the_last_resort(self) -> None:
        environ = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.9"}
        assert place(environ)[4] == "10.0.0.9"

    def test_what_was_given_goes_first(self) -> None:
        given = {"data_parallel_address": "10.9.9.9", "data_parallel_rpc_port": 7, "data_parallel_size": 4}
        assert place(TORCHRUN, **given)[4:] == ("10.9.9.9", 7)

    def test_says_where_a_value_came_from(self) -> None:
        assert "data_parallel_size = 4  # environment\n" in placed(EngineConfig(), TORCHRUN).to_toml()

    @pytest.mark.parametrize(
        ("environ", "options", "message"),
        [
            ({}, {}, "neither RANK nor SLURM_PROCID is set"),
            ({"RANK": "1"}, {}, "environment variable WORLD_SIZE = ''"),
            (TORCHRUN | {"RANK": "one"}, {}, "environment variable RANK = 'one': must be a whole number"),
            (TORCHRUN | {"RANK": "4"}, {}, "RANK is 4 and WORLD_SIZE 4"),
            ({"RANK": "0", "WORLD_SIZE": "2"}, {}, "Set MASTER_ADDR, or give --data-parallel-address"),
            (TORCHRUN, {"data_parallel_size": 3}, "data_parallel_size = 3 .* the environment says 4 ranks"),
        ],
    )
    def test_what_is_missing_or_wrong_is_named(
        self, environ: dict[str, str], options: dict[str, object], message: str
    ) -> None:
        with pytest.raises(ConfigError, match=message):
            placed(EngineConfig.load(options, environ={}), environ)

    @pytest.mark.parametrize(
        ("nodes", "first"),
        [
            ("gpu07", "gpu07"),
            ("gpu07,gpu08", "gpu07"),
            ("gpu[07-09,12]", "gpu07"),
            ("gpu[12,07-09],login1", "gpu12"),
            ("rack1-[3]-a,b", "rack1-3-a"),
            ("n-1.cluster,n-2", "n-1.cluster"),
        ],
    )
    def test_the_first_node_of_a_list(self, nodes: str, first: str) -> None:
        assert first_node(nodes) == first


RUN = ["-m", "engine", "run", "--data-parallel-backend", "env", "--model", "tests.engine.models:Checksum"]


def check(document: Path, ranks: int) -> None:
    written = json.loads(document.read_text())
    assert written["error"] == ""
    assert len(written["results"]) == 12
    for result in written["results"]:
        assert result["embedding"] == expected(picture(int(Path(result["file"]).stem))).tolist()
    assert [rank["name"] for rank in written["ranks"]] == [f"rank{number}" for number in range(ranks)]
    assert all(rank["requests"] > 0 for rank in written["ranks"])


def test_torchrun_places_the_ranks(tmp_path: Path) -> None:
    """With keys: one pair and one command line for the head and who connects to it."""
    save(tmp_path, 12)
    (tmp_path / "keys").mkdir()
    secret = transport.make_keys(tmp_path, "head", public=tmp_path / "keys")
    keys = ["--curve-key", str(secret), "--curve-clients", str(tmp_path / "keys")]
    keys += ["--curve-server", str(tmp_path / "keys/head.key")]
    document = tmp_path / "out.json"
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    wanted = [str(tmp_path), "--images-per-prompt", "1", "--json", str(document)]
    with (
        held_ports(2) as port,  # torchrun's, and the one after it, where the head listens
        python(*torchrun, "--master-port", str(port), *RUN, *keys, *wanted) as process,
    ):
        _, said = process.communicate()
    assert process.returncode == 0, said
    assert "rank 1: the head ended its run" in said
    check(document, ranks=2)


@pytest.mark.stress
def test_slurm_places_the_ranks(tmp_path: Path) -> None:
    save(tmp_path, 12)
    document = tmp_path / "out.json"

    def task(number: int, port: int) -> list[str]:
        step = {"SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "localhost", "MASTER_PORT": str(port)}
        here = {**step, "SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)}
        wanted = [str(tmp_path), "--images-per-prompt", "1", "--json", str(document)]
        return ["env", *(f"{name}={value}" for name, value in here.items()), sys.executable, *RUN, *wanted]

    with (
        held_ports(2) as port,  # the head listens at the second
        subprocess.Popen(task(1, port), cwd=ROOT, stderr=subprocess.PIPE, text=True) as second,
        subprocess.Popen(task(0, port), cwd=ROOT, stdout=subprocess.DEVNULL) as first,
    ):
        try:
            assert first.wait() == 0
            _, said = second.communicate()
        finally:
            first.kill()
            second.kill()
    assert second.returncode == 0
    assert "rank 1: the head ended its run" in said
    check(document, ranks=2)


def test_without_an_environment_it_says_so() -> None:
    with python(*RUN) as process:
        _, said = process.communicate()
    assert process.returncode == 2
    assert "start every rank with torchrun or srun, or set RANK" in said
