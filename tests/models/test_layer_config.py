"""Per-layer config entries follow their layers, in every family that has such entries."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.files import write_json
from pipeline.models.layer_config import explicit_config, rebuild_config

SMALL = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "vocab_size": 32, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "llama": {},
    "mistral": {},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 3, "sliding_window": 8},
    "qwen3": {"use_sliding_window": True, "max_window_layers": 4, "sliding_window": 8},
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 4},
    "gemma3_text": {"sliding_window": 8, "query_pre_attn_scalar": 4},
    "smollm3": {"no_rope_layer_interval": 2},
    "cohere2": {"sliding_window": 8},
    "ministral": {"sliding_window": 8},
    "exaone4": {"sliding_window": 8, "sliding_window_pattern": 3},
    "olmo3": {"sliding_window": 8},
    "gpt_oss": {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 8},
}
SOURCES = (0, 1, 1, 2, 3, 3, 3, 4, 5)


@pytest.fixture(params=FAMILIES)
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A tiny random model of one family."""
    config = AutoConfig.for_model(request.param, **{**SMALL, **FAMILIES[request.param]})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def _repeat_layers(base: Path, deeper: Path, sources: tuple[int, ...]) -> None:
    """A deeper model whose layer i is the base's layer ``sources[i]``."""
    tensors = load_file(base / "model.safetensors")
    outside = {name: tensor for name, tensor in tensors.items() if not name.startswith("model.layers.")}
    inside = {
        name.replace(f"model.layers.{source}.", f"model.layers.{layer}.", 1): tensor.clone()
        for layer, source in enumerate(sources)
        for name, tensor in tensors.items()
        if name.startswith(f"model.layers.{source}.")
    }
    deeper.mkdir()
    save_file({**outside, **inside}, deeper / "model.safetensors", metadata={"format": "pt"})


def _kinds(directory: Path) -> list[tuple[object, ...]]:
    """What the config class says about every layer."""
    config = AutoConfig.from_pretrained(directory).to_dict()
    lists = [config[name] for name in ("layer_types", "no_rope_layers", "mlp_layer_types") if config.get(name)]
    return list(zip(*lists, strict=True))


def test_a_deeper_model_loads_runs_and_saves_with_the_kind_of_every_layer(base: Path, tmp_path: Path) -> None:
    deeper = tmp_path / "deeper"
    _repeat_layers(base, deeper, SOURCES)
    write_json(deeper / "config.json", rebuild_config(explicit_config(base), SOURCES))
    kinds = _kinds(base)
    assert _kinds(deeper) == [kinds[source] for source in SOURCES if kinds]
    model = AutoModelForCausalLM.from_pretrained(deeper)
    assert len(model.model.layers) == len(SOURCES)
    assert torch.isfinite(model(torch.arange(1, 20)[None]).logits).all()
    model.save_pretrained(tmp_path / "again")
    assert _kinds(tmp_path / "again") == _kinds(deeper)


def test_lists_that_the_config_class_derives_are_written_out(tmp_path: Path) -> None:
    """Like an older config.json: qwen2 with a sliding window from layer 3 on, and without layer_types."""
    config = {"model_type": "qwen2", **SMALL, **FAMILIES["qwen2"]}
    write_json(tmp_path / "config.json", config)
    spelled_out = explicit_config(tmp_path)
    assert spelled_out["layer_types"] == ["full_attention"] * 3 + ["sliding_attention"] * 3
    rebuilt = rebuild_config(spelled_out, (0, 1, 2, 3, 4, 4, 5, 5))
    assert rebuilt["layer_types"] == ["full_attention"] * 3 + ["sliding_attention"] * 5
    assert rebuilt["max_window_layers"] == 3


def test_a_window_threshold_moves_with_the_layers_below_it() -> None:
    config = {"num_hidden_layers": 4, "max_window_layers": 2}
    assert rebuild_config(config, (0, 0, 1, 2, 3))["max_window_layers"] == 3
    config = {"num_hidden_layers": 4, "max_window_layers": 28}  # a threshold above the last layer stays above it
    assert rebuild_config(config, (0, 0, 1, 2, 3))["max_window_layers"] == 29


def test_lists_of_layer_indices_are_renumbered() -> None:
    config = {"num_hidden_layers": 4, "mlp_only_layers": [0, 2], "moe_layers": [1, 3]}
    rebuilt = rebuild_config(config, (0, 1, 1, 2, 3))
    assert (rebuilt["mlp_only_layers"], rebuilt["moe_layers"]) == ([0, 3], [1, 2, 4])


def test_other_lists_of_the_same_length_are_not_changed() -> None:
    config = {"num_hidden_layers": 2, "eos_token_id": [5, 6], "architectures": ["A", "B"], "kinds": ["x", "y"]}
    assert rebuild_config(config, (0, 1, 1)) == {
        "num_hidden_layers": 3, "eos_token_id": [5, 6], "architectures": ["A", "B"], "kinds": ["x", "y", "y"],
    }  # fmt: skip


def test_the_config_of_the_base_is_not_changed(tiny_llama_dir: Path) -> None:
    before = json.loads((tiny_llama_dir / "config.json").read_text())
    config = explicit_config(tiny_llama_dir)
    assert config == before  # nothing to add in a family without per-layer entries
    rebuild_config(config, (0, 0, 1, 2, 3))
    assert config == before


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize("step, dense, sources", [(2, [], SOURCES), (2, [3], (0, 1, 2, 3, 3, 4, 5)), (3, [], SOURCES)])
def test_any_layer_of_a_mixture_with_dense_layers_can_be_repeated(
    family: str, step: int, dense: list[int], sources: tuple[int, ...], tmp_path: Path
) -> None:
    """Layers of the deeper model have the same modules as those that they come from, in transformers' own model."""
    sparse = {"decoder_sparse_step": step, "mlp_only_layers": dense}
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 12}
    config = AutoConfig.for_model(family, **{**SMALL, **experts, **sparse})
    config.save_pretrained(tmp_path)
    before = explicit_config(tmp_path)
    write_json(tmp_path / "config.json", rebuild_config(before, sources))
    with torch.device("meta"):
        base, deeper = (
            AutoModelForCausalLM.from_config(each) for each in (config, AutoConfig.from_pretrained(tmp_path))
        )
    kinds = [type(layer.mlp) for layer in base.model.layers]
    assert len(set(kinds)) == 2
    assert [type(layer.mlp) for layer in deeper.model.layers] == [kinds[source] for source in sources]


def test_a_rule_for_sparse_layers_that_still_holds_is_kept() -> None:
    config = {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": []}
    assert rebuild_config(config, (0, 1, 2, 3, 2, 3)) == {**config, "num_hidden_layers": 6}
