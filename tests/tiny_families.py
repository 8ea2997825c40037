"""A tiny random model of every family in the family table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from pipeline.files import read_json
from pipeline.models.families import Family, LayerTensor, Place, family_of
from pipeline.models.family_inference.small import randomize

LAYERS = 4
SMALL = {
    "vocab_size": 384, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 128,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "use_cache": True,
}  # fmt: skip
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
TINY_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 2, "sliding_window": 8},
    "qwen3": {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 8, "attention_bias": True},
    "gemma": {},
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 4},
    "gemma3_text": {"sliding_window": 8, "query_pre_attn_scalar": 4, "sliding_window_pattern": 3},
    "phi3": {"sliding_window": 8},
    "olmo2": {},
    "smollm3": {"no_rope_layer_interval": 3},
    "arcee": {"attention_bias": True, "mlp_bias": True},
    "gpt_neox": {},
    "granite": {"residual_multiplier": 0.5, "attention_bias": True, "mlp_bias": True},
    "starcoder2": {"use_bias": True, "sliding_window": 8},
    "stablelm": {"use_qkv_bias": True, "qk_layernorm": True},
    "mixtral": {"num_local_experts": 3, "num_experts_per_tok": 2},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 20},
    "qwen3_moe": EXPERTS,
    "olmoe": {"num_experts": 3, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 8},
}


def tiny_model(family: str, **changes: Any) -> PreTrainedModel:
    """A model whose parameters all differ from their defaults, norm scales, biases, sinks and routers included."""
    return randomized_model(AutoConfig.for_model(family, **{**SMALL, **TINY_CONFIGS.get(family, {}), **changes}))


def randomized_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A model of a config, as ``tiny_model``."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    randomize(model)
    return model


def save_tiny(family: str, directory: Path, tokenizer: Any, save_original_format: bool = True, **changes: Any) -> Path:
    """Saves the model and a tokenizer, with tensors named as in published checkpoints or as in memory."""
    tiny_model(family, **changes).save_pretrained(directory, save_original_format=save_original_format)
    tokenizer.save_pretrained(directory)
    return directory


def layer_tensors(family: Family, tensor_names: Iterable[str], config: Mapping[str, Any]) -> list[LayerTensor]:
    """The tensors of a layer, with fused ones split, of a model whose layers are all alike."""
    first, *others = family.tensors_by_layer(tensor_names, config)
    assert all(set(layer) == set(first) for layer in others)
    return first


def layers_by_role(directory: Path) -> list[dict[str, Tensor]]:
    """The tensors of every layer by the names that methods see, with fused ones split."""
    config, stored = read_json(directory / "config.json"), load_file(directory / "model.safetensors")
    family = family_of(config["model_type"])
    tensors = layer_tensors(family, stored, config)

    def read(layer: int, name: str, place: Place | None) -> Tensor:
        whole = stored[family.tensor_name(layer, name)]
        part: Tensor = whole if place is None else place.read(whole)
        return part

    layers = range(config["num_hidden_layers"])
    return [{tensor.name: read(layer, tensor.stored, tensor.place) for tensor in tensors} for layer in layers]
