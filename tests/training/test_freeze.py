import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from pipeline.errors import UserError
from pipeline.training import freeze
from tests.tiny_families import tiny_model


@pytest.fixture
def model(grown_dir: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(grown_dir, dtype=torch.float32)


def expansion(tmp_path: Path, grown_dir: Path, method: str, new: set[int]) -> Path:
    """Creates a model directory with this ``expansion.json``."""
    directory = tmp_path / "model"
    shutil.copytree(grown_dir, directory)
    layers = [{"layer": layer, "new": layer in new, "from": [layer]} for layer in range(4)]
    (directory / "expansion.json").write_text(json.dumps({"method": method, "layers": layers}))
    return directory


def layers_of(model: nn.Module, names: set[str]) -> set[int | None]:
    return {freeze.layer_of_parameter(model)[name] for name in names}


def test_auto_trains_exactly_the_new_layers(model: nn.Module, grown_dir: Path):
    chosen = freeze.select_trainable("pretrain", "auto", model, grown_dir)
    assert layers_of(model, chosen) == {1, 3}
    assert len(chosen) == 2 * len(list(model.base_model.layers[0].parameters()))


@pytest.mark.parametrize("method, new", [("solar", {2, 3}), ("none", set())])
def test_auto_trains_everything_for_solar_and_none(
    tmp_path: Path, grown_dir: Path, model: nn.Module, method: str, new: set[int]
):
    directory = expansion(tmp_path, grown_dir, method, new)
    chosen = freeze.select_trainable("pretrain", "auto", model, directory)
    assert chosen == {name for name, _ in model.named_parameters()}


def test_new_layers_trains_only_the_new_layers_for_solar_too(tmp_path: Path, grown_dir: Path, model: nn.Module):
    directory = expansion(tmp_path, grown_dir, "solar", {1})
    assert layers_of(model, freeze.select_trainable("pretrain", "new_layers", model, directory)) == {1}


def test_matched_trains_the_new_layers_or_the_recorded_ones(tmp_path: Path, grown_dir: Path, model: nn.Module):
    assert layers_of(model, freeze.select_trainable("pretrain", "matched", model, grown_dir)) == {1, 3}
    directory = expansion(tmp_path, grown_dir, "none", set())
    with pytest.raises(UserError, match="nothing would train"):
        freeze.select_trainable("pretrain", "matched", model, directory)
    recorded = json.loads((directory / "expansion.json").read_text())
    (directory / "expansion.json").write_text(json.dumps({**recorded, "matched": [0, 2]}))
    assert layers_of(model, freeze.select_trainable("pretrain", "matched", model, directory)) == {0, 2}


def test_layer_1_is_not_confused_with_layer_11():
    """Layers are identified by their parameters, not by substrings of names."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=8, hidden_size=4, intermediate_size=4, num_hidden_layers=12, num_attention_heads=1,
        num_key_value_heads=1,
    )  # fmt: skip
    layers = freeze.layer_of_parameter(LlamaForCausalLM(config))
    assert all(name.startswith(f"model.layers.{layer}.") for name, layer in layers.items() if layer is not None)


def test_a_pattern_is_searched_in_parameter_names(model: nn.Module, grown_dir: Path):
    chosen = freeze.select_trainable("pretrain", r"layers\.[01]\..*norm", model, grown_dir)
    assert len(chosen) == 4 and layers_of(model, chosen) == {0, 1}


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox", "stablelm", "qwen3_moe", "olmo2"])
def test_words_select_modules_of_their_kind_in_addition_to_layers(family: str, tmp_path: Path, grown_dir: Path):
    """Every kind of module is found by its class, except that RMS norms share no base class."""
    shutil.copy(grown_dir / "expansion.json", tmp_path)
    model = tiny_model(family, tie_word_embeddings=family == "llama")
    new = {name for name, layer in freeze.layer_of_parameter(model).items() if layer in (1, 3)}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    norms = {names[id(p)] for module in model.modules() if "Norm" in type(module).__name__ for p in module.parameters()}
    embeddings = {
        names[id(p)] for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()
    }
    head = {names[id(model.get_output_embeddings().weight)]}
    assert (head == embeddings) == (family == "llama")

    def chosen(trainable: str) -> set[str]:
        return freeze.select_trainable("pretrain", trainable, model, tmp_path)

    assert chosen("new_layers+embeddings+norms") == new | embeddings | norms
    assert chosen("layers") == {name for name, layer in freeze.layer_of_parameter(model).items() if layer is not None}
    assert chosen("norms") == norms and chosen("head") == head
    assert chosen("embeddings+/[13].*mlp/") == embeddings | {name for name in new if "mlp" in name}
    assert chosen("auto+head+norms") == new | head | norms


@pytest.mark.parametrize(
    "trainable, near",
    [("new_layers+embedings", "embeddings"), ("new_layer+norm", "new_layers or norms"), ("macthed", "matched")],
)
def test_similar_words_are_suggested(model: nn.Module, grown_dir: Path, trainable: str, near: str):
    with pytest.raises(UserError) as error:
        freeze.select_trainable("pretrain", trainable, model, grown_dir)
    assert f"Did you mean {near}?" in error.value.remedy


def test_a_plus_sign_in_a_regular_expression_keeps_its_meaning(model: nn.Module, grown_dir: Path):
    chosen = freeze.select_trainable("pretrain", r"layers\.[0-2]+\.mlp", model, grown_dir)
    assert layers_of(model, chosen) == {0, 1, 2} and len(chosen) == 9
    assert freeze.select_trainable("pretrain", "e+mbed", model, grown_dir) == {"model.embed_tokens.weight"}


def test_a_pattern_matches_names_in_memory_where_all_experts_of_a_layer_are_one_parameter(tmp_path: Path):
    model = tiny_model("mixtral")
    chosen = freeze.select_trainable("pretrain", r"layers\.1\.mlp\.experts", model, tmp_path)
    assert chosen == {f"model.layers.1.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")}
    with pytest.raises(UserError) as error:
        freeze.select_trainable("pretrain", r"experts\.2\.w1", model, tmp_path)  # a name on disk
    assert "one parameter, such as model.layers.0.mlp.experts.down_proj" in error.value.remedy


@pytest.mark.parametrize("trainable, method", [("no_such_parameter", "copy"), ("new_layers", "none")])
def test_training_nothing_is_refused(tmp_path: Path, grown_dir: Path, model: nn.Module, trainable: str, method: str):
    directory = expansion(tmp_path, grown_dir, method, set())
    with pytest.raises(UserError, match="nothing would train") as error:
        freeze.select_trainable("sft", trainable, model, directory)
    assert error.value.setting == "sft.trainable"


def test_a_model_that_was_never_expanded_needs_an_explicit_choice(model: nn.Module, tiny_llama_dir: Path):
    with pytest.raises(UserError, match="expansion.json"):
        freeze.select_trainable("pretrain", "auto", model, tiny_llama_dir)
    assert freeze.select_trainable("pretrain", "all", model, tiny_llama_dir)


def test_the_lowest_trainable_layer(model: nn.Module):
    names = [name for name, _ in model.named_parameters()]
    freeze.freeze_others(model, {name for name in names if ".2." in name or ".3." in name})
    assert freeze.lowest_trainable_layer(model) == 2
    freeze.freeze_others(model, {"model.norm.weight"})
    assert freeze.lowest_trainable_layer(model) == 4
    freeze.freeze_others(model, {"model.embed_tokens.weight"})
    assert freeze.lowest_trainable_layer(model) == 0


def test_the_table_lists_every_parameter_once_and_the_summary_adds_up(model: nn.Module, grown_dir: Path):
    freeze.freeze_others(model, freeze.select_trainable("pretrain", "auto", model, grown_dir))
    rows = freeze.parameter_table(model, {})
    assert [row.name for row in rows] == [name for name, _ in model.named_parameters()]
    assert {row.layer for row in rows if row.trained} == {1, 3}
    assert "self_attn.q_proj.weight" in freeze.format_table(rows)
    summary = freeze.format_summary(rows).splitlines()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert summary[-1] == f"{trained:,} of {sum(p.numel() for p in model.parameters()):,} parameters train"
    table = [line.replace(",", "").split() for line in summary[1:-1]]
    assert [cells[0] for cells in table] == ["others", "0", "1", "2", "3", "others"]
    assert [cells[3] for cells in table] == ["frozen", "frozen", "trained", "frozen", "trained", "frozen"]
    assert sum(int(cells[2]) for cells in table if cells[3] == "trained") == trained


def test_roles_that_differ_within_a_layer_get_separate_lines(model: nn.Module, grown_dir: Path):
    freeze.freeze_others(model, freeze.select_trainable("pretrain", r"layers\.[12]\.mlp\.down", model, grown_dir))
    lines = [line.split() for line in freeze.format_summary(freeze.parameter_table(model, {})).splitlines()]
    both = [cells[1:4:2] for cells in lines if cells[0] == "1-2"]
    assert ["mlp.down_proj.weight", "trained"] in both and ["mlp.up_proj.weight", "frozen"] in both
    assert [cells[0] for cells in lines].count("1-2") == 9
