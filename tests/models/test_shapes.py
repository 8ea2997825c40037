"""Shapes worked out from config.json equal those of the models that transformers builds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.errors import UserError
from pipeline.models.families import FAMILIES, shape_of

SMALL = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4, "num_attention_heads": 6, "vocab_size": 96,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = {"num_key_value_heads": 2}
EXPERTS = {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 40, "num_experts_per_tok": 2}
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "llama": [{"head_dim": 16}, {"attention_bias": True, "mlp_bias": True}, {"tie_word_embeddings": True}],
    "qwen3": [{"attention_bias": True, "tie_word_embeddings": True}],
    "stablelm": [{"use_qkv_bias": True, "qk_layernorm": True}, {"use_parallel_residual": True}],
    "starcoder2": [{"use_bias": False}],
    "gpt_neox": [{"attention_bias": False, "num_key_value_heads": None}],
    "qwen2_moe": [{"num_experts": 8, "decoder_sparse_step": 2}, {"num_experts": 8, "mlp_only_layers": [1]}],
    "qwen3_moe": [{"num_experts": 8, "mlp_only_layers": [0, 2], "head_dim": 8}],
    "gemma3_text": [{"tie_word_embeddings": False}],
}


def _built(config: Any) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _predicted(values: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, _, shape in shape_of(values).tensors()}


CASES = [(family, changes) for family in FAMILIES for changes in ({}, *VARIANTS.get(family, []))]


@pytest.mark.parametrize("family, changes", CASES, ids=lambda value: str(value))
def test_every_tensor_has_the_shape_that_transformers_gives_it(family: str, changes: dict[str, Any]) -> None:
    config = AutoConfig.for_model(family, **{**SMALL, **GROUPED, **EXPERTS, **changes})
    predicted = _predicted(json.loads(config.to_json_string(use_diff=False)))
    assert predicted == _built(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_missing_config_entries_default_as_in_transformers(family: str, tmp_path: Path) -> None:
    """A config.json written from a default config leaves out the entries that equal the class's defaults."""
    config = AutoConfig.for_model(family)
    needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    sparse = ("num_experts", "num_local_experts", "num_experts_per_tok", *EXPERTS)
    values = config.to_dict()
    short = {name: values[name] for name in (*needed, *sparse) if values.get(name) is not None}
    assert _predicted({"model_type": family, **short}) == _built(config)


def test_a_null_number_of_key_value_heads_is_not_the_default(tmp_path: Path) -> None:
    config = AutoConfig.for_model("qwen2", **{**SMALL, "num_key_value_heads": None})
    assert _predicted({**config.to_dict(), "num_key_value_heads": None}) == _built(config)


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
def test_a_missing_number_of_experts_does_not_make_a_dense_model(family: str) -> None:
    with pytest.raises(UserError, match="a config without num_experts"):
        shape_of({"model_type": family, **SMALL, **GROUPED, **EXPERTS})


def test_experts_that_a_token_is_not_routed_to_are_not_active() -> None:
    """Mixtral-8x7B (arXiv 2401.04088, section 2): 47B parameters, of which a token uses 13B."""
    config = AutoConfig.for_model("mixtral").to_dict()
    mixtral = shape_of(config)
    assert round(mixtral.parameters / 1e9, 1) == 46.7
    assert round(mixtral.active_parameters / 1e9, 1) == 12.9


@pytest.mark.parametrize("values", [{"model_type": "unknown"}, {}, {"model_type": "llama", "hidden_size": 64}])
def test_configs_without_a_known_shape_are_rejected(values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="model.path"):
        shape_of(values)
