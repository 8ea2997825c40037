"""A tiny random model of every family with a language model inside it."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from tests.tiny_families import SMALL, randomize

VISION = {
    "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
ROTATION = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]}
CONFIGS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {"model_type": "gemma3_text", "sliding_window": 8, "layer_types": ["sliding_attention"] * 2
                        + ["full_attention", "sliding_attention"]},
        "vision_config": {"model_type": "siglip_vision_model"}, "mm_tokens_per_image": 4,
    },
    "mistral3": {
        "text_config": {"model_type": "mistral"}, "vision_config": {"model_type": "pixtral", "head_dim": 8},
        "tie_word_embeddings": False,
    },
    "qwen2_5_vl": {
        "text_config": {"model_type": "qwen2_5_vl_text", "rope_parameters": ROTATION, "use_sliding_window": True,
                        "max_window_layers": 2, "sliding_window": 8},
        "vision_config": {"depth": 1, "num_heads": 2, "out_hidden_size": 16, "fullatt_block_indexes": [0]},
    },
    "llama4": {
        "text_config": {"model_type": "llama4_text", "num_local_experts": 2, "interleave_moe_layer_step": 2,
                        "intermediate_size_mlp": 20, "attention_chunk_size": 8, "no_rope_layers": [1, 0, 1, 0]},
        "vision_config": {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16},
    },
    "llava": {"text_config": {"model_type": "llama"}, "vision_config": {"model_type": "clip_vision_model"}},
}  # fmt: skip


def tiny_outer(family: str) -> PreTrainedModel:
    """A model whose parameters all differ from their defaults, those of the language model as in ``tiny_model``."""
    config = CONFIGS[family]
    parts = {
        "text_config": {**SMALL, **config["text_config"]},
        "vision_config": {**VISION, **config["vision_config"]},
    }
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForImageTextToText.from_config(
        AutoConfig.for_model(family, **{**config, **parts}), dtype=torch.float32
    )
    randomize(model)
    return model.eval()
