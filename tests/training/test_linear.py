"""bfloat16 products by the float32 units: as exact as the native ones, on the same operands."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pipeline.training.linear import use_float32_products


@pytest.mark.parametrize("trains", [(True, True), (False, True), (True, False)], ids=["both", "input", "weight"])
@pytest.mark.parametrize("bias", [False, True])
def test_value_and_gradients_are_the_exact_ones_rounded_once(trains: tuple[bool, bool], bias: bool):
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


def test_a_frozen_weight_keeps_no_input_alive():
    """As in torch's own: below and inside frozen layers only what the gradient needs is stored."""
    layer = nn.Linear(96, 40, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    use_float32_products(nn.ModuleList([layer]))
    stored: list[tuple[int, ...]] = []
    x = torch.randn(5, 96, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: stored.append(tuple(tensor.shape)) or tensor, id):
        layer(x)
    assert stored == [(40, 96)]
