"""Models in folders as Hugging Face libraries write them: image processor in front, vision tower behind.

`--model DIR`. Nothing is downloaded and no code of the folder is run; weights are read from safetensors only.
Needs the extra `huggingface`; transformers takes seconds to import, so only who uses it imports this.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from PIL import Image

from engine.images import MEAN, MERGE, PATCH, STD, TEMPORAL, Grid
from engine.loading import Patches, Prepared
from engine.model import Batch, ModelError, Outputs

# `pil`: what the checkpoints were trained with; torchvision, the alternative, rounds differently.
_IMAGES: Final = {"backend": "pil", "local_files_only": True, "trust_remote_code": False}
_LOCAL: Final = {"local_files_only": True, "trust_remote_code": False}
_PIXELS, _GRID = "pixel_values", "image_grid_thw"


class FolderProcessor:
    """The image processor of a folder; it works in the front end.

    megapixels: as `EngineConfig.megapixels`, before the processor sees the photograph.

    Raises:
        ModelError: the folder has none.
    """

    def __init__(self, folder: Path, *, megapixels: float | None) -> None:
        self._megapixels = megapixels
        self._process = _from(folder, "image processor", transformers.AutoImageProcessor, **_IMAGES)
        self._patches = _same_as_ours(self._process, megapixels)

    def prepare(self, image: Image.Image) -> Prepared:
        """Process a photograph in RGB.

        Raises:
            Exception: whatever the processor raises for an image that it can't take.
        """
        if self._patches is not None:
            prepared = self._patches.prepare(image)
            return replace(prepared, more={_GRID: torch.tensor([prepared.grid])})
        if self._megapixels is not None:
            scale = math.sqrt(self._megapixels * 1e6 / (image.width * image.height))
            image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
        made = self._made(image)
        pixels = made.pop(_PIXELS)
        grid = Grid(*made[_GRID][0].tolist()) if _GRID in made else None
        write = _Pixels(pixels, lambda: self._made(image)[_PIXELS])
        return Prepared(tuple(pixels.shape), write, grid, made, in_place=False)

    def _made(self, image: Image.Image) -> dict[str, torch.Tensor]:
        made = dict(self._process(images=[image], return_tensors="pt"))
        others = [name for name, value in made.items() if not isinstance(value, torch.Tensor)]
        if others or _PIXELS not in made:
            raise ModelError(
                f"{type(self._process).__name__} gives {', '.join(others) or 'no pixel_values'}; "
                "pixel_values and other tensors are understood"
            )
        return made


def _same_as_ours(process: Any, megapixels: float | None) -> Patches | None:
    """The maker of patches that does the same without memory of its own: that of Qwen2-VL and Qwen2.5-VL."""
    ours = {
        "patch_size": PATCH,
        "merge_size": MERGE,
        "temporal_patch_size": TEMPORAL,
        "image_mean": MEAN.tolist(),
        "image_std": STD.tolist(),
        "rescale_factor": 1 / 255,
        "resample": Image.Resampling.BICUBIC,
    } | dict.fromkeys(("do_resize", "do_rescale", "do_normalize"), True)
    theirs = {name: getattr(process, name, None) for name in ours}
    theirs |= {name: list(theirs[name] or ()) for name in ("image_mean", "image_std")}
    if not type(process).__name__.startswith("Qwen2VLImageProcessor") or theirs != ours:
        return None
    limits = process.size
    return Patches(
        megapixels=megapixels, min_pixels=limits["shortest_edge"], max_pixels=limits["longest_edge"]
    )


class _Pixels:
    """Writes what was processed, once from memory and later, when a rank died, from processing it again."""

    def __init__(self, pixels: torch.Tensor, again: Callable[[], torch.Tensor]) -> None:
        self._pixels: torch.Tensor | None = pixels
        self._again = again

    def __call__(self, out: torch.Tensor) -> None:
        pixels, self._pixels = self._pixels, None
        out.copy_(self._again() if pixels is None else pixels)


class FolderModel:
    """The vision tower of a model in a folder, and its language model where `generate` has a prompt.

    The embedding of an image is the mean over the tokens that the tower hands to the language model; for a
    model with pooled features of images (CLIP, SigLIP, ViT) it is those. Images go through one by one.

    Raises:
        ModelError: the folder holds no model that can do this.
    """

    def __init__(self, folder: Path, *, generate: str | None, max_tokens: int) -> None:
        self._folder = folder
        self._prompt = generate
        self._max_tokens = max_tokens
        self._config = _from(folder, "configuration", transformers.AutoConfig, **_LOCAL)
        self._kind = _named(self._config)
        self._model: Any = None
        if generate is not None and not getattr(self._kind, "can_generate", bool)():
            raise ModelError(f"{folder}: {self._kind.__name__} writes no text; leave --generate out")
        self._tokens = [] if generate is None else self._tokenized(generate)

    def load(self, *, device: torch.device, seed: int) -> None:  # noqa: ARG002  # nothing here is random
        """Read the weights, in the type of number in which they are stored."""
        transformers.utils.logging.disable_progress_bar()
        model = _from(self._folder, "model", self._kind, dtype="auto", use_safetensors=True, **_LOCAL)
        self._model = model.to(device).eval().requires_grad_(False)

    def forward(self, batch: Batch) -> Outputs:
        """Encode each image, and write about it where there is a prompt."""
        outputs = [
            self._one(pixels, more) for pixels, more in zip(batch.pixel_values, batch.more, strict=True)
        ]
        texts = [text for _, text in outputs if text is not None]
        return Outputs(torch.stack([embedding for embedding, _ in outputs]).float(), texts)

    @torch.no_grad()
    def _one(self, pixels: torch.Tensor, more: dict[str, torch.Tensor]) -> tuple[torch.Tensor, str | None]:
        # Integers, such as grids, stay what they are.
        inputs = {name: value.to(self._model.device) for name, value in more.items()}
        inputs[_PIXELS] = pixels.to(self._model.device, self._model.dtype)
        features = self._features(inputs)
        text = None if self._prompt is None else self._written(inputs, tokens=len(features))
        return features.mean(dim=0), text

    def _features(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """[tokens, dim] of one image; one token where the model pools them itself."""
        if hasattr(self._model, "get_image_features"):
            found = self._model.get_image_features(**inputs)
        else:
            found = self._model.base_model(**inputs)
        features = getattr(found, "pooler_output", None)
        if features is None:
            features = found.last_hidden_state
        if isinstance(features, tuple | list):  # one for each image
            (features,) = features
        tokens: torch.Tensor = features.reshape(-1, features.shape[-1])
        return tokens

    # ------------------------------------------------------------------ text

    def _written(self, inputs: dict[str, torch.Tensor], *, tokens: int) -> str:
        """What the model says, always the most probable token, about an image of that many tokens."""
        place = self._tokens.index(self._image_token)
        ids = [*self._tokens[:place], *[self._image_token] * tokens, *self._tokens[place + 1 :]]
        asked = torch.tensor([ids], device=self._model.device)
        more: dict[str, torch.Tensor] = {"attention_mask": torch.ones_like(asked)}
        if "mm_token_type_ids" in inspect.signature(self._model.forward).parameters:
            more["mm_token_type_ids"] = (asked == self._image_token).long()
        written = self._model.generate(
            input_ids=asked, **more, **inputs, max_new_tokens=self._max_tokens, do_sample=False
        )
        return str(self._tokenizer.decode(written[0][len(ids) :], skip_special_tokens=True)).strip()

    def _tokenized(self, prompt: str) -> Sequence[int]:
        """The prompt in the words of the folder's chat template, with one placeholder for the image."""
        self._tokenizer = _from(self._folder, "tokenizer", transformers.AutoTokenizer, **_LOCAL)
        if not self._tokenizer.chat_template:
            raise ModelError(f"{self._folder}: its tokenizer has no chat template, which --generate needs")
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        tokens: list[int] = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, return_dict=False
        )
        if tokens.count(self._image_token) != 1:
            raise ModelError(f"{self._folder}: its chat template makes no single placeholder of one image")
        return tokens

    @property
    def _image_token(self) -> int:
        for name in ("image_token_id", "image_token_index"):
            if (token := getattr(self._config, name, None)) is not None:
                return int(token)
        raise ModelError(f"{self._folder}: its configuration names no image_token_id")


def _named(config: Any) -> Any:
    """The class that a configuration names; AutoModel where it names none that is known here."""
    (name, *_) = getattr(config, "architectures", None) or [""]
    known = getattr(transformers, name, None) if name else None
    return transformers.AutoModel if known is None else known


def _from(folder: Path, what: str, kind: Any, **options: Any) -> Any:
    """`from_pretrained`, which raises nearly anything, with an error that names the folder."""
    try:
        return kind.from_pretrained(str(folder), **options)
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if "trust_remote_code" in reason:
            reason = "it needs Python code that comes with it, and such is never run"
        raise ModelError(f"{folder}: its {what} can't be loaded: {reason}") from error
