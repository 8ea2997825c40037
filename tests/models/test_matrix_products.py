"""bfloat16 products on the float32 units are as accurate as the native ones, and used where they are faster."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from pipeline.models import loading, matrix_products
from pipeline.models.matrix_products import use_float32_products
from pipeline.training.attention import DOCUMENTS
from pipeline.training.batches import TokenIndices
from pipeline.training.loss import SummedLoss


@pytest.mark.parametrize("trains", [(True, True), (False, True), (True, False)], ids=["both", "input", "weight"])
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_are_exact_up_to_one_rounding(trains: tuple[bool, bool], bias: bool):
    torch.manual_seed(0)
    layer = nn.Linear(96, 40, bias=bias, dtype=torch.bfloat16)
    layer.weight.requires_grad_(trains[0])
    exact = copy.deepcopy(layer).double()
    x = torch.randn(2, 7, 96, dtype=torch.bfloat16, requires_grad=trains[1])
    wide = x.detach().double().requires_grad_(trains[1])
    use_float32_products(nn.ModuleList([layer]))
    grad = torch.randn(2, 7, 40, dtype=torch.bfloat16)
    layer(x).backward(grad)
    exact(wide).backward(grad.double())
    torch.testing.assert_close(layer(x).double(), exact(wide), rtol=2**-7, atol=1e-2)
    for mine, theirs in ((x.grad, wide.grad), (layer.weight.grad, exact.weight.grad)):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine.double(), theirs, rtol=2**-8, atol=1e-6)


def test_the_loss_of_a_model_equals_the_native_one_up_to_rounding(tiny_llama_dir: Path):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.bfloat16, attn_implementation=DOCUMENTS)
    ids = torch.randint(0, 384, (2, 48), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(48).repeat(2, 1)
    indices = TokenIndices.of(ids, positions, positions > 0)
    native = SummedLoss(model)(ids, positions, indices)
    use_float32_products(model.base_model.layers)
    ours = SummedLoss(model, float32_products=True)(ids, positions, indices)
    ours.backward()
    assert ours.dtype == torch.float32 and all(p.grad is not None for p in model.parameters())
    torch.testing.assert_close(ours, native, rtol=2e-3, atol=0.0)


def test_the_input_of_a_frozen_layer_is_not_saved():
    """As with torch's own layers, only tensors that a gradient needs are saved."""
    layer = nn.Linear(96, 40, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    use_float32_products(nn.ModuleList([layer]))
    stored: list[tuple[int, ...]] = []
    x = torch.randn(5, 96, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: stored.append(tuple(tensor.shape)) or tensor, id):
        layer(x)
    assert stored == [(40, 96)]


@pytest.mark.parametrize("bfloat16, expected", [(1e11, True), (1.9e11, False), (4e11, False)])
def test_float32_units_are_preferred_where_they_are_clearly_faster(
    monkeypatch: pytest.MonkeyPatch, bfloat16: float, expected: bool
):
    rates = {torch.bfloat16: bfloat16, torch.float32: 2e11}
    monkeypatch.setattr(matrix_products, "matrix_rate", lambda dtype, device, size: rates[dtype])
    assert matrix_products.prefers_float32_units() == expected


@pytest.mark.parametrize("prefers", [False, True])
def test_inference_computes_products_on_the_preferred_units(
    monkeypatch: pytest.MonkeyPatch, tiny_llama_dir: Path, prefers: bool
):
    monkeypatch.setattr(loading, "prefers_float32_units", lambda: prefers)
    ids = torch.arange(20)[None]
    model = loading.load_for_inference(tiny_llama_dir, torch.bfloat16, "cpu")
    assert (type(model.get_output_embeddings()) is nn.Linear) != prefers
    expected = loading.load_complete(tiny_llama_dir, torch.float32)(ids).logits
    logits = model(ids).logits
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), expected, rtol=2**-5, atol=2**-5)
    in_float32 = loading.load_for_inference(tiny_llama_dir, torch.float32, "cpu")(ids).logits
    assert torch.equal(in_float32, expected)
