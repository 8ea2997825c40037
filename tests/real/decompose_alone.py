"""Decomposes random matrices in a process of its own: ``python -m tests.real.decompose_alone WIDTH LAYERS DIRECTORY``.

V lies in a file of the directory, which has no name, so none is left. What was resident before any work is written
there, in bytes, as ``before``.
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
    """Matrices are ``[width, width]`` in bfloat16, drawn when they are read."""

    def read(layer: int) -> Tensor:
        return torch.randn(width, width, generator=torch.Generator().manual_seed(layer)).bfloat16()

    def scratch(shape: tuple[int, ...], device: torch.device) -> Tensor:
        room = torch.from_file(str(directory / "v"), shared=True, size=torch.Size(shape).numel()).view(shape)
        (directory / "v").unlink()
        return room

    (directory / "before").write_text(str(resident_bytes(os.getpid())))
    svd = decompose(read, layers, scratch)
    assert svd.rank == width


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
