"""A folder with a small model of Qwen2-VL's shape, a byte tokenizer, no weights (`load_format="dummy"`).

Shared with tests/vllm.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)


def write_model(folder: Path) -> None:
    """An image of 280 x 280 pixels becomes 400 patches of 1176 values and 100 tokens; one of 1000 x 1000,
    which is made 1008 x 1008, 5184 patches and 1296 tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    numbers = {text: int(tokenizer.token_to_id(text) or 0) for text in SPECIAL}
    for name, content in _files(numbers).items():
        (folder / name).write_text(json.dumps(content))


def larger_weights() -> None:
    """For weights not yet made: vLLM's dummy weights are so small that biases drown every image."""
    from vllm.model_executor.model_loader import dummy_loader

    for name in ("initialize_dummy_weights", "initialize_single_dummy_weight"):  # the latter from 0.33 on
        initialize = getattr(dummy_loader, name, None)
        if initialize is not None and not isinstance(initialize, functools.partial):
            setattr(dummy_loader, name, functools.partial(initialize, low=-0.2, high=0.2))


def _files(numbers: dict[str, int]) -> dict[str, Any]:
    end, pad = numbers["<|im_end|>"], numbers["<|endoftext|>"]
    vision = {
        "depth": 2,
        "embed_dim": 128,
        "mlp_ratio": 2,
        "num_heads": 4,
        "in_channels": 3,
        "in_chans": 3,
        "hidden_size": 128,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
        "hidden_act": "quick_gelu",
        "model_type": "qwen2_vl",
    }
    config = {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "vocab_size": 320,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 65536,
        "max_window_layers": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
        "initializer_range": 0.02,
        "use_cache": True,
        "use_sliding_window": False,
        "sliding_window": 32768,
        "tie_word_embeddings": False,
        "attention_dropout": 0.0,
        "torch_dtype": "float32",
        "bos_token_id": pad,
        "eos_token_id": end,
        "pad_token_id": pad,
        "vision_config": vision,
        **{f"{key}_token_id": numbers[f"<|{key}|>"] for key in ("vision_start", "vision_end")},
        "vision_token_id": numbers["<|vision_pad|>"],
        **{f"{key}_token_id": numbers[f"<|{key}_pad|>"] for key in ("image", "video")},
    }
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 65536,
        "add_prefix_space": False,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "bos_token": None,
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "additional_special_tokens": list(SPECIAL[1:]),
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
    }
    processor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48, 0.46, 0.41],
        "image_std": [0.27, 0.26, 0.28],
    }
    return {
        "config.json": config,
        "tokenizer_config.json": tokenizer,
        "preprocessor_config.json": processor,
        "generation_config.json": {"eos_token_id": end, "pad_token_id": pad},
    }
