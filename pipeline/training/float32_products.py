"""Matrix products of bfloat16 tensors on the float32 units, for processors whose bfloat16 instructions are slow.

Operands and results stay bfloat16. Sums are accumulated in float32, as the bfloat16 instructions do, so the result
differs only by the order of summation. The cost is one conversion pass over each operand.

Shape suffixes: M tokens, I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear


class _Float32Product(torch.autograd.Function):
    """Computes y_MO = x_MI w_OIᵀ."""

    @staticmethod
    def forward(x_MI: torch.Tensor, w_OI: torch.Tensor) -> torch.Tensor:
        return linear(x_MI.float(), w_OI.float()).to(x_MI.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
        x_MI, w_OI = inputs
        # Each operand is only needed for the gradient of the other. Saving both would keep the activations of frozen
        # layers alive.
        ctx.save_for_backward(x_MI if ctx.needs_input_grad[1] else None, w_OI if ctx.needs_input_grad[0] else None)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_MI, w_OI = ctx.saved_tensors
        (grad,) = grad_outputs
        grad_MO = grad.float()
        dx_MI = None if w_OI is None else (grad_MO @ w_OI.float()).to(grad.dtype)
        dw_OI = None if x_MI is None else (grad_MO.T @ x_MI.float()).to(grad.dtype)
        return dx_MI, dw_OI


class _Linear(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Maps [..., I] in the weight's dtype to [..., O]."""
        result: torch.Tensor = _Float32Product.apply(input.flatten(0, -2), self.weight)
        result = result.unflatten(0, input.shape[:-1])
        return result if self.bias is None else result + self.bias


def use_float32_products(layers: nn.ModuleList) -> None:
    """Switches the linear layers inside ``layers`` to float32 products, in place. Parameters keep their names."""
    for module in layers.modules():
        if type(module) is nn.Linear:  # subclasses have their own forward pass
            module.__class__ = _Linear
