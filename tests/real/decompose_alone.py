"""Decomposes random matrices in a separate process: ``python -m tests.real.decompose_alone WIDTH LAYERS DIRECTORY``.

V is in an unnamed file in the directory. The resident memory before the decomposition is written to the file ``before``
there, in bytes.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import Tensor

from pipeline.expansion.svd import decompose
from scripts.benchmarks.processes import resident_bytes


def main(width: int, layers: int, directory: Path) -> None:
    """Decomposes bfloat16 matrices ``[width, width]``, which are generated when they are read."""

    def read(layer: int) -> Tensor:
        return torch.randn(width, width, generator=torch.Generator().manual_seed(layer)).bfloat16()

    def scratch(shape: tuple[int, ...], device: torch.device) -> Tensor:
        tensor = torch.from_file(str(directory / "v"), shared=True, size=torch.Size(shape).numel()).view(shape)
        (directory / "v").unlink()
        return tensor

    (directory / "before").write_text(str(resident_bytes(os.getpid())))
    svd = decompose(read, layers, scratch)
    assert svd.rank == width


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
