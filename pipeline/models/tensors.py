"""Dtypes by name, the dtype and shape of a tensor before it is read or written, and the check for finite values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.launch.machine import bfloat16_flags

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}  # by their names in settings
SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
SAFETENSORS_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}

FINITE_CHUNK = 2**24  # elements checked at a time, which bounds the memory of the check


@dataclass(frozen=True)
class TensorSpec:
    """A tensor's dtype and shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()

    @property
    def bytes(self) -> int:
        """Size in bytes."""
        return self.numel * self.dtype.itemsize


def dtype_of(dtype: str, device: str) -> str:
    """Resolves ``auto`` for inference: bfloat16 on a GPU, and on a CPU that has instructions for it, else float32."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if device == "cuda" or bfloat16_flags() else "float32"


def is_finite(tensor: Tensor) -> bool:
    """Returns whether every element is finite, with memory for only one chunk of the tensor."""
    return all(bool(torch.isfinite(chunk).all()) for chunk in tensor.flatten().split(FINITE_CHUNK))
