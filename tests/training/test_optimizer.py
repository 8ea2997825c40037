import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from pipeline.errors import UserError
from pipeline.models.flops import orthogonalization_flops
from pipeline.training import freeze
from pipeline.training.muon import NewtonSchulz, locate, matrices_of, muon_step, orthogonalized
from pipeline.training.optimizer import (
    LR_MULTIPLE,
    learning_rate_multiples,
    make_optimizer,
    multiples_of_elements,
    parameter_groups,
)
from tests.tiny_families import tiny_model
from tests.training.small import train_settings


@pytest.fixture
def model(grown_dir: Path) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(grown_dir, dtype=torch.float32)
    freeze.freeze_others(model, freeze.select_trainable("pretrain", "auto", model, grown_dir))
    return model


def names_of(model: nn.Module, group: dict) -> set[str]:
    wanted = {id(parameter) for parameter in group["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in wanted}


def test_norms_and_biases_are_not_decayed(model: nn.Module):
    matrices, vectors = parameter_groups(model, train_settings(weight_decay=0.1), {})
    assert matrices["weight_decay"] == 0.1 and all(p.ndim >= 2 for p in matrices["params"])
    assert vectors["weight_decay"] == 0.0 and all(p.ndim == 1 for p in vectors["params"])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert names_of(model, matrices) | names_of(model, vectors) == trained


@pytest.mark.parametrize("family", ["llama", "qwen2", "starcoder2", "gpt_oss"])
def test_biases_are_not_decayed_even_if_experts_stack_them_in_a_matrix(family: str):
    model = tiny_model(family)
    decaying, _ = parameter_groups(model, train_settings(weight_decay=0.1), {})
    biases = {name for name, _ in model.named_parameters() if name.endswith("bias")}
    assert biases and decaying["weight_decay"] == 0.1 and not biases & names_of(model, decaying)


def test_norms_of_heads_are_neither_decayed_nor_updated_by_muon():
    """The norms of queries and keys of Cohere have two dimensions: a scale for every head."""
    model, train = tiny_model("cohere", use_qk_norm=True), train_settings(optimizer="muon", weight_decay=0.1)
    norms = {name for name, _ in model.named_parameters() if "norm" in name}
    assert {model.get_parameter(name).ndim for name in norms} == {1, 2}
    matrices = matrices_of("pretrain", model, train, ())
    assert len(matrices) == 7 * len(model.model.layers) and not norms & matrices.keys()
    groups = parameter_groups(model, train, {}, matrices)
    decayed = set().union(*(names_of(model, group) for group in groups if group["weight_decay"]))
    assert decayed == {*matrices, "model.embed_tokens.weight"}


def test_roles_can_have_their_own_learning_rates(model: nn.Module, grown_dir: Path):
    train = train_settings(role_learning_rates={"o": 2.0, "down": 4.0})
    groups = parameter_groups(model, train, learning_rate_multiples("pretrain", model, train, grown_dir))
    by_multiple = {
        multiple: set().union(*(names_of(model, group) for group in groups if group[LR_MULTIPLE] == multiple))
        for multiple in (1.0, 2.0, 4.0)
    }
    assert by_multiple[2.0] == {f"model.layers.{layer}.self_attn.o_proj.weight" for layer in (1, 3)}
    assert by_multiple[4.0] == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (1, 3)}
    assert len(by_multiple[1.0]) == 2 * 7


@pytest.mark.parametrize(("family", "silent"), [("gemma2", -1.0), ("gemma3_text", -1.0), ("olmo2", 0.0)])
def test_blocks_that_norms_silence_learn_at_their_own_rates(family: str, silent: float, tmp_path: Path) -> None:
    """Two scales of layer 1, and the projections before them; none of the base's layers, or of the next stage."""
    model = tiny_model(family)
    layer = model.model.layers[1]
    scales = ("post_attention_layernorm", "post_feedforward_layernorm")
    inputs = (layer.self_attn.o_proj.in_features, layer.mlp.down_proj.in_features)
    for scale in scales:
        nn.init.constant_(getattr(layer, scale).weight, silent)
    model.save_pretrained(tmp_path)
    layers = [{"layer": i, "new": i == 1} for i in range(len(model.model.layers))]
    (tmp_path / "expansion.json").write_text(json.dumps({"layers": layers}))
    expected = {f"model.layers.1.{scale}.weight": 3 * math.sqrt(n) for scale, n in zip(scales, inputs, strict=True)}
    attention, mlp = expected
    o, down = "model.layers.1.self_attn.o_proj.weight", "model.layers.1.mlp.down_proj.weight"
    muon = learning_rate_multiples("pretrain", model, train_settings(optimizer="muon"), tmp_path)
    assert muon == pytest.approx(expected)
    expected |= {o: 10.0, down: 10.0}
    found = learning_rate_multiples("pretrain", model, train_settings(), tmp_path)
    assert found == pytest.approx(expected)
    train = train_settings(role_learning_rates={"mlp_output_norm": 3.0})
    multiples = learning_rate_multiples("pretrain", model, train, tmp_path)
    assert multiples[attention] == found[attention] and multiples[mlp] == 3.0  # the setting takes precedence
    groups = parameter_groups(model, train_settings(), found)
    (group,) = [group for group in groups if names_of(model, group) == {attention}]
    assert group[LR_MULTIPLE] == found[attention] and group["weight_decay"] == 0.0

    nn.init.constant_(layer.post_attention_layernorm.weight, silent + 0.01)
    model.save_pretrained(tmp_path)
    assert set(learning_rate_multiples("pretrain", model, train_settings(), tmp_path)) == {mlp, down}
    freeze.freeze_others(model, {attention})
    assert learning_rate_multiples("pretrain", model, train_settings(), tmp_path) == {}


def test_a_learning_rate_for_a_role_that_does_not_train_is_refused(model: nn.Module, grown_dir: Path):
    with pytest.raises(UserError, match="no trained parameter has this role") as error:
        learning_rate_multiples("sft", model, train_settings(role_learning_rates={"q_norm": 2.0}), grown_dir)
    assert error.value.setting == "sft.role_learning_rates" and error.value.value == "q_norm"


def test_the_base_has_its_own_rate_also_with_that_of_a_role(model: nn.Module, grown_dir: Path):
    freeze.freeze_others(model, {name for name, _ in model.named_parameters()})
    train = train_settings(base_learning_rate=2e-4, role_learning_rates={"o": 2.0})
    found = learning_rate_multiples("pretrain", model, train, grown_dir)
    assert found["model.embed_tokens.weight"] == found["model.layers.0.self_attn.q_proj.weight"] == 0.2
    assert found["model.layers.0.self_attn.o_proj.weight"] == 0.4
    assert found["model.layers.1.self_attn.o_proj.weight"] == 2.0
    assert "model.layers.1.self_attn.q_proj.weight" not in found


def test_a_rate_for_the_base_is_refused_if_only_new_layers_train(model: nn.Module, grown_dir: Path):
    with pytest.raises(UserError, match="only new layers train") as error:
        learning_rate_multiples("sft", model, train_settings(base_learning_rate=2e-4), grown_dir)
    assert error.value.setting == "sft.base_learning_rate"


@pytest.mark.parametrize("family", ["phi3", "gpt_neox", "gpt_oss", "qwen2_moe"])
def test_the_rates_of_parts_are_those_of_their_rows(family: str, tmp_path: Path):
    """The oracle writes every part's rate where the part is read for expansion, and no element is left out."""
    model = tiny_model(family)
    role = "q" if family in ("phi3", "gpt_neox") else "gate"
    found = learning_rate_multiples("pretrain", model, train_settings(role_learning_rates={role: 3.0}), tmp_path)
    parts = {name: multiple for name, multiple in found.items() if isinstance(multiple, tuple)}
    assert parts
    for name, multiple in parts.items():
        shape = model.get_parameter(name).shape
        values = multiples_of_elements(multiple, shape)
        if family == "gpt_neox":
            heads = values.flatten(1).view(4, 3, -1) if values.ndim > 1 else values.view(4, 3, -1)
            assert (heads[:, 0] == 3).all() and (heads[:, 1:] == 1).all()
        elif family == "gpt_oss":
            assert (values[..., ::2] == 3).all() and (values[..., 1::2] == 1).all()
        else:
            rows = {"phi3": 16, "qwen2_moe": shape[-2] // 2}[family]
            assert (values[..., :rows, :] == 3).all() and (values[..., rows:, :] == 1).all()


def test_a_step_equals_published_adamw():
    """Computes three steps of algorithm 2 of Loshchilov and Hutter (arXiv 1711.05101) by hand."""
    train = train_settings(learning_rate=0.01, beta1=0.9, beta2=0.95, epsilon=1e-8)
    weight = nn.Parameter(torch.tensor([[1.0, -2.0]], dtype=torch.float64))
    optimizer = make_optimizer([{"params": [weight], "weight_decay": 0.1}], train)
    assert optimizer.defaults["fused"]
    expected, first, second = [1.0, -2.0], [0.0, 0.0], [0.0, 0.0]
    for step, gradient in enumerate(([0.5, -0.1], [0.2, 0.3], [-0.4, 0.0]), start=1):
        weight.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        for i, g in enumerate(gradient):
            first[i] = 0.9 * first[i] + 0.1 * g
            second[i] = 0.95 * second[i] + 0.05 * g * g
            direction = (first[i] / (1 - 0.9**step)) / (math.sqrt(second[i] / (1 - 0.95**step)) + 1e-8)
            expected[i] -= 0.01 * (direction + 0.1 * expected[i])
        assert weight.tolist()[0] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
@pytest.mark.parametrize(("steps", "dtype"), [(3, torch.float32), (5, torch.float32), (5, torch.bfloat16)])
def test_orthogonalization_is_that_of_torch_which_computes_in_bfloat16(
    shape: tuple[int, int], steps: int, dtype: torch.dtype
):
    weight, gradient = nn.Parameter(torch.zeros(shape)), torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight.grad = gradient
    options = {"momentum": 0.0, "nesterov": False, "adjust_lr_fn": "match_rms_adamw", "ns_steps": steps}
    torch.optim.Muon([weight], lr=1.0, **options).step()
    ours = orthogonalized(gradient, NewtonSchulz(steps, dtype))
    assert (ours + weight.detach()).norm() < 0.02 * ours.norm()


def test_the_operations_of_orthogonalization_equal_those_of_the_counter_of_torch():
    with FlopCounterMode(display=False) as counter:
        orthogonalized(torch.randn(24, 40), NewtonSchulz(3, torch.float32))
    assert orthogonalization_flops(24, 40, 3) == orthogonalization_flops(40, 24, 3) == counter.get_total_flops()


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "gpt_neox"])
def test_muon_updates_every_matrix_of_a_layer_by_itself(family: str):
    """An orthogonal matrix [n, m] has n singular values near 1 (n ≤ m), a part of a larger one has smaller ones."""
    model = tiny_model(family)
    matrices = matrices_of("pretrain", model, train_settings(optimizer="muon"), ())
    assert not {name for name in matrices if "norm" in name or "embed" in name or "bias" in name or "router" in name}
    assert not {name for name in matrices if name.endswith("mlp.gate.weight")}
    fragments = locate({model.get_parameter(name): places for name, places in matrices.items()}, partitioned=False)
    for parameter, fragment in fragments.items():
        before = parameter.detach().clone()
        parameter.grad = torch.randn_like(parameter)
        muon_step(
            parameter,
            torch.zeros_like(parameter),
            [fragment],
            rate=0.5,
            weight_decay=0.0,
            iteration=NewtonSchulz(5, torch.float32),
        )
        for place in fragment.places:
            update = place.read(parameter.detach() - before) / 0.5
            mean_square = float(update.square().sum()) / min(update.shape) / (0.04 * max(update.shape))
            assert 0.6 < mean_square < 1.3, (fragment.shape, mean_square)
