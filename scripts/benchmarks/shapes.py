"""The model shapes used by the benchmarks, by name."""

from __future__ import annotations

# hidden size, intermediate size, layers, heads, key and value heads, head size, vocabulary, tied head
LLAMA = {
    "tiny": (64, 128, 4, 4, 2, 16, 1024, True),  # to check that programs run
    "llama-3.2-1b": (2048, 8192, 16, 32, 8, 64, 128256, True),
    "llama-3-8b": (4096, 14336, 32, 32, 8, 128, 128256, False),
}
SHAPES = ("smollm2", *LLAMA)
SMOLLM2_VOCABULARY = 49152


def tokens_of(shape: str) -> int:
    """Returns the number of tokens that random text is drawn from: those of SmolLM2 that the model has."""
    return min(SMOLLM2_VOCABULARY, LLAMA[shape][6]) if shape in LLAMA else SMOLLM2_VOCABULARY
