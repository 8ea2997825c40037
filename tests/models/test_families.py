"""The rows of the family table agree with what transformers builds, writes and computes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from pipeline.errors import UserError
from pipeline.files import read_json, write_json
from pipeline.models.families import (
    FAMILIES,
    Family,
    LayerTensor,
    Place,
    Role,
    check_stored,
    family_of,
    num_experts,
    shape_of,
)
from pipeline.models.families.family import InferredLayers
from pipeline.models.families.parameters import Parameter
from tests.tiny_families import LAYERS, TINY_CONFIGS, layer_tensors, tiny_model

every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory):
    """``checkpoint("llama")`` returns config and tensors as save_pretrained writes them."""

    @cache
    def save(family: str, packed: bool = False) -> tuple[dict[str, Any], dict[str, Tensor]]:
        directory: Path = tmp_path_factory.mktemp(family)
        tiny_model(family).save_pretrained(directory, save_original_format=not packed)
        return read_json(directory / "config.json"), load_file(directory / "model.safetensors")

    return save


def _parts(family: str, config: dict[str, Any], tensors: dict[str, Tensor], layer: int = 0) -> dict[str, Tensor]:
    """The tensors of one layer by the names that methods see."""
    row = family_of(family)
    return {
        tensor.name: _read(tensors[row.tensor_name(layer, tensor.stored)], tensor)
        for tensor in layer_tensors(row, tensors, config)
    }


def _read(stored: Tensor, tensor: LayerTensor) -> Tensor:
    read: Tensor = stored if tensor.place is None else tensor.place.read(stored)
    return read


def _load(config: dict[str, Any], tensors: dict[str, Tensor], directory: Path) -> PreTrainedModel:
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    write_json(directory / "config.json", config)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory)
    return model


def test_every_family_has_a_tiny_model() -> None:
    assert set(TINY_CONFIGS) == set(FAMILIES)


@pytest.mark.parametrize("packed", [False, True])
@every_family
def test_stored_names_and_shapes_are_those_of_the_config(family: str, packed: bool, checkpoint) -> None:
    config, tensors = checkpoint(family, packed)
    stored = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    check_stored(config, stored, family)
    norm = family_of(family).final_norm
    head = {family_of(family).stored_lm_head: stored[family_of(family).embeddings]}
    for damaged, rule in (
        ({name: shape for name, shape in stored.items() if name != norm}, f"{norm} is missing"),
        ({name: shape for name, shape in stored.items() if ".layers.2." not in name}, "layers.2.* is missing"),
        ({**stored, "v_head.weight": (1, 1)}, "v_head.weight is not in the model"),
        ({**stored, norm: (3,)}, rf"{norm} has the shape \[3\], but \[16\]"),
    ):
        with pytest.raises(UserError, match=rule):
            check_stored(config, damaged, family)
    if experts := [name for name in stored if ".layers.1." in name and ".experts.2." in name]:
        with pytest.raises(UserError, match=f"disagree: {re.escape(experts[0])} is missing"):
            check_stored(config, {name: shape for name, shape in stored.items() if name != experts[0]}, family)
    if config["tie_word_embeddings"]:
        check_stored(config, {**stored, **head}, family)
        check_stored(config, {name: shape for name, shape in {**stored, **head}.items() if "embed" not in name}, family)


@every_family
def test_every_tensor_of_a_checkpoint_is_in_the_row(family: str, checkpoint) -> None:
    config, stored = checkpoint(family)
    row = family_of(family)
    tensors = layer_tensors(row, stored, config)
    within = {row.tensor_name(layer, tensor.stored) for layer in range(LAYERS) for tensor in tensors}
    outside = {row.embeddings, row.final_norm, row.stored_lm_head}
    outside -= {row.stored_lm_head} if config["tie_word_embeddings"] else set()
    assert {name.replace(".bias", ".weight") for name in set(stored) - within} == outside
    matrices = Counter(tensor.role.name for tensor in tensors if tensor.role.kind == "matrix")
    is_gated = any(re.search(r"\.(gate_proj|gate_up_proj|w1)\b", name) for name in stored)
    mlp = {"gate", "up", "down"} if is_gated else {"up", "down"}
    experts = max(num_experts(config), 1)
    assert {name: count for name, count in matrices.items() if name not in mlp} == dict.fromkeys("qkvo", 1)
    assert {name: matrices[name] - (family == "qwen2_moe") for name in mlp} == dict.fromkeys(mlp, experts)


@every_family
def test_matrices_read_or_write_the_hidden_size_on_the_side_of_their_role(family: str, checkpoint) -> None:
    config, stored = checkpoint(family)
    shapes = {name: tensor.shape for name, tensor in _parts(family, config, stored).items()}
    for tensor in layer_tensors(family_of(family), stored, config):
        if tensor.role.kind == "matrix":
            assert shapes[tensor.name][0 if tensor.role.side == "output" else 1] == 16, tensor.name
        if tensor.role.kind == "bias":
            assert shapes[tensor.name] == shapes[tensor.module + ".weight"][:1], tensor.name


@every_family
def test_silent_values_make_every_block_add_zero(family: str, checkpoint, tmp_path: Path) -> None:
    """Layers filled with the silent values return their input."""
    config, stored = checkpoint(family)
    model = tiny_model(family)
    silent = dict(stored)
    for layer in range(LAYERS):
        for tensor in layer_tensors(family_of(family), stored, config):
            name = family_of(family).tensor_name(layer, tensor.stored)
            if tensor.role.silent is not None:
                part = torch.full_like(_read(stored[name], tensor), tensor.role.silent)
                silent[name] = part if tensor.place is None else _placed(tensor.place, silent[name], part)
    silenced = _load(config, silent, tmp_path)
    tokens = torch.arange(3, 12)[None]
    states = silenced(tokens, output_hidden_states=True).hidden_states
    assert torch.equal(states[0], states[LAYERS - 1])
    assert not torch.equal(*(model(tokens, output_hidden_states=True).hidden_states[i] for i in (0, LAYERS - 1)))


def _placed(place: Place, stored: Tensor, value: Tensor) -> Tensor:
    stored = stored.clone()
    place.write(stored, value)
    return stored


@every_family
@pytest.mark.parametrize("packed", [False, True], ids=["published", "in memory"])
def test_parts_cover_every_stored_element_exactly_once(family: str, packed: bool, checkpoint) -> None:
    config, stored = checkpoint(family, packed)
    numbered = {name: torch.arange(tensor.numel()).view(tensor.shape) for name, tensor in stored.items()}
    row = family_of(family)
    read: dict[str, list[Tensor]] = {}
    rebuilt = {name: torch.zeros_like(tensor) for name, tensor in numbered.items()}
    for tensor in layer_tensors(row, stored, config):
        name = row.tensor_name(1, tensor.stored)
        value = _read(numbered[name], tensor)
        read.setdefault(name, []).append(value.flatten())
        if tensor.place is not None:
            tensor.place.write(rebuilt[name], value)
            assert torch.equal(rebuilt[name].flatten()[value.flatten()], value.flatten())
    for name, values in read.items():
        assert torch.equal(torch.cat(values).sort().values, numbered[name].flatten()), name


def test_phi3_stores_query_key_and_value_contiguously_and_gate_before_up(checkpoint) -> None:
    config, stored = checkpoint("phi3")
    parts = _parts("phi3", config, stored)
    qkv, gate_up = (stored[f"model.layers.0.{name}.weight"] for name in ("self_attn.qkv_proj", "mlp.gate_up_proj"))
    for name, rows in {"q": slice(0, 16), "k": slice(16, 24), "v": slice(24, 32)}.items():  # 4, 2 and 2 heads of 4
        assert torch.equal(parts[f"self_attn.{name}_proj.weight"], qkv[rows])
    assert torch.equal(parts["mlp.gate_proj.weight"], gate_up[:24])
    assert torch.equal(parts["mlp.up_proj.weight"], gate_up[24:])


def test_gpt_neox_stores_query_key_and_value_head_by_head(checkpoint) -> None:
    config, stored = checkpoint("gpt_neox")
    parts = _parts("gpt_neox", config, stored)
    for kind, shape in (("weight", (4, 3, 4, 16)), ("bias", (4, 3, 4))):
        heads = stored[f"gpt_neox.layers.0.attention.query_key_value.{kind}"].view(shape)
        for index, name in enumerate(("query", "key", "value")):
            expected = torch.cat([heads[head, index] for head in range(4)])
            assert torch.equal(parts[f"attention.{name}.{kind}"], expected)


def test_gpt_oss_stores_experts_transposed_with_gate_and_up_alternating(checkpoint) -> None:
    config, stored = checkpoint("gpt_oss")
    parts = _parts("gpt_oss", config, stored)
    matrix, bias = (stored[f"model.layers.0.mlp.experts.gate_up_proj{suffix}"] for suffix in ("", "_bias"))
    for expert in range(3):
        for start, name in enumerate(("gate_proj", "up_proj")):
            assert torch.equal(parts[f"mlp.experts.{expert}.{name}.weight"], matrix[expert][:, start::2].T)
            assert torch.equal(parts[f"mlp.experts.{expert}.{name}.bias"], bias[expert][start::2])
        down = stored["model.layers.0.mlp.experts.down_proj"][expert]
        assert torch.equal(parts[f"mlp.experts.{expert}.down_proj.weight"], down.T)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
def test_experts_are_the_same_matrices_in_both_layouts(family: str, checkpoint) -> None:
    published, packed = (_parts(family, *checkpoint(family, packed)) for packed in (False, True))
    renamed = {name.replace("block_sparse_moe.gate", "mlp.gate"): tensor for name, tensor in published.items()}
    assert set(renamed) == set(packed)
    assert all(torch.equal(packed[name], tensor) for name, tensor in renamed.items())


def test_a_parallel_mlp_does_not_read_the_output_of_attention(checkpoint) -> None:
    config, stored = checkpoint("gpt_neox")
    for parallel in (True, False):
        tensors = layer_tensors(family_of("gpt_neox"), stored, {**config, "use_parallel_residual": parallel})
        after = {tensor.module for tensor in tensors if tensor.role.after_attention}
        assert after == (set() if parallel else {"post_attention_layernorm", "mlp.dense_h_to_4h"})


def test_biases_share_the_module_of_their_matrix_and_are_silenced_with_it(checkpoint) -> None:
    config, stored = checkpoint("llama")
    tensors = {tensor.name: tensor for tensor in layer_tensors(family_of("llama"), stored, config)}
    bias, matrix = tensors["self_attn.o_proj.bias"], tensors["self_attn.o_proj.weight"]
    assert bias.module == matrix.module == "self_attn.o_proj"
    assert (bias.role.kind, bias.role.silent) == ("bias", 0.0)
    assert tensors["mlp.down_proj.bias"].role.silent == 0.0
    assert tensors["self_attn.q_proj.bias"].role.silent is None


def test_layers_are_recognized_by_exact_names() -> None:
    llama = family_of("llama")
    assert llama.layer_of("model.layers.12.mlp.up_proj.weight") == 12
    assert llama.split("model.layers.12.mlp.up_proj.weight") == (12, "mlp.up_proj.weight")
    assert llama.tensor_name(3, "mlp.up_proj.weight") == "model.layers.3.mlp.up_proj.weight"
    for name in ("model.embed_tokens.weight", "lm_head.weight", "other.model.layers.1.x", "model.layers.x.y"):
        assert llama.layer_of(name) is None


@pytest.mark.parametrize(
    ("family", "buffer"),
    [
        ("llama", "model.layers.1.self_attn.rotary_emb.inv_freq"),
        ("gpt_neox", "gpt_neox.layers.1.attention.bias"),
        ("gpt_neox", "gpt_neox.layers.1.attention.masked_bias"),
    ],
)
def test_buffers_of_old_checkpoints_are_derived(family: str, buffer: str, checkpoint) -> None:
    config, stored = checkpoint(family)
    row = family_of(family)
    assert row.is_derived(buffer)
    assert not any(row.is_derived(name) for name in stored)
    assert layer_tensors(row, [*stored, buffer], config) == layer_tensors(row, stored, config)


def test_layers_after_the_last_one_are_left_out_if_transformers_ignores_them() -> None:
    """Checkpoints of GLM-4.5 and DeepSeek-V3 end with layers that predict further tokens; here the model has two."""
    up = Parameter(Role("up", "matrix", "mlp", "input"), (4, 4))
    layers = InferredLayers(
        kinds=({"mlp.up_proj.weight": up},), kind_of=(0, 0), before={"model.embed_tokens.weight": (8, 4)}, after={},
        ignored=(r"model\.layers\.2.*",),
    )  # fmt: skip
    family = Family({}, inference=layers)
    expected = {f"model.layers.{layer}.mlp.up_proj.weight": layer == 2 for layer in range(4)}
    expected |= {"model.layers.2.eh_proj.weight": True, "model.embed_tokens.weight": False}
    assert {name: family.is_derived(name) for name in expected} == expected


@pytest.mark.parametrize("look_up", [lambda: family_of("unknown"), lambda: shape_of({"model_type": "unknown"})])
def test_an_unknown_family_is_reported_with_the_row_to_add(look_up: Callable[[], object]) -> None:
    with pytest.raises(UserError, match=r"(?i)'unknown'.*add a row .* FAMILIES in pipeline/models/families/table\.py"):
        look_up()


def test_an_unknown_tensor_is_reported_with_the_file_to_add_it_to(checkpoint) -> None:
    config, stored = checkpoint("llama")
    names = [*stored, *(f"model.layers.{layer}.mlp.extra.weight" for layer in range(LAYERS))]
    with pytest.raises(UserError, match=r"mlp\.extra\.weight.*pipeline/models/families/table\.py"):
        family_of("llama").tensors_by_layer(names, config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda names: [name.removeprefix("model.") for name in names], "has no tensors with this name"),
        (lambda names: [*names, "model.layers.4.mlp.up_proj.weight"], "declares only 4 layers"),
    ],
    ids=["other names", "a layer too many"],
)
def test_checkpoints_that_do_not_match_the_family_are_rejected(change, message: str, checkpoint) -> None:
    config, stored = checkpoint("llama")
    with pytest.raises(UserError, match=message):
        family_of("llama").tensors_by_layer(change(stored), config)
