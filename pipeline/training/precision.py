"""The number format of compute: bfloat16 where the hardware multiplies it natively, else float32."""

from __future__ import annotations

import time
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.functional import linear

from pipeline.training.sizes import BFLOAT16_FLAGS, Precision, cpu_flags


def resolve_precision(setting: Literal["auto", "bfloat16", "float32"], device: torch.device) -> Precision:
    """``auto`` by hardware; anything else is obeyed."""
    if setting != "auto":
        return setting
    native = (
        torch.cuda.is_bf16_supported(including_emulation=False)
        if device.type == "cuda"
        else bool(BFLOAT16_FLAGS & cpu_flags())
    )
    return "bfloat16" if native else "float32"


def matrix_rate(dtype: torch.dtype, device: torch.device, size: int = 1024, repeats: int = 3) -> float:
    """Floating-point operations a second of one square matrix product; best of ``repeats``."""
    left, right = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))  # zeros would cost less power
    seconds = []
    for _ in range(repeats + 1):  # the first one warms up and is the slowest
        _synchronize(device)
        started = time.perf_counter()
        left @ right
        _synchronize(device)
        seconds.append(time.perf_counter() - started)
    return float(2 * size**3 / min(seconds))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def best_matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """The denominator of FLOPs utilisation: the best rate over square products that fill this kind of device."""
    sizes = (4096, 8192, 16384) if device.type == "cuda" else (1024, 2048, 3072)
    return max(matrix_rate(dtype, device, size, repeats=5) for size in sizes)


def slow_bfloat16_note(section: str) -> str | None:
    """One line for CPUs whose bfloat16 instructions are there and slow; None where bfloat16 pays."""
    cpu = torch.device("cpu")
    bfloat16, float32 = (matrix_rate(dtype, cpu) / 1e9 for dtype in (torch.bfloat16, torch.float32))
    if bfloat16 >= float32:
        return None
    return (
        f"bfloat16 matrix products run at {bfloat16:.0f} GFLOP/s on this processor and float32 at {float32:.0f}; "
        f"{section}.precision=float32 would be faster, or {section}.float32_products=true in bfloat16"
    )


# --------------------------------------------------------------------------------------------------
# bfloat16 matrix products by the float32 units, for processors whose bfloat16 instructions are slow.
#
# Operands and results stay bfloat16, and sums are taken in float32
# as the bfloat16 instructions take them, so this is the
# same product in the same precision, only in another order of summation. Each operand costs one pass of conversion.
#
# Letters in shapes: M tokens, I inputs, O outputs.


class _Float32Product(torch.autograd.Function):
    """y_MO = x_MI w_OIᵀ."""

    @staticmethod
    def forward(x_MI: torch.Tensor, w_OI: torch.Tensor) -> torch.Tensor:
        return linear(x_MI.float(), w_OI.float()).to(x_MI.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
        x_MI, w_OI = inputs
        # Each is needed for the other's gradient only.
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
        """Input [..., I] in the weight's dtype, result [..., O]."""
        result: torch.Tensor = _Float32Product.apply(input.flatten(0, -2), self.weight)
        result = result.unflatten(0, input.shape[:-1])
        return result if self.bias is None else result + self.bias


def use_float32_products(layers: nn.ModuleList) -> None:
    """Changes the layers' linear maps in place; their parameters and names stay."""
    for module in layers.modules():
        if type(module) is nn.Linear:
            module.__class__ = _Linear
