"""Measures the rate of matrix products: ``python -m scripts.benchmarks.matrix_rate cpu|cuda OUT.json [SIZE]``.

Without the size of the products, the best of several sizes is measured.
"""

from __future__ import annotations

import argparse
import os
from functools import partial
from pathlib import Path

import torch

from pipeline.files import write_json
from pipeline.models.matrix_products import matrix_rate
from pipeline.models.tensors import DTYPES
from pipeline.training.precision import BYTES


def best_matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Measures the best FLOP/s over square products of several sizes, each large enough to saturate the device."""
    sizes = (4096, 8192, 16384) if device.type == "cuda" else (1024, 2048, 3072)
    return max(matrix_rate(dtype, device, size, repeats=5) for size in sizes)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("device", type=torch.device)
    parser.add_argument("out", type=Path)
    parser.add_argument("size", type=int, nargs="?")
    options = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    measure = partial(matrix_rate, size=options.size) if options.size else best_matrix_rate
    write_json(options.out, {name: measure(DTYPES[name], options.device) for name in BYTES})
