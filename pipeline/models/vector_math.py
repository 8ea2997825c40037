"""First calls of MKL's vector functions, made one at a time before anything computes.

MKL 2024, which torch's x86 builds hold, chooses a function's kernel at its first call. Where several threads make that
call together, one of them may get the kernel of lowest accuracy for its whole share, silently and that once (pytorch
issue 188792). Seen here in the cosines of rotary positions: one resumed run in some seventy went on to other bits.
"""

from __future__ import annotations

import torch

# All of at::vml's that call MKL; each by its name in torch.
FUNCTIONS = (
    "acos", "asin", "atan", "cos", "erf", "erfc", "erfinv", "exp", "log", "log10", "log2", "sin", "sqrt", "tan",
    "tanh", "trunc",
)  # fmt: skip
FLOAT_DTYPES = (torch.float32, torch.float64)


def settle_vector_math() -> None:
    """Calls every function once, from this thread alone, as one entry is never shared out. Takes milliseconds."""
    for dtype in FLOAT_DTYPES:
        one = torch.ones(1, dtype=dtype)
        for name in FUNCTIONS:
            getattr(torch, name)(one)
