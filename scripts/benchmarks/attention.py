"""Time of attention within packed documents on a CPU, forward and backward, in bfloat16.

    python -m scripts.benchmarks.attention [--rows 8] [--length 256] [--repeats 12]

With the heads of SmolLM2 (9 for queries, 3 for keys and values, 64 numbers each), on one thread. The lengths of
documents are drawn anew for every repeat, as in training, and are the same for all columns: ours; torch's
``scaled_dot_product_attention`` called for every document; and a single call of it with a mask over all pairs of
tokens, which is what transformers passes for packed documents.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from pipeline.training.attention import BOUNDS_KEYWORD, attend_by_document
from scripts.benchmarks.machine import machine

HEADS, KEY_HEADS, HEAD_SIZE = 9, 3, 64
MEAN_LENGTHS = (50, 100, 200, 400)
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """Returns the output of the pipeline's attention, [B, S, H, D]."""
    unused: Any = None
    return attend_by_document(unused, q, k, v, None, **{BOUNDS_KEYWORD: bounds})[0]


def by_document(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """Returns the output of torch's attention called for every document, [B, S, H, D]."""
    length = q.shape[2]
    parts = []
    for start, end in pairwise(bounds.tolist()):
        row, tokens = start // length, slice(start % length, start % length + end - start)
        part = (x[row : row + 1, :, tokens] for x in (q, k, v))
        parts.append(scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True)[0])
    return torch.cat(parts, dim=1).view(q.shape[1], q.shape[0], length, HEAD_SIZE).permute(1, 2, 0, 3)


def masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """Returns the output of torch's attention with a mask, [B, S, H, D]."""
    rows, length = q.shape[0], q.shape[2]
    document = torch.bucketize(torch.arange(rows * length), bounds, right=True).view(rows, 1, length)
    mask = (document[..., None] == document[..., None, :]) & torch.ones(length, length, dtype=torch.bool).tril()
    return scaled_dot_product_attention(q, k, v, mask, enable_gqa=True).transpose(1, 2)


def draw_bounds(generator: random.Random, rows: int, length: int, mean: float) -> torch.Tensor:
    """Returns the bounds of documents of exponentially distributed length, which end where a row does, [N + 1]."""
    bounds = set(range(0, rows * length + 1, length))
    end = 0
    while (end := end + 1 + int(generator.expovariate(1 / mean))) < rows * length:
        bounds.add(end)
    return torch.tensor(sorted(bounds), dtype=torch.int32)


def seconds(attend: Attend, inputs: list[torch.Tensor], every_bounds: list[torch.Tensor]) -> float:
    """Returns the mean time of a forward and a backward pass. The first pair warms up and is not counted."""
    total = 0.0
    for number, bounds in enumerate(every_bounds):
        started = time.perf_counter()
        torch.autograd.grad(attend(*inputs, bounds).float().sum(), inputs)
        total += (time.perf_counter() - started) * (number > 0)
    return total / (len(every_bounds) - 1)


def main() -> None:
    """Checks that all three agree, times them and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=12)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    generator = random.Random(0)
    inputs = [
        torch.randn(options.rows, heads, options.length, HEAD_SIZE, dtype=torch.bfloat16, requires_grad=True)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    ]
    print(f"{options.rows} x {options.length} tokens, ms per forward and backward pass. {machine('torch')}\n")
    print("| tokens per document | ours | by document | with a mask |\n|---:|---:|---:|---:|")
    for mean in MEAN_LENGTHS:
        every_bounds = [draw_bounds(generator, options.rows, options.length, mean) for _ in range(options.repeats + 1)]
        expected = masked(*inputs, every_bounds[0])
        for attend in (ours, by_document):
            torch.testing.assert_close(attend(*inputs, every_bounds[0]), expected, atol=0.02, rtol=0.02)
        tokens = options.rows * options.length * len(every_bounds) / sum(len(bounds) - 1 for bounds in every_bounds)
        own, *peers = (1000 * seconds(attend, inputs, every_bounds) for attend in (ours, by_document, masked))
        others = " | ".join(f"{peer:.1f} ({peer / own:.1f} times)" for peer in peers)
        print(f"| {tokens:.0f} | {own:.1f} | {others} |")


if __name__ == "__main__":
    main()
