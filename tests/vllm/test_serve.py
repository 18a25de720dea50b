"""Real `vllm serve`: chats with images over HTTP, API servers with a ring each, and what people see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.hops.asking import prompts
from tests.vllm.runs import MARKS, TENSOR, ferry, segments, stock
from tests.vllm.server import Server, becomes, serving, tensorferry

pytestmark = MARKS
HOP_1, HOP_2 = "front end to engine", "engine to workers"
COUNT, IMAGES, SIDE = 4, 2, 280
LAYOUT = [COUNT, IMAGES]
SENT = COUNT * IMAGES


def test_several_api_servers(model: Path, tmp_path: Path) -> None:
    """Two with a ring each, before two engines; what one `/metrics` shows is the sum of both."""
    before = segments()
    expected = stock(model, layout=LAYOUT, firsts=[0])
    options: dict[str, Any] = {"api_server_count": 2, "data_parallel_size": 2, "additional_config": ferry()}
    with serving(model, tmp_path, **options) as server:
        rounds = 0
        while rounds < 20 and len(_used(server)) < 2:  # the kernel chooses who takes a connection
            assert server.ask_all(prompts(COUNT, IMAGES, SIDE)) == expected
            rounds += 1
            becomes(lambda: _sent(server), rounds * SENT)
        fronts = _used(server)
        assert len(fronts) == 2, f"after {rounds} rounds"
        becomes(lambda: _counted(server, HOP_1), {"ring": rounds * SENT})
        assert _counted(server, HOP_1, "tensor_bytes") == {"ring": rounds * SENT * TENSOR}

        rings = [ring for ring in tensorferry("ps") if ring["name"] in segments() - before]
        # An EngineCore makes one, too, where a tensor comes before its worker maps the front end's ring.
        assert fronts <= {ring["pid"] for ring in rings} <= server.ways().keys()
        _seen_by_doctor(fronts, engines=2)
        assert server.stop() == 0
    assert segments() - before == set()


def test_one_api_server(model: Path, tmp_path: Path) -> None:
    """With two workers: both hops at `/metrics` and in vLLM's log, and the numbers rise."""
    before = segments()
    expected = stock(model, layout=LAYOUT, firsts=[0], tensor_parallel_size=2)
    with serving(model, tmp_path, tensor_parallel_size=2, additional_config=ferry()) as server:
        for rounds in (1, 2):
            assert server.ask_all(prompts(COUNT, IMAGES, SIDE)) == expected
            becomes(lambda: _counted(server, HOP_1), {"ring": rounds * SENT})
            becomes(lambda: sum(_counted(server, HOP_2).values()), rounds * SENT)
        assert _counted(server, HOP_2)["handle"] >= SENT
        line = f"{HOP_1}: ring {2 * SENT} ({2 * SENT * TENSOR / 1e6:.1f} MB)"
        becomes(
            lambda: any("tensorferry:" in said and line in said for said in server.log().splitlines()), True
        )
        _seen_by_doctor(_used(server), engines=1)
        assert server.stop() == 0
    assert segments() - before == set()


def _used(server: Server) -> set[int]:
    """The front ends that sent tensors through their rings."""
    return {pid for pid, ways in server.ways().items() if f"front: {HOP_1}: ring" in ways}


def _sent(server: Server) -> int:
    return sum(ways.get(f"front: {HOP_1}: ring", [0])[0] for ways in server.ways().values())


def _counted(server: Server, hop: str, what: str = "tensors") -> dict[str, float]:
    """At `/metrics`, by way."""
    return {
        way: value
        for (name, of, way), value in server.metrics().items()
        if name == f"tensorferry_{what}_total" and of == hop
    }


def _seen_by_doctor(fronts: set[int], engines: int) -> None:
    findings = {line["what"]: line for line in tensorferry("doctor", "--vllm")["findings"]}
    looks = ("vLLM", "plugin", "hop 1, front end", "hop 1, EngineCore", "hop 2, workers")
    assert [findings[look]["status"] for look in looks] == ["ok"] * len(looks)
    for pid in fronts:
        said = findings[f"front {pid}"]["found"]
        assert all(
            f"engine{index} (shm: the peer proved that it maps the ring)" in said for index in range(engines)
        )
        assert f"{HOP_1}: ring" in said
