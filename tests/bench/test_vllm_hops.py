"""What `bench vllm` makes of what was noted, measured and answered; vLLM itself is not needed for that."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import time
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from bench import report, vllm_hops
from bench.__main__ import _chosen
from bench.__main__ import main as command
from bench.harness import ROOT, Outcome, Result, Row, run
from bench.hops import asking, events, hooks, measure
from bench.part import Json, WrongAnswerError
from bench.report import FAILED, LACKING

# ---------------------------------------------------------------------- hops


def sent(name: str, start: float, end: float, images: int = 4) -> events.Event:
    return {"what": "sent", "id": name, "start": start, "end": end, "images": images}


def decoded(name: str, end: float, images: int = 4) -> events.Event:
    return {"what": "decoded", "id": name, "end": end, "images": images}


def put(number: int, start: float, end: float, queue: str = "a") -> events.Event:
    return {"what": "put", "queue": queue, "number": number, "start": start, "end": end, "images": 4}


def taken(number: int, start: float, end: float, queue: str = "a", images: int = 4) -> events.Event:
    return {"what": "taken", "queue": queue, "number": number, "start": start, "end": end, "images": images}


def test_first_hop_is_from_entering_send_until_decoded() -> None:
    noted = [sent("b", 2.0, 2.25), sent("a", 1.0, 1.5), sent("later", 9.0, 9.1)]
    noted += [decoded("a", 1.75), decoded("b", 4.0), decoded("later", 9.2)]
    hop = events.first_hop(noted, 0.5, 5.0)
    assert hop == events.FirstHop(
        made=500.0, total=2750.0, span=3000.0, blocked=750.0, rest=1000.0, requests=2, images=8
    )


@pytest.mark.parametrize("came", [[], [decoded("b", 2.0)], [decoded("a", 2.0, images=3)]])
def test_request_that_did_not_come_whole_is_no_figure(came: list[events.Event]) -> None:
    with pytest.raises(WrongAnswerError, match="request a was sent"):
        events.first_hop([sent("a", 1.0, 1.5), *came], 0.0, 5.0)


def test_first_hop_without_requests_is_no_figure() -> None:
    with pytest.raises(WrongAnswerError, match="no request"):
        events.first_hop([sent("a", 1.0, 1.5), decoded("a", 2.0)], 6.0, 7.0)


def test_second_hop_ends_with_the_last_worker() -> None:
    noted = [put(3, 1.0, 1.25), taken(3, 0.0, 1.5), taken(3, 0.0, 2.0)]
    assert events.second_hop(noted, 0.0, 5.0, readers=2) == events.SecondHop(total=1000.0, images=4)


def test_second_hop_leaves_out_that_a_worker_was_busy() -> None:
    noted = [put(3, 1.0, 1.25), taken(3, 3.25, 3.5)]
    assert events.second_hop(noted, 0.0, 5.0, readers=1).total == 500.0
    # Asking while the message is still being written is no work of the worker's.
    noted = [put(3, 1.0, 2.0), taken(3, 1.5, 2.25)]
    assert events.second_hop(noted, 0.0, 5.0, readers=1).total == 1250.0


def test_messages_of_two_queues_are_told_apart() -> None:
    noted = [put(3, 1.0, 1.0, "a"), put(3, 1.0, 1.0, "b"), taken(3, 0.0, 1.5, "a"), taken(3, 0.0, 3.0, "b")]
    assert events.second_hop(noted, 0.0, 5.0, readers=1).total == 2500.0


@pytest.mark.parametrize(
    "came", [[], [taken(3, 0.0, 1.5)], [taken(3, 0.0, 1.5), taken(3, 0.0, 1.5, images=1)]]
)
def test_message_that_did_not_come_to_all_workers_is_no_figure(came: list[events.Event]) -> None:
    with pytest.raises(WrongAnswerError, match="message 3 to 2 workers"):
        events.second_hop([put(3, 1.0, 1.0), *came], 0.0, 5.0, readers=2)


# ---------------------------------------------------------------------- the plugin


Hook = tuple[str, Callable[..., Any]]


class Client:
    """The shape of vLLM's."""

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def _send_input(self, kind: str, request: Any) -> str:
        self.sent.append(request)
        return kind


def copies(original: Any, *arguments: Any) -> Any:
    """A plugin that does its work around `_send_input`."""
    time.sleep(0.05)
    return original(*arguments)


