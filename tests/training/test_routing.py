"""The load-balancing loss and the statistics of routers equal naive ones; a collapsed router is found by its rule."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from pipeline.models.forward import packed_mask
from pipeline.training.batches import real_tokens
from pipeline.training.final_model import _collapse_warnings
from pipeline.training.freeze import decoder_layers
from pipeline.training.loop import Loop, Progress
from pipeline.training.routing import (
    COLLAPSED_STEPS,
    RouterStatistics,
    Routing,
    coefficient_of,
    routers_of,
)
from tests.tiny_families import tiny_model
from tests.training.naive_loop import naive_balance_loss
from tests.training.test_mixtures import FAMILIES

POSITIONS = torch.tensor([[*range(5), *range(7), *range(4)], [*range(16)]])  # the last 4 tokens of a row are padding
MASK = (POSITIONS > 0) & ~torch.tensor([[False] * 12 + [True] * 4, [False] * 16])
REAL = torch.tensor([[True] * 12 + [False] * 4, [True] * 16])


def forward(model: PreTrainedModel, ids: Tensor) -> Any:
    mask = packed_mask(model, POSITIONS)
    return model.base_model(input_ids=ids, position_ids=POSITIONS, attention_mask=mask, output_router_logits=True)


def test_a_last_document_without_targets_is_padding() -> None:
    assert torch.equal(real_tokens(POSITIONS, MASK), REAL)
    only = torch.arange(4)[None]
    assert not real_tokens(only, torch.zeros(1, 4, dtype=torch.bool)).any()
    assert real_tokens(only, torch.tensor([[False, False, False, True]])).all()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_loss_gradients_and_statistics_are_those_of_a_naive_computation(family: str, checkpointing: bool) -> None:
    """One router is frozen, and another one is not reported."""
    ids = torch.randint(3, 384, POSITIONS.shape, generator=torch.Generator().manual_seed(0))
    model = tiny_model(family, **FAMILIES[family]).train()
    routers = routers_of(model, decoder_layers(model))
    sparse = [1, 2, 3] if family == "qwen2_moe" else [0, 1, 2, 3]
    assert list(routers) == sparse
    for parameter in routers[2].parameters():
        parameter.requires_grad_(False)
    trained = [layer for layer in sparse if layer != 2]

    output = forward(model, ids)
    logits = dict(zip(sparse, output.router_logits, strict=True))
    expected = naive_balance_loss([logits[layer] for layer in trained], 2, POSITIONS, MASK)
    (output.last_hidden_state.square().mean() + 0.3 * expected).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.zero_grad()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    routing = Routing(routers, 0.3, reported=[2, 3])
    routing.prepare(REAL, 1 / REAL.sum())
    forward(model, ids).last_hidden_state.square().mean().backward()
    assert gradients.keys() == {name for name, p in model.named_parameters() if p.grad is not None}
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-7)

    sums, tokens = routing.observed().tolist(), float(REAL.sum())
    assert routing.loss(sums, tokens) == pytest.approx(expected.item(), rel=1e-5)
    found = routing.statistics(sums, tokens)
    assert list(found) == [2, 3]
    for layer, statistics in found.items():
        own = logits[layer][REAL.flatten()]
        counts = own.topk(2).indices.flatten().bincount(minlength=3)
        assert statistics.assignments == counts.tolist()
        assert statistics.load == pytest.approx((counts * 3 / (2 * tokens)).tolist())
        entropy = torch.distributions.Categorical(logits=own).entropy().mean() / torch.tensor(3.0).log()
        assert statistics.entropy == pytest.approx(entropy.item(), rel=1e-5)


def test_for_one_sequence_and_layer_the_loss_is_that_of_transformers() -> None:
    logits = torch.randn(16, 5, generator=torch.Generator().manual_seed(1))
    expected = load_balancing_loss_func((logits,), 5, 2, REAL[:1].float())
    assert naive_balance_loss([logits], 2, POSITIONS[:1], MASK[:1]).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_routers_of_all_families_are_found(family: str) -> None:
    model = tiny_model(family, **FAMILIES[family])
    names = {name.rpartition(".experts.")[0] for name, _ in model.named_parameters() if ".experts." in name}
    routers = routers_of(model, decoder_layers(model))
    assert len(routers) == len(names) > 0
    assert routers_of(tiny_model("llama"), decoder_layers(tiny_model("llama"))) == {}
    expected = {"mixtral": 0.001, "olmoe": 0.01, "deepseek_v3": 0.0, "qwen2_moe": 0.001}.get(family)
    assert expected is None or coefficient_of(None, model.config) == expected
    assert coefficient_of(0.25, model.config) == 0.25 and coefficient_of(0.0, model.config) == 0.0


def test_a_router_that_uses_as_few_experts_as_possible_for_some_steps_is_one_warning() -> None:
    spread, narrow = RouterStatistics([50.0, 30.0, 20.0], 50.0, 0.5), RouterStatistics([96.0, 1.0, 99.0], 98.0, 0.1)
    assert (spread.is_concentrated, narrow.is_concentrated) == (False, True)
    assert not RouterStatistics([98.0, 98.0], 98.0, 1.0).is_concentrated  # every token uses all experts
    loop = Loop.__new__(Loop)
    loop.progress = Progress()
    for step in range(1, 3 * COLLAPSED_STEPS):
        loop.progress.step = step
        loop._record_collapse("3", spread if step == COLLAPSED_STEPS - 1 else narrow)
        loop._record_collapse("1", spread)
        loop.progress = Progress(**json.loads(json.dumps(loop.progress.to_json())))  # as on resuming
    assert loop.progress.collapsed_routers == {"3": 2 * COLLAPSED_STEPS - 1}
    (warning,) = _collapse_warnings(loop.progress)
    assert "layers 3 (step 31)" in warning and "95%" in warning
    assert _collapse_warnings(Progress()) == []
