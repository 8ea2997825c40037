"""The table of families, against what transformers builds, writes and computes."""

from __future__ import annotations

from collections import Counter
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
from pipeline.models.families import ARCHITECTURES, LayerTensor, Place, architecture_of, num_experts
from tests.tiny_families import FAMILIES, LAYERS, tiny_model

families = pytest.mark.parametrize("family", ARCHITECTURES)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory):
    """``checkpoint("llama")``: config and tensors as save_pretrained writes them."""

    @cache
    def save(family: str, packed: bool = False) -> tuple[dict[str, Any], dict[str, Tensor]]:
        directory: Path = tmp_path_factory.mktemp(family)
        tiny_model(family).save_pretrained(directory, save_original_format=not packed)
        return read_json(directory / "config.json"), load_file(directory / "model.safetensors")

    return save


def _parts(family: str, config: dict[str, Any], tensors: dict[str, Tensor], layer: int = 0) -> dict[str, Tensor]:
    """One layer's tensors by the names that methods see."""
    architecture = architecture_of(family)
    return {
        tensor.name: _read(tensors[architecture.tensor_name(layer, tensor.stored)], tensor)
        for tensor in architecture.layer_tensors(tensors, config)
    }


def _read(stored: Tensor, tensor: LayerTensor) -> Tensor:
    read: Tensor = stored if tensor.place is None else tensor.place.read(stored)
    return read


def _load(config: dict[str, Any], tensors: dict[str, Tensor], directory: Path) -> PreTrainedModel:
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    write_json(directory / "config.json", config)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory)
    return model


def test_there_is_a_tiny_model_of_every_family() -> None:
    assert set(FAMILIES) == set(ARCHITECTURES)


@families
def test_every_tensor_of_the_family_has_its_place(family: str, checkpoint) -> None:
    config, stored = checkpoint(family)
    architecture = architecture_of(family)
    tensors = architecture.layer_tensors(stored, config)
    within = {architecture.tensor_name(layer, tensor.stored) for layer in range(LAYERS) for tensor in tensors}
    outside = {architecture.embeddings, architecture.final_norm, architecture.lm_head}
    outside -= {architecture.lm_head} if config["tie_word_embeddings"] else set()
    assert {name.replace(".bias", ".weight") for name in set(stored) - within} == outside
    matrices = Counter(tensor.role.name for tensor in tensors if tensor.role.kind == "matrix")
    mlp = {"up", "down"} if family in ("gpt_neox", "starcoder2") else {"gate", "up", "down"}
    experts = max(num_experts(config), 1)
    assert {name: count for name, count in matrices.items() if name not in mlp} == dict.fromkeys("qkvo", 1)
    assert {name: matrices[name] - (family == "qwen2_moe") for name in mlp} == dict.fromkeys(mlp, experts)


@families
def test_matrices_map_the_width_of_the_model_as_their_roles_say(family: str, checkpoint) -> None:
    config, stored = checkpoint(family)
    shapes = {name: tensor.shape for name, tensor in _parts(family, config, stored).items()}
    for tensor in architecture_of(family).layer_tensors(stored, config):
        if tensor.role.kind == "matrix":
            assert shapes[tensor.name][0 if tensor.role.side == "output" else 1] == 16, tensor.name
        if tensor.role.kind == "bias":
            assert shapes[tensor.name] == shapes[tensor.module + ".weight"][:1], tensor.name


@families
def test_each_block_is_silent_in_all_that_it_adds(family: str, checkpoint, tmp_path: Path) -> None:
    """With the silent values filled in, the layers pass their input on."""
    config, stored = checkpoint(family)
    model = tiny_model(family)
    silent = dict(stored)
    for layer in range(LAYERS):
        for tensor in architecture_of(family).layer_tensors(stored, config):
            name = architecture_of(family).tensor_name(layer, tensor.stored)
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


@families
@pytest.mark.parametrize("packed", [False, True], ids=["as published", "as in memory"])
def test_parts_cover_what_is_stored_once(family: str, packed: bool, checkpoint) -> None:
    config, stored = checkpoint(family, packed)
    numbered = {name: torch.arange(tensor.numel()).view(tensor.shape) for name, tensor in stored.items()}
    architecture = architecture_of(family)
    read: dict[str, list[Tensor]] = {}
    rebuilt = {name: torch.zeros_like(tensor) for name, tensor in numbered.items()}
    for tensor in architecture.layer_tensors(stored, config):
        name = architecture.tensor_name(1, tensor.stored)
        value = _read(numbered[name], tensor)
        read.setdefault(name, []).append(value.flatten())
        if tensor.place is not None:
            tensor.place.write(rebuilt[name], value)
            assert torch.equal(rebuilt[name].flatten()[value.flatten()], value.flatten())
    for name, values in read.items():
        assert torch.equal(torch.cat(values).sort().values, numbered[name].flatten()), name


