"""What is known of a stored tensor: dtype, shape, where its bytes lie, and whether it holds numbers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

FINITE_AT_ONCE = 2**24  # entries that are looked at together

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """What is known of a tensor before it is read or written."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def entries(self) -> int:
        """How many numbers it holds."""
        return torch.Size(self.shape).numel()

    @property
    def bytes(self) -> int:
        """Its size in a file."""
        return self.entries * self.dtype.itemsize


@dataclass(frozen=True)
class StoredBytes:
    """Where a tensor begins in a file."""

    file: Path
    offset: int


def is_finite(tensor: Tensor) -> bool:
    """Whether every entry is; needs room for a small part of the tensor only."""
    return all(bool(torch.isfinite(part).all()) for part in tensor.flatten().split(FINITE_AT_ONCE))
