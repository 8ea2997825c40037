"""The parts of a plain training loop that tests compare with: all logits at once, and an explicit attention mask."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from pipeline.config import Train


def naive_batches(blocks_dir: Path, train: Train, corpus_dir: Path | None = None) -> Iterator[list[torch.Tensor]]:
    """Yields token ids, positions and loss mask of the global batch of every step, for the seed 0."""
    own = _naive_sequences(blocks_dir, [0], train.sequence_length)
    corpus = iter(()) if corpus_dir is None else _naive_sequences(corpus_dir, [0, 1], train.sequence_length)
    assert train.steps is not None
    taken, from_corpus = 0, 0
    for _ in range(train.steps):
        batch = []
        for _ in range(train.global_batch):
            taken += 1
            is_corpus = from_corpus < int(train.corpus_fraction * taken)
            from_corpus += is_corpus
            batch.append(next(corpus if is_corpus else own))
        yield [torch.tensor(array) for array in zip(*batch, strict=True)]


def _naive_sequences(directory: Path, seed: list[int], length: int) -> Iterator[list[list[int]]]:
    """Yields token ids, positions and loss mask of one sequence after another, epoch after epoch."""
    arrays = [np.load(directory / f"train.{name}.npy") for name in ("input_ids", "position_ids", "loss_mask")]
    sequences = []
    flat = [array.flatten().tolist() for array in arrays]
    for start in range(0, len(flat[0]) - length + 1, length):
        ids, positions, mask = (values[start : start + length] for values in flat)
        rest = next((i for i, position in enumerate(positions) if position == 0), length)
        positions[:rest] = range(rest)  # the rest of a document that was cut
        sequences.append([ids, positions, [0, *mask[1:]]])
    for epoch in itertools.count():
        for index in np.random.default_rng([*seed, epoch]).permutation(len(sequences)):
            yield sequences[index]


def naive_loss(model: torch.nn.Module, ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Returns the mean loss of the tokens in the mask."""
    documents = (positions == 0).cumsum(1)
    seen = (documents[:, :, None] == documents[:, None, :]).tril()
    bias = torch.zeros(seen.shape).masked_fill(~seen, -math.inf)[:, None]
    logits = model(input_ids=ids, position_ids=positions, attention_mask=bias, use_cache=False).logits
    tokens = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return (tokens * mask[:, 1:].flatten()).sum() / mask[:, 1:].sum()


def naive_balance_loss(
    router_logits: list[torch.Tensor], per_token: int, positions: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Returns the load-balancing loss of some routers, sequence by sequence, over tokens that are not padding.

    Args:
        router_logits: of every router, [batch * sequence, experts].
        per_token: experts per token, those with the largest logits.
        positions: [batch, sequence].
        mask: [batch, sequence], of the targets.
    """
    total, tokens = torch.zeros(()), 0
    for sequence, (places, targets) in enumerate(zip(positions.tolist(), mask.tolist(), strict=True)):
        last = len(places) - 1 - places[::-1].index(0)
        real = range(len(places) if any(targets[last:]) else last)
        tokens += len(real)
        for logits in router_logits:
            own = logits.view(len(positions), -1, logits.shape[-1])[sequence, list(real)]
            counts = torch.bincount(own.topk(per_token, dim=1).indices.flatten(), minlength=logits.shape[-1])
            balance = (counts / max(1, len(real)) * own.softmax(dim=1).sum(dim=0)).sum() * logits.shape[-1]
            total = total + balance / len(router_logits)
    return total / tokens


def naive_rate(step: int, steps: int, warmup: int) -> float:
    """Returns 1e-3 after a linear warm-up, then a cosine decay to a tenth."""
    if step <= warmup:
        return 1e-3 * step / warmup
    return 1e-3 * (0.1 + 0.9 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2)