def test_phi3_keeps_query_key_and_value_one_below_the_other_and_gate_above_up(checkpoint) -> None:
    config, stored = checkpoint("phi3")
    parts = _parts("phi3", config, stored)
    qkv, gate_up = (stored[f"model.layers.0.{name}.weight"] for name in ("self_attn.qkv_proj", "mlp.gate_up_proj"))
    for name, rows in {"q": slice(0, 16), "k": slice(16, 24), "v": slice(24, 32)}.items():  # 4 and twice 2 heads of 4
        assert torch.equal(parts[f"self_attn.{name}_proj.weight"], qkv[rows])
    assert torch.equal(parts["mlp.gate_proj.weight"], gate_up[:24])
    assert torch.equal(parts["mlp.up_proj.weight"], gate_up[24:])


def test_gpt_neox_keeps_query_key_and_value_head_by_head(checkpoint) -> None:
    config, stored = checkpoint("gpt_neox")
    parts = _parts("gpt_neox", config, stored)
    for kind, shape in (("weight", (4, 3, 4, 16)), ("bias", (4, 3, 4))):
        heads = stored[f"gpt_neox.layers.0.attention.query_key_value.{kind}"].view(shape)
        for index, name in enumerate(("query", "key", "value")):
            wanted = torch.cat([heads[head, index] for head in range(4)])
            assert torch.equal(parts[f"attention.{name}.{kind}"], wanted)


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
def test_experts_are_the_same_matrices_however_they_are_stored(family: str, checkpoint) -> None:
    published, packed = (_parts(family, *checkpoint(family, packed)) for packed in (False, True))
    renamed = {name.replace("block_sparse_moe.gate", "mlp.gate"): tensor for name, tensor in published.items()}
    assert set(renamed) == set(packed)
    assert all(torch.equal(packed[name], tensor) for name, tensor in renamed.items())


def test_an_mlp_beside_the_attention_does_not_read_its_output(checkpoint) -> None:
    config, stored = checkpoint("gpt_neox")
    for parallel in (True, False):
        tensors = architecture_of("gpt_neox").layer_tensors(stored, {**config, "use_parallel_residual": parallel})
        after = {tensor.module for tensor in tensors if tensor.role.after_attention}
        assert after == (set() if parallel else {"post_attention_layernorm", "mlp.dense_h_to_4h"})


def test_biases_share_their_matrix_s_module_and_are_silenced_with_it(checkpoint) -> None:
    config, stored = checkpoint("llama")
    tensors = {tensor.name: tensor for tensor in architecture_of("llama").layer_tensors(stored, config)}
    bias, matrix = tensors["self_attn.o_proj.bias"], tensors["self_attn.o_proj.weight"]
    assert bias.module == matrix.module == "self_attn.o_proj"
    assert (bias.role.kind, bias.role.silent) == ("bias", 0.0)
    assert tensors["mlp.down_proj.bias"].role.silent == 0.0
    assert tensors["self_attn.q_proj.bias"].role.silent is None


def test_layers_are_told_by_exact_names() -> None:
    llama = architecture_of("llama")
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
def test_buffers_of_old_checkpoints_are_not_kept(family: str, buffer: str, checkpoint) -> None:
    config, stored = checkpoint(family)
    architecture = architecture_of(family)
    assert architecture.is_derived(buffer)
    assert not any(architecture.is_derived(name) for name in stored)
    assert architecture.layer_tensors([*stored, buffer], config) == architecture.layer_tensors(stored, config)


def test_an_unknown_family_says_what_to_add_and_where() -> None:
    with pytest.raises(UserError, match=r"'mamba'.*ARCHITECTURES in pipeline/architecture/table\.py"):
        architecture_of("mamba")


def test_an_unknown_tensor_says_what_to_add_and_where(checkpoint) -> None:
    config, stored = checkpoint("llama")
    names = [*stored, *(f"model.layers.{layer}.mlp.extra.weight" for layer in range(LAYERS))]
    with pytest.raises(UserError, match=r"mlp\.extra\.weight.*pipeline/architecture/table\.py"):
        architecture_of("llama").layer_tensors(names, config)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda names: [name for name in names if name != "model.layers.2.mlp.up_proj.weight"],
            "differ in mlp.up_proj",
        ),
        (lambda names: [name.removeprefix("model.") for name in names], "has no tensors of that name"),
        (lambda names: [*names, "model.layers.4.mlp.up_proj.weight"], "speaks of 4 layers only"),
    ],
    ids=["uneven layers", "other names", "a layer too many"],
)
def test_a_checkpoint_that_is_not_the_familys(change, says: str, checkpoint) -> None:
    config, stored = checkpoint("llama")
    with pytest.raises(UserError, match=says):
        architecture_of("llama").layer_tensors(change(stored), config)
