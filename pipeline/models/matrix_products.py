"""The speed of matrix products, and products of bfloat16 tensors on the float32 units of a CPU.

The latter are for processors whose bfloat16 instructions are slow or missing. Operands and results stay bfloat16. Sums
are accumulated in float32, as the bfloat16 instructions do, so the result differs only by the order of summation. The
cost is one conversion pass over each operand.

Shape suffixes: M tokens, I inputs, O outputs.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

MEASURED_SECONDS = 0.5  # some processors take a second for one product in bfloat16
# By how much float32 products must be faster than bfloat16 ones to make up for the conversion of operands. No known
# processor is near this limit, so that measuring again after an interruption gives the same answer.
CONVERSION_COST = 1.25


def matrix_rate(dtype: torch.dtype, device: torch.device, size: int = 1024, repeats: int = 3) -> float:
    """Measures the FLOP/s of one square matrix product, as the best of ``repeats`` runs, or of fewer if it is slow."""
    left, right = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))  # zeros would draw less power
    seconds: list[float] = []
    while len(seconds) <= repeats and sum(seconds) < MEASURED_SECONDS:  # the first run is a warm-up
        synchronize(device)
        started = time.perf_counter()
        left @ right
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return float(2 * size**3 / min(seconds))


def synchronize(device: torch.device) -> None:
    """Waits until the device has computed everything. CPUs compute immediately."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def prefers_float32_units() -> bool:
    """Measures whether this processor multiplies bfloat16 matrices faster on its float32 units."""
    cpu = torch.device("cpu")
    bfloat16, float32 = (matrix_rate(dtype, cpu, size=512) for dtype in (torch.bfloat16, torch.float32))
    return float32 > CONVERSION_COST * bfloat16


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


def use_float32_products(model: nn.Module) -> None:
    """Switches the linear layers inside ``model`` to float32 products, in place. Parameters keep their names."""
    for module in model.modules():
        if type(module) is nn.Linear:  # subclasses have their own forward pass
            module.__class__ = _Linear
