"""The parts of a plain training loop that tests compare with: all logits at once, and an explicit attention mask."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from pipeline.config import Train


def naive_batches(blocks_dir: Path, train: Train) -> Iterator[list[torch.Tensor]]:
    """Yields token ids, positions and loss mask of the global batch of every step, for the seed 0."""
    arrays = [np.load(blocks_dir / f"train.{name}.npy") for name in ("input_ids", "position_ids", "loss_mask")]
    assert train.steps is not None
    epochs = range(train.steps * train.global_batch)
    order = np.concatenate([np.random.default_rng([0, epoch]).permutation(len(arrays[0])) for epoch in epochs])
    for step in range(train.steps):
        chosen = order[step * train.global_batch : (step + 1) * train.global_batch]
        yield [torch.from_numpy(array[chosen].astype(np.int64)) for array in arrays]


def naive_loss(model: torch.nn.Module, ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Returns the mean loss of the tokens in the mask."""
    documents = (positions == 0).cumsum(1)
    seen = (documents[:, :, None] == documents[:, None, :]).tril()
    bias = torch.zeros(seen.shape).masked_fill(~seen, -math.inf)[:, None]
    logits = model(input_ids=ids, position_ids=positions, attention_mask=bias, use_cache=False).logits
    tokens = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return (tokens * mask[:, 1:].flatten()).sum() / mask[:, 1:].sum()


def naive_rate(step: int, steps: int, warmup: int) -> float:
    """Returns 1e-3 after a linear warm-up, then a cosine decay to a tenth."""
    if step <= warmup:
        return 1e-3 * step / warmup
    return 1e-3 * (0.1 + 0.9 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2)
