"""The model shapes used by the benchmarks, by name."""

from __future__ import annotations

# hidden size, intermediate size, layers, heads, key and value heads, head size, vocabulary, tied head
LLAMA = {
    "tiny": (64, 128, 4, 4, 2, 16, 49152, True),  # to check that the program runs
    "llama-3.2-1b": (2048, 8192, 16, 32, 8, 64, 128256, True),
    "llama-3-8b": (4096, 14336, 32, 32, 8, 128, 128256, False),
}
SHAPES = ("smollm2", *LLAMA)
