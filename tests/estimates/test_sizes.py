"""What a planned model would train, and its operations, are those of the real one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.errors import UserError
from pipeline.estimates import trained_part
from pipeline.models.families import shape_of
from pipeline.training.freeze import freeze_others, lowest_trainable_layer, parameter_table, select_trainable
from pipeline.training.mfu import training_flops
from pipeline.training.muon import matrices_of, update_flops
from tests.training.small import train_settings

LENGTH = 24
SMALL = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4, "num_attention_heads": 6, "vocab_size": 96,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_experts": 8,
    "num_local_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
}  # fmt: skip
EXPANSION = {
    "method": "copy",
    "layers": [{"layer": layer, "new": layer in (1, 3), "from": [layer]} for layer in range(4)],
}
CHOICES = [
    "auto", "all", "layers", r"layers\.2\.", r"\.norm\.weight", "embed_tokens", "lm_head",
    "new_layers+embeddings+norms", "head+/layers.2.*norm/",
]  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "phi3", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("trainable", CHOICES)
def test_the_choice_and_its_operations_are_the_engine_s(family: str, trainable: str, tmp_path: Path) -> None:
    (tmp_path / "expansion.json").write_text(json.dumps(EXPANSION))
    config = AutoConfig.for_model(family, **SMALL, tie_word_embeddings=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    names = select_trainable("pretrain", trainable, model, tmp_path)
    freeze_others(model, names)
    planned = trained_part(
        "pretrain", trainable, shape_of(json.loads(config.to_json_string(use_diff=False))), EXPANSION
    )
    assert planned.names == names
    assert planned.parameters == sum(row.parameters for row in parameter_table(model, {}) if row.trained)
    assert planned.lowest == lowest_trainable_layer(model)
    assert planned.flops(LENGTH) == training_flops(model, LENGTH)
    if any(planned.updated_by_muon("muon")):
        matrices = matrices_of("pretrain", model, train_settings(optimizer="muon"), ())
        assert planned.flops(LENGTH, "muon").update == update_flops(model, matrices, 5) > 0
        assert planned.flops(LENGTH, "muon", 2).update == update_flops(model, matrices, 2)
        if trainable in ("auto", "all"):
            new = matrices_of("pretrain", model, train_settings(optimizer="muon_new_layers"), planned.at_learning_rate)
            assert planned.flops(LENGTH, "muon_new_layers").update == update_flops(model, new, 5) > 0
    else:
        with pytest.raises(UserError, match="none of them trains"):
            matrices_of("pretrain", model, train_settings(optimizer="muon"), ())


@pytest.mark.parametrize("narrow", [False, True])
def test_operations_are_the_engine_s_where_the_head_is_narrower_than_the_layers(narrow: bool) -> None:
    """As in OPT-350m."""
    config = AutoConfig.for_model(
        "opt", hidden_size=48, ffn_dim=80, num_hidden_layers=2, num_attention_heads=6, vocab_size=96,
        max_position_embeddings=64, word_embed_proj_dim=24 if narrow else 48,
    )  # fmt: skip
    planned = trained_part("pretrain", "all", shape_of(json.loads(config.to_json_string(use_diff=False))), {})
    assert planned.flops(LENGTH) == training_flops(AutoModelForCausalLM.from_config(config), LENGTH)


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    shape = shape_of({"model_type": "llama", **SMALL, "num_local_experts": None, "num_experts": None})
    with pytest.raises(UserError, match="nothing would train"):
        trained_part("pretrain", "no_such_name", shape, EXPANSION)


def test_the_matrices_that_muon_would_update_are_the_engine_s_where_the_family_is_inferred() -> None:
    """GPT-2 stores matrices as [in, out], and query, key and value as one."""
    config = AutoConfig.for_model("gpt2", n_embd=48, n_layer=4, n_head=6, vocab_size=96, n_positions=64)
    model = AutoModelForCausalLM.from_config(config)
    matrices = matrices_of("pretrain", model, train_settings(optimizer="muon"), ())
    assert sorted(map(len, matrices.values())) == [1] * 12 + [3] * 4
    planned = trained_part("pretrain", "all", shape_of(json.loads(config.to_json_string(use_diff=False))), {})
    assert planned.flops(LENGTH, "muon").update == update_flops(model, matrices, 5)
