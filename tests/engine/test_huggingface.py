"""Models from folders: they give what transformers gives, and nothing is looked for outside the folder."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import Engine, EngineConfig, StartError
from engine.catalog import choose_model, choose_processor
from engine.images import open_image, sample_photographs
from engine.model import Batch, ModelError
from engine.protocol import outward
from tests.engine import folders
from tests.engine.pictures import picture

transformers = pytest.importorskip("transformers", reason="needs the extra `huggingface`")

CPU = torch.device("cpu")
PROMPT = "What is this?"


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Qwen2-VL."""
    return folders.qwen2_vl(tmp_path_factory.mktemp("qwen2-vl"))


@pytest.fixture
def copy(qwen: Path, tmp_path: Path) -> Path:
    """The same in a folder that may be spoilt."""
    return Path(shutil.copytree(qwen, tmp_path / "copy"))


@pytest.fixture
def nobody_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails a test in which anything, here or in a process started here, looks into the network."""
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        address = "http://127.0.0.1:{1}".format(*proxy.getsockname())
        for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, address)
        yield
        proxy.setblocking(False)
        with pytest.raises(BlockingIOError):  # nobody is in its queue
            proxy.accept()


def config(model: Path, **settings: Any) -> EngineConfig:
    return EngineConfig(model=str(model), **settings)


def processor(folder: Path) -> Any:
    return transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")


@pytest.mark.usefixtures("nobody_calls")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_generating_model_gives_what_transformers_gives(qwen: Path, device: str) -> None:
    paths = sample_photographs()[1:4]
    settings = config(
        qwen, device=device, generate=PROMPT, max_tokens=6, images_per_prompt=2, megapixels=0.05
    )
    with Engine(settings) as engine:
        results = list(engine.encode(paths))
        figures = engine.statistics()
    assert [result.error for result in results] == [""] * 3
    assert figures.bytes_by_backend["shm"] == figures.image_bytes
    assert figures.copies == 1.0
    model = transformers.Qwen2VLForConditionalGeneration.from_pretrained(qwen).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(qwen)
    for path, result in zip(paths, results, strict=True):
        prepared = choose_processor(settings).prepare(open_image(path))
        out = torch.empty(prepared.shape)
        prepared.write(out)
        assert prepared.more is not None
        assert result.shape == tuple(out.shape)
        with torch.no_grad():
            (features,) = model.get_image_features(out, **prepared.more).pooler_output
            text = f"<|im_start|>user\n{folders.IMAGE}{PROMPT}<|im_end|>\n<|im_start|>assistant\n"
            pads = "<|image_pad|>" * len(features)
            asked = tokenizer(text.replace("<|image_pad|>", pads), return_tensors="pt")
            places = (asked.input_ids == model.config.image_token_id).long()
            written = model.generate(
                **asked, pixel_values=out, **prepared.more, mm_token_type_ids=places, max_new_tokens=6
            )
        assert result.embedding is not None
        words = tokenizer.decode(written[0][asked.input_ids.shape[1] :], skip_special_tokens=True).strip()
        assert result.text != ""
        if device == "cpu":
            torch.testing.assert_close(result.embedding, features.mean(dim=0), rtol=0, atol=1e-5)
            assert result.text == words
        else:  # a convolution in TF32, after which random weights may find another word the most probable
            torch.testing.assert_close(result.embedding, features.mean(dim=0), rtol=0, atol=5e-3)


@pytest.mark.parametrize("size", [(300, 200), (20, 400), (28, 28), (1400, 1399), (57, 43)])
def test_patches_made_in_place_are_those_of_the_own_processor(qwen: Path, size: tuple[int, int]) -> None:
    image = picture(1, *size)
    prepared = choose_processor(config(qwen)).prepare(image)
    assert prepared.in_place
    theirs = processor(qwen)(images=[image], return_tensors="pt")
    assert prepared.more is not None
    assert prepared.more["image_grid_thw"].equal(theirs["image_grid_thw"])
    out = torch.empty(prepared.shape)
    prepared.write(out)
    torch.testing.assert_close(out, theirs["pixel_values"], rtol=0, atol=1e-5)


def test_a_processor_of_another_kind_is_asked_itself(copy: Path) -> None:
    file = copy / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_mean": [0.5, 0.5, 0.5]}))
    image = picture(1, 300, 200)
    prepared = choose_processor(config(copy)).prepare(image)
    assert not prepared.in_place
    for _ in range(2):  # once more, as when a rank dies
        out = torch.empty(prepared.shape)
        prepared.write(out)
        assert out.equal(processor(copy)(images=[image], return_tensors="pt")["pixel_values"])


def test_a_vision_model_gives_its_pooled_features(tmp_path: Path) -> None:
    folder = folders.vit(tmp_path / "vit")
    images = [picture(1, 90, 60), picture(2, 40, 80)]
    model, maker = choose_model(config(folder)), choose_processor(config(folder))
    model.load(device=CPU, seed=0)
    pixels, more = [], []
    for image in images:
        prepared = maker.prepare(image)
        pixels.append(torch.empty(prepared.shape))
        prepared.write(pixels[-1])
        more.append(dict(prepared.more or {}))
    outputs = model.forward(Batch(pixels, torch.empty(0, 3), more))
    theirs = transformers.ViTModel.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = theirs(**processor(folder)(images=images, return_tensors="pt")).pooler_output
    torch.testing.assert_close(outputs.embeddings, expected, rtol=0, atol=1e-5)
    assert outputs.texts == []
    with pytest.raises(ModelError, match="ViTModel writes no text; leave --generate out"):
        choose_model(config(folder, generate=PROMPT)).load(device=CPU, seed=0)


class TestRefused:
    def test_what_is_no_folder_with_a_model(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match=r"nowhere': there is no such folder"):
            choose_model(config(tmp_path / "nowhere"))
        with pytest.raises(StartError, match=r"no config.json, so it holds no model"):
            Engine(config(tmp_path))

    def test_without_the_extra(self, qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "transformers", None)
        with pytest.raises(ModelError, match=r"pip install transformers \(.* extra `huggingface`\)"):
            choose_processor(config(qwen))

    def test_weights_that_are_pickled(self, copy: Path) -> None:
        torch.save({}, copy / "pytorch_model.bin")
        (copy / "model.safetensors").unlink()
        with pytest.raises(ModelError, match=r"its model can't be loaded: .*safetensors") as caught:
            choose_model(config(copy)).load(device=CPU, seed=0)
        assert str(copy) in str(caught.value)
        told = outward(str(caught.value), config(copy), Path())  # to a head on another host
        assert told.startswith(f"{copy.name}: its model can't be loaded: ")
        assert str(copy.parent) not in told

    def test_code_of_the_folder(self, copy: Path) -> None:
        (copy / "theirs.py").write_text("raise SystemExit('it was run')")
        file = copy / "config.json"
        own = {
            "model_type": "theirs",
            "auto_map": {"AutoConfig": "theirs.Config", "AutoModel": "theirs.Model"},
        }
        file.write_text(json.dumps(json.loads(file.read_text()) | own))
        with pytest.raises(
            ModelError, match=r"its configuration can't be loaded: it needs Python code that comes"
        ):
            choose_model(config(copy))

    def test_a_prompt_for_what_writes_nothing(self) -> None:
        with pytest.raises(ModelError, match="--generate needs a model from a folder"):
            choose_model(EngineConfig(generate=PROMPT))

    def test_a_template_that_shows_no_image(self, tmp_path: Path) -> None:
        folder = folders.qwen2_vl(tmp_path / "blind", template="{{ messages[0].content[1].text }}")
        with pytest.raises(ModelError, match="makes no single placeholder of one image"):
            choose_model(config(folder, generate=PROMPT))
