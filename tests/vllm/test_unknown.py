"""A part of real vLLM has another name than the plugin knows: a warning names it, vLLM answers as stock."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.vllm.runs import HERE, MARKS, TENSOR, environment, ferry, run, segments, stock

pytestmark = MARKS
RING = {"front: front end to engine: ring": [8, 8 * TENSOR]}
NOT_LINKED = {"front: front end to engine: vLLM (not linked)": [8, 8 * TENSOR]}


@pytest.mark.parametrize(
    ("renamed", "said", "ways"),
    [
        pytest.param(
            "vllm.v1.engine.core_client:SyncMPClient._send_input",
            "the front end is not as known here (type object 'SyncMPClient' has no attribute '_send_input')",
            {},
            id="front",
        ),
        pytest.param(
            "vllm.v1.engine.core:EngineCoreProc.process_input_sockets",
            "the EngineCore is not as known here"
            " (type object 'EngineCoreProc' has no attribute 'process_input_sockets')",
            NOT_LINKED,
            id="engine",
        ),
        pytest.param(
            "vllm.v1.serial_utils:OOBTensorConsumer",
            "the front end is not as known here"
            " (module 'vllm.v1.serial_utils' has no attribute 'OOBTensorConsumer')",
            {},
            id="consumer",
        ),
        pytest.param(
            "vllm.v1.metrics.loggers:LoggingStatLogger",
            "the line of counters is not as known here"
            " (module 'vllm.v1.metrics.loggers' has no attribute 'LoggingStatLogger')",
            RING,
            id="log",
        ),
    ],
)
def test_a_part_has_another_name(model: Path, renamed: str, said: str, ways: dict[str, list[int]]) -> None:
    before = segments()
    path = f"PYTHONPATH={HERE / 'renamed'}:{environment()['PYTHONPATH']}"
    result = run(model, "env", f"RENAMED={renamed}", path, additional_config=ferry())
    assert result["said"] == stock(model)
    assert result["ways"] == ways
    assert any("tensorferry: " in line and said in line for line in result["log"].splitlines())
    assert segments() == before
