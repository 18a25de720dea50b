"""Requests through vLLM's own encoder and decoder, with our two ends behind them; no engine is started."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import vllm_plugin
from engine.vllm.roles import Core, Front
from tests.engine.test_vllm_roles import ENGINE, linked
from tests.vllm.runs import HERE, MARKS

pytestmark = [*MARKS, pytest.mark.filterwarnings("default")]  # what importing vLLM warns of is not ours


@pytest.fixture(autouse=True)
def _platform(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it nothing of vLLM can be imported where there is no GPU."""
    monkeypatch.syspath_prepend(HERE / "platform")
    importlib.import_module("tensorferry_dry_platform").register()
    # Here, since what fails on the way is kept somewhere, with the frames of who imported.
    for module in ("vllm.multimodal.inputs", "vllm.v1.serial_utils"):
        importlib.import_module(module)


@pytest.fixture
def pair(short_path: Path) -> Iterator[tuple[Front, Core]]:
    with linked(f"ipc://{short_path}/vllm", copy_above=0.5) as both:
        yield both


def request(items: Sequence[Any]) -> Any:
    """A request of vLLM's with these items."""
    from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
    from vllm.v1.engine import EngineCoreRequest

    place = PlaceholderRange(offset=0, length=1)
    features = [MultiModalFeatureSpec(item, "audio", str(n), place) for n, item in enumerate(items)]
    return EngineCoreRequest("r-1", [1], features, None, None, 0.0, None, None, None)


def sent(front: Front, core: Core, given: Any) -> Any:
    """The request as the engine gets it."""
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

    encoder = MsgpackEncoder(oob_tensor_consumer=vllm_plugin._consumer(front))
    with front.sending_to(ENGINE, list(vllm_plugin._tensors_of(given))):
        frames = encoder.encode(given)
    assert sum(memoryview(frame).nbytes for frame in frames) < 10_000, "the tensors go beside vLLM's message"
    return MsgpackDecoder(EngineCoreRequest, oob_tensor_provider=vllm_plugin._Provider(core)).decode(frames)


def test_sounds_that_are_columns_of_one_tensor(pair: tuple[Front, Core]) -> None:
    """As Qwen2.5-Omni's: strided views before others that are not."""
    from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems

    lengths = torch.tensor([400, 300, 500])
    inputs = {
        "input_audio_features": torch.randn(128, 1200),
        "feature_attention_mask": torch.randn(3, 30_000),
    }
    fields = {
        "input_audio_features": MultiModalFieldConfig.flat_from_sizes("audio", lengths, dim=1),
        "feature_attention_mask": MultiModalFieldConfig.batched("audio"),
    }
    items = MultiModalKwargsItems.from_hf_inputs(inputs, fields)["audio"]
    assert not items[0]["input_audio_features"].data.is_contiguous()
    got = sent(*pair, request(items))
    assert [feature.data for feature in got.mm_features] == list(items)
    assert pair[0].counts.rows()[0][1:3] == ("ring", 6)