def message(images: int) -> Any:
    """A message of the executor with one prompt, of which one image more is known already."""
    features = [types.SimpleNamespace(data=b"") for _ in range(images)] + [types.SimpleNamespace(data=None)]
    scheduled = types.SimpleNamespace(scheduled_new_reqs=[types.SimpleNamespace(mm_features=features)])
    return ("execute_model", (scheduled,), {}, 0)


@pytest.fixture
def noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to which the plugin writes."""
    descriptor = os.open(tmp_path / "1.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    monkeypatch.setattr(hooks, "_file", descriptor)
    return tmp_path


@pytest.mark.parametrize("ours_first", [True, False])
def test_another_plugin_s_work_is_timed_whoever_hooks_first(noted: Path, ours_first: bool) -> None:
    kind = type("Client", (Client,), {"_send_input": Client._send_input, "__init__": Client.__init__})
    mine: Hook = ("__init__", hooks._client_made)
    other: Hook = ("_send_input", copies)
    for name, around in [mine, other] if ours_first else [other, mine]:
        hooks._wrap(kind, name, around)
    client = kind()
    request = types.SimpleNamespace(request_id="r-1", mm_features=[types.SimpleNamespace(data=b"")])
    assert client._send_input("ADD", request) == "ADD"
    assert client.sent == [request]
    (event,) = events.read(noted)
    os.close(hooks._file or 0)
    assert (event["id"], event["images"]) == ("r-1", 1)
    assert event["end"] - event["start"] >= 0.05


def test_messages_of_a_queue_are_numbered_alike_at_both_ends(noted: Path) -> None:
    handle = types.SimpleNamespace(local_subscribe_addr="ipc://a")
    writer, reader = (types.SimpleNamespace(handle=handle) for _ in range(2))
    through = [("check_health", (), {}, None), message(3), ("SUCCESS", None), message(0), message(2)]
    for each in through:
        hooks._enqueue(lambda *_: None, writer, each)
    for each in through:
        assert hooks._dequeue(lambda _, each=each: each, reader) is each
    found = events.read(noted)
    os.close(hooks._file or 0)
    assert [(e["what"], e["number"], e["images"]) for e in found] == [
        ("put", 1, 3),
        ("put", 4, 2),
        ("taken", 1, 3),
        ("taken", 4, 2),
    ]
    assert events.second_hop(found, 0.0, time.monotonic(), readers=1).images == 5


def test_plugin_is_found_by_its_entry_point_and_does_nothing_unasked() -> None:
    code = (
        "import sys; from importlib import metadata;"
        "(point,) = metadata.entry_points(group='vllm.general_plugins', name='tensorferry_hops');"
        "point.load()(); print([name for name in sys.modules if name.split('.')[0] == 'vllm'])"
    )
    path = os.pathsep.join([str(ROOT), str(measure._PLUGIN)])
    environ = {**os.environ, "PYTHONPATH": path}
    environ.pop(hooks.FOLDER, None)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


# ---------------------------------------------------------------------- rows and figures


def test_rows_without_vllm_are_not_here() -> None:
    if importlib.util.find_spec("vllm") is not None:
        pytest.skip("vLLM is here")
    rows = vllm_hops.BENCHMARK.rows(True)
    assert [row.name for row in rows] == list(vllm_hops.COLUMNS)
    results = run(rows, rounds=1)
    assert report.failures(results) == []
    assert all("vllm is not installed" in line for line in report.lacking(results))
    grids = vllm_hops.BENCHMARK.show(results)
    assert {cell for grid in grids for cells in grid.rows for cell in cells[1:]} == {LACKING}
    assert not any(grid.notes for grid in grids)


def test_layouts_of_a_row_that_has_several_can_be_chosen() -> None:
    rows = vllm_hops.BENCHMARK.rows(False)
    chosen = _chosen(_chosen(rows, "column", "tensorferry + mp"), "layout", "1x32, 8x4")
    assert [row.arguments["layouts"] for row in chosen] == [["8x4", "1x32"]]
    assert _chosen(rows, "layout", None) == rows


Said = list[Any]


def said(prompt: int, logit: float = 0.5) -> Said:
    """An answer; each prompt has its own."""
    return [[prompt, 7], [[[prompt, logit], [7, 0.25]], [[7, 0.125], [9, 0.5]]]]


def good(
    column: str, *, hop: float, peak: float = 1e9, answers: Sequence[Said] | None = None, **more: Json
) -> Result:
    """One round of a row: two prompts, the same figures in both layouts; `answers`: to the second."""
    values: dict[str, Json] = {
        layout: {
            "hop 1": [2 * hop, hop],
            "span": [hop],
            "blocked": [hop],
            "hop 2": [hop],
            "seconds": [hop / 1e3],
            **more,
            "peak": [peak / 2, peak],
            "said": [answers if answers and place else [said(20 + place), said(30 + place)]],
        }
        for place, layout in enumerate(("8x4", "1x32"))
    }
    (row,) = _chosen(
        [row for row in vllm_hops.BENCHMARK.rows(False) if row.name == column], "layout", "8x4,1x32"
    )
    outcome = Outcome(round=0, position=0, seconds=1.0, values={"layouts": values}, failure=None)
    return Result(row=dataclasses.replace(row, lacking=None), outcomes=[outcome])


def notes(*results: Result) -> list[str]:
    return [note for grid in vllm_hops.BENCHMARK.show(results) for note in grid.notes]


def test_figures_are_of_all_repeats_and_rounds() -> None:
    one, two = good("direct_rpc", hop=10.0), good("direct_rpc", hop=30.0)
    both = Result(row=one.row, outcomes=[*one.outcomes, *two.outcomes])
    grid = vllm_hops.BENCHMARK.show([both])[0]
    assert grid.columns == ["", "8x4", "1x32"]
    assert grid.rows == [["direct_rpc", "25.0 [10.0..60.0]", "25.0 [10.0..60.0]"]]
    memory = vllm_hops.BENCHMARK.show([both])[-1]
    assert memory.rows == [["direct_rpc", "1,000 [1,000..1,000]", "1,000 [1,000..1,000]"]]


def test_parts_of_the_whole_are_shown_where_they_were_measured() -> None:
    before, now = good("direct_rpc", hop=10.0), good("tensorferry", hop=20.0, made=[3.0], rest=[4.0])
    rows = {
        grid.title: [cells[:2] for cells in grid.rows] for grid in vllm_hops.BENCHMARK.show([before, now])
    }
    assert rows["vllm: whole, ms"] == [
        ["direct_rpc", "10.0 [10.0..10.0]"],
        ["tensorferry", "20.0 [20.0..20.0]"],
    ]
    assert rows["vllm: whole: until the first request is sent, ms"] == [["tensorferry", "3.00 [3.00..3.00]"]]
    assert rows["vllm: whole: after the last one is decoded, ms"] == [["tensorferry", "4.00 [4.00..4.00]"]]


@pytest.mark.parametrize(("hop", "verdict"), [(10.0, "0.33: met"), (10.5, "0.35: MISSED")])
def test_first_hop_is_judged_by_the_better_of_vllm_s_own(hop: float, verdict: str) -> None:
    results = [good("direct_rpc", hop=90.0), good("torch_shm", hop=30.0), good("tensorferry", hop=hop)]
    assert f"better of direct_rpc and torch_shm. Of torch_shm {verdict}." in notes(*results)[0]


@pytest.mark.parametrize(("hop", "verdict"), [(10.0, "met"), (10.5, "MISSED")])
def test_second_hop_is_judged_by_the_same_executor_s(hop: float, verdict: str) -> None:
    results = [good("direct_rpc + mp", hop=100.0), good("tensorferry + mp", hop=hop)]
    assert [f"{verdict}." in note for note in notes(*results) if "at most 0.10" in note] == [True]
    alone = [good("direct_rpc + tp2", hop=100.0), good("tensorferry + mp", hop=hop)]
    assert not any("at most 0.10" in note for note in notes(*alone))


@pytest.mark.parametrize(("peak", "verdict"), [(1e9, "1.000: met"), (1.001e9, "1.001: MISSED")])
def test_memory_may_not_be_above_stock(peak: float, verdict: str) -> None:
    results = [good("direct_rpc", hop=1.0), good("tensorferry", hop=1.0, peak=peak)]
    assert any("not above direct_rpc" in note and verdict in note for note in notes(*results))


def test_failed_rows_are_judged_by_nothing() -> None:
    (stock, ours) = good("direct_rpc", hop=1.0), good("tensorferry", hop=1.0)
    bad = dataclasses.replace(stock.outcomes[0], values={}, failure="vllm: not done after 300 s")
    failed = Result(row=stock.row, outcomes=[bad])
    assert notes(failed, ours) == []
    assert vllm_hops.BENCHMARK.show([failed, ours])[0].rows[0] == ["direct_rpc", FAILED, FAILED]


# ---------------------------------------------------------------------- what was generated


def test_same_outputs_are_said_to_be_the_same() -> None:
    results = [good("direct_rpc", hop=1.0), good("tensorferry", hop=1.0)]
    assert "outputs of tensorferry are those of direct_rpc: 4 prompts, to the bit." in notes(*results)
    assert vllm_hops.BENCHMARK.wrong(results) == []


@pytest.mark.parametrize(
    ("second", "how"), [(said(2, 0.53125), "logits by up to 0.03125"), (said(3), "other tokens")]
)
def test_other_outputs_are_an_error(second: Said, how: str) -> None:
    stock = good("direct_rpc", hop=1.0, answers=[said(1), said(2)])
    ours = good("tensorferry", hop=1.0, answers=[said(1), second])
    line = f"OUTPUTS DIFFER: tensorferry from direct_rpc: {how}"
    assert line in vllm_hops.BENCHMARK.wrong([stock, ours])
    assert line in notes(stock, ours)
    assert not any("to the bit" in note for note in notes(stock, ours))


def test_outputs_of_every_round_are_compared() -> None:
    stock, ours = good("direct_rpc", hop=1.0), good("tensorferry", hop=1.0)
    other = good("tensorferry", hop=1.0, answers=[said(8), said(9)])
    both = Result(row=ours.row, outcomes=[*ours.outcomes, *other.outcomes])
    assert any("OUTPUTS DIFFER" in line for line in vllm_hops.BENCHMARK.wrong([stock, both]))


def test_outputs_in_which_no_image_shows_are_an_error() -> None:
    alike = [good(name, hop=1.0, answers=[said(1), said(1)]) for name in ("direct_rpc", "tensorferry")]
    assert vllm_hops.BENCHMARK.wrong(alike) == [
        f"OUTPUTS ARE ALIKE: {name} says the same to different images"
        for name in ("direct_rpc", "tensorferry")
    ]


def test_logits_that_are_no_numbers_are_no_agreement() -> None:
    nan = float("nan")
    assert asking.difference(said(1), said(1, nan)) != 0
    stock = good("direct_rpc", hop=1.0, answers=[said(1, nan), said(1, nan)])
    ours = good("tensorferry", hop=1.0, answers=[said(1, nan), said(1, nan)])
    assert any("ALIKE" in line for line in vllm_hops.BENCHMARK.wrong([stock, ours]))


def test_wrong_outputs_end_with_status_1(tmp_path: Path) -> None:
    stock = good("direct_rpc", hop=1.0, answers=[said(1), said(2)])
    outputs = {"same": [said(1), said(2)], "other": [said(1), said(3)]}
    for name, expected in (("same", 0), ("other", 1)):
        ours = good("tensorferry", hop=1.0, answers=outputs[name])
        file = tmp_path / f"{name}.json"
        report.write_json(
            file, "vllm", {"date": "", "load": "", "command": ""}, vllm_hops.BENCHMARK, [stock, ours]
        )
        arguments = ["vllm", "--layouts", "8x4,1x32", "--rounds", "0", "--add", str(file)]
        shown = CliRunner().invoke(command, arguments)
        assert ("OUTPUTS DIFFER" in shown.stdout) == (name == "other")
        assert shown.exit_code == expected, shown.output
        assert bool(json.loads(file.read_text())["wrong"]) == (name == "other")


# ---------------------------------------------------------------------- which way


def row(column: str) -> Row:
    (found,) = [row for row in vllm_hops.BENCHMARK.rows(False) if row.name == column]
    return found


def counted(first: int, second: int = 0, *, copied: int = 0) -> Mapping[str, Json]:
    """The values of a row whose 34 images took the ring so often on each hop."""
    went: dict[str, Json] = {
        "front: front end to engine: ring": [first, 1000],
        "front: front end to engine: copied out": [copied, 1000],
        "front: front end to engine: vLLM (Full)": [34 - first - copied, 1000],
        "engine: engine to workers: handle": [second, 1000],
        "worker: taken by a worker: ring": [34, 1000],
    }
    return {"images": 34, "ways": went}


def test_row_whose_images_did_not_take_the_ring_is_refused() -> None:
    one, two, stock = row("tensorferry").accept, row("tensorferry + mp").accept, row("direct_rpc").accept
    assert stock is None
    assert one is not None
    assert two is not None
    one(counted(34))
    one(counted(30, copied=4))
    one(counted(32))  # the first ones, before the ring is mapped
    two(counted(34, 32))
    for accept, values, what in [(one, counted(31), "31 of 34"), (two, counted(34, 31), "workers: 31 of 34")]:
        with pytest.raises(ValueError, match=what):
            accept(values)
