"""Reads checkpoints whose matrices are stored in FP8, one dequantized tensor at a time."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from pipeline.models.quantization import FP8, ScaledBlock, block_size, scales_of, without_scales
from pipeline.models.reading import ModelDirectory
from pipeline.models.tensors import SAFETENSORS_DTYPES


class Fp8Directory(ModelDirectory):
    """A model directory that multiplies matrices by their scales when it reads them, in float32.

    Attributes:
        specs: dtype, as stored, and shape of every tensor by name, without the scales.

    Raises:
        UserError: as for ``ModelDirectory``, or scales are missing or have another shape than the blocks.
    """

    dtypes = SAFETENSORS_DTYPES | {FP8: torch.float8_e4m3fn}

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        config = self.config
        self._block = block_size(config)
        quantized = [name for name, spec in self.specs.items() if spec.dtype == self.dtypes[FP8]]
        shapes = {name: spec.shape for name, spec in self.specs.items()}
        self._scales = scales_of(quantized, shapes, self._block, path)
        self.specs = {name: self.specs[name] for name in without_scales(self.specs, config)}

    def read(self, name: str) -> Tensor:
        """Reads one tensor in its stored dtype, or dequantized in float32."""
        stored = super().read(name)
        return dequantize(stored, super().read(self._scales[name]), self._block) if name in self._scales else stored


def dequantize(stored: Tensor, scales: Tensor, block: ScaledBlock | None) -> Tensor:
    """Multiplies every block of a matrix by its scale.

    Args:
        stored: [..., rows, columns].
        scales: one per block, [..., ceil(rows / block rows), ceil(columns / block columns)].
        block: rows and columns of a block. None if there is one scale for everything.

    Returns:
        [..., rows, columns] in float32.
    """
    values = stored.float()
    if block is None:
        return values.mul_(scales.float().reshape(()))
    rows, columns = stored.shape[-2:]
    along_rows = scales.float().repeat_interleave(block[0], dim=-2)[..., :rows, :]
    return values.mul_(along_rows.repeat_interleave(block[1], dim=-1)[..., :columns])
