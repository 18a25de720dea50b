"""Real `vllm serve` with a data-parallel rank on another host: the ring for the engine here, sockets for it.

The hosts are network namespaces with a /dev/shm each.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.hops.asking import prompts
from tests.hosts.namespaces import Host, two_hosts
from tests.vllm import runs
from tests.vllm.runs import MARKS, TENSOR, ferry, stock
from tests.vllm.server import becomes, serve_command, serving

pytestmark = [*MARKS, pytest.mark.netns]
COUNT, IMAGES, SIDE = 4, 2, 280
HOP = "front end to engine"
_RPC_PORT = 29550


@contextlib.contextmanager
def headless(
    far: Host, model: Path, log: Path, folder: Path, **options: object
) -> Iterator[subprocess.Popen[bytes]]:
    """Rank 1, as an operator starts it there; `folder` is its TMPDIR."""
    command = serve_command(model, headless=True, data_parallel_start_rank=1, **options)
    with log.open("wb") as output:
        process = runs.start(command, output, far, TMPDIR=str(folder))
    try:
        yield process
    finally:
        runs.end(process)


def handed_on(rank: subprocess.Popen[bytes], folder: Path) -> int:
    """Tensors from the EngineCore there to its worker, whichever way."""
    import psutil

    pids = {process.pid for process in psutil.Process(rank.pid).children(recursive=True)}
    files = [file for file in folder.glob("tensorferry-*/*.json") if int(file.stem.partition("-")[0]) in pids]
    rows = [row for file in files for row in json.loads(file.read_text())["tensors"]]
    return sum(count for hop, _, count, _ in rows if hop == "engine to workers")


@pytest.mark.parametrize("shared", [False, True], ids=["nothing is shared", "/tmp is shared"])
def test_a_rank_on_another_host(model: Path, tmp_path: Path, short_path: Path, shared: bool) -> None:
    """Prompts go to both engines, all answers are stock's, each engine's images take the way that it has.

    Where /tmp is shared, as between containers, the engine there links with the front end, and can't map.
    """
    folder = Path(tempfile.gettempdir()) if shared else short_path
    expected = stock(model, layout=[COUNT, IMAGES], firsts=[0])
    with two_hosts() as (head, far):
        both = {
            "data_parallel_size": 2,
            "data_parallel_size_local": 1,
            "data_parallel_address": head.address,
            "data_parallel_rpc_port": _RPC_PORT,
            "additional_config": ferry(),
        }
        with (
            headless(far, model, tmp_path / "far", folder, **both) as rank,
            serving(model, tmp_path, head, api_server_count=1, **both) as server,
        ):
            assert "tensorferry: engines [0] of [0, 1] map the ring" in server.log()
            assert server.ask_all(prompts(COUNT, IMAGES, SIDE)) == expected
            becomes(lambda: sum(server.answered().values()), COUNT)
            answered = server.answered()
            assert set(answered) == {0, 1}
            near, away = (IMAGES * answered[engine] for engine in (0, 1))
            ways = {
                f"front: {HOP}: ring": [near, near * TENSOR],
                f"front: {HOP}: vLLM (not linked)": [away, away * TENSOR],
            }
            becomes(lambda: server.ways().get(server.process.pid), ways)
            becomes(lambda: handed_on(rank, folder), away)
            assert server.stop() == 0
            rank.send_signal(signal.SIGTERM)
            assert rank.wait(runs.TIMEOUT) == 0
        assert [host.done(["ls", "/dev/shm"]) for host in (head, far)] == ["", ""]
