"""The number format of compute: bfloat16 where the hardware multiplies it natively, else float32."""

from __future__ import annotations

import time
from typing import Literal

import torch

from pipeline.training.processor import BFLOAT16_FLAGS, cpu_flags
from pipeline.training.sizes import Precision

DTYPES: dict[Precision, torch.dtype] = {"bfloat16": torch.bfloat16, "float32": torch.float32}


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
