"""Makes the first calls of MKL's vector functions one at a time, before anything else computes.

MKL 2024, which torch's x86 builds contain, selects the kernel of a function at its first call. If several threads make
that call at the same time, one of them may silently get the kernel of lowest accuracy for its part of that one call
(pytorch issue 188792). It was observed in the cosines of rotary embeddings: about one resumed run in seventy was not
bit-identical to the uninterrupted one.
"""

from __future__ import annotations

import torch

# All functions of at::vml that call MKL, by their names in torch.
FUNCTIONS = (
    "acos", "asin", "atan", "cos", "erf", "erfc", "erfinv", "exp", "log", "log10", "log2", "sin", "sqrt", "tan",
    "tanh", "trunc",
)  # fmt: skip
FLOAT_DTYPES = (torch.float32, torch.float64)


def initialize_vector_math() -> None:
    """Calls every function once, which takes milliseconds.

    A tensor of one element is never divided among threads, so only the calling thread calls MKL.
    """
    for dtype in FLOAT_DTYPES:
        one = torch.ones(1, dtype=dtype)
        for name in FUNCTIONS:
            getattr(torch, name)(one)
