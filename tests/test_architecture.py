"""The table of families, against models that transformers builds."""

from __future__ import annotations

from collections import Counter

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.architecture import ARCHITECTURES, architecture_of
from pipeline.errors import UserError

SMALL = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "vocab_size": 32,
}  # fmt: skip


def _tensor_names(family: str, **settings: object) -> list[str]:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SMALL, **settings))
    return list(model.state_dict())


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_every_tensor_of_the_family_has_its_place(family: str) -> None:
    architecture = architecture_of(family)
    names = _tensor_names(family)
    tensors = architecture.layer_tensors(names, 3)
    within = {architecture.tensor_name(layer, tensor.name) for layer in range(3) for tensor in tensors}
    assert set(names) - within == {architecture.embeddings, architecture.final_norm, architecture.lm_head}
    matrices = {tensor.role.name for tensor in tensors if tensor.role.kind == "matrix"}
    assert matrices == {"q", "k", "v", "o", "gate", "up", "down"}


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_each_block_can_be_silenced(family: str) -> None:
    tensors = architecture_of(family).layer_tensors(_tensor_names(family), 3)
    silent = Counter(tensor.role.block for tensor in tensors if tensor.role.silent is not None)
    assert silent == {"attention": 1, "mlp": 1}


def test_biases_share_their_matrix_s_module_and_are_silenced_with_it() -> None:
    names = _tensor_names("llama", attention_bias=True, mlp_bias=True)
    tensors = {tensor.name: tensor for tensor in architecture_of("llama").layer_tensors(names, 3)}
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


def test_buffers_of_old_checkpoints_are_not_kept() -> None:
    llama = architecture_of("llama")
    buffer = "model.layers.1.self_attn.rotary_emb.inv_freq"
    assert llama.is_derived(buffer)
    assert not llama.is_derived("model.layers.1.mlp.up_proj.weight")
    names = _tensor_names("llama")
    assert llama.layer_tensors([*names, buffer], 3) == llama.layer_tensors(names, 3)


def test_an_unknown_family_says_what_to_add_and_where() -> None:
    with pytest.raises(UserError, match=r"'mamba'.*ARCHITECTURES in pipeline/architecture\.py"):
        architecture_of("mamba")


def test_an_unknown_tensor_says_what_to_add_and_where() -> None:
    names = [*_tensor_names("llama"), *(f"model.layers.{layer}.mlp.extra.weight" for layer in range(3))]
    with pytest.raises(UserError, match=r"mlp\.extra\.weight.*pipeline/architecture\.py"):
        architecture_of("llama").layer_tensors(names, 3)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda names: [name for name in names if name != "model.layers.2.mlp.up_proj.weight"],
            "differ in mlp.up_proj",
        ),
        (lambda names: [name.removeprefix("model.") for name in names], "has no tensors of that name"),
        (lambda names: [*names, "model.layers.3.mlp.up_proj.weight"], "speaks of 3 layers only"),
    ],
    ids=["uneven layers", "other names", "a layer too many"],
)
def test_a_checkpoint_that_is_not_the_familys(change, says: str) -> None:
    with pytest.raises(UserError, match=says):
        architecture_of("llama").layer_tensors(change(_tensor_names("llama")), 3)
