"""Measures the rate of matrix products: ``python -m scripts.benchmarks.matrix_rate cpu|cuda OUT.json [SIZE]``.

Without the size of the products, the best of several sizes is measured.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

import torch

from pipeline.files import write_json
from pipeline.models.matrix_products import matrix_rate
from pipeline.models.tensors import DTYPES
from pipeline.training.mfu import best_matrix_rate
from pipeline.training.precision import BYTES

if __name__ == "__main__":
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    device = torch.device(sys.argv[1])
    measure = partial(matrix_rate, size=int(sys.argv[3])) if sys.argv[3:] else best_matrix_rate
    write_json(Path(sys.argv[2]), {name: measure(DTYPES[name], device) for name in BYTES})
