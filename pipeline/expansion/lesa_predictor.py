"""LESA's predictor G and its training (arXiv 2502.13794, section 3.2; loss as in the authors' code)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from pipeline.expansion.methods.lesa import Lesa

WARMUP_FRACTION = 0.05  # of the steps; of a cosine schedule
FITTED_DIRECTIONS = 4096  # that first predictions are centred and sized on
TUNED_WIDTH = 576  # the largest d_in at which a standardized predictor has its learning rate undiminished


class Predictor(nn.Sequential):
    """Linear(2 d_in -> hidden), ReLU, Linear(hidden -> hidden), ReLU, Linear(hidden -> d_in).

    Input ``[n, 2 d_in]``: the same singular direction's row in the lower and in the upper layer. Output ``[n, d_in]``.
    """

    def __init__(self, d_in: int, hidden_size: int, seed: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            super().__init__(
                nn.Linear(2 * d_in, hidden_size),
                nn.ReLU(),
                nn.Linear(hidden_size, hidden_size),
                nn.ReLU(),
                nn.Linear(hidden_size, d_in),
            )

    @torch.no_grad()
    def fit_first_predictions(self, rows: Tensor, rank: int, samples: Tensor, seed: int) -> None:
        """Starts from predictions without a common part and of the targets' size, for inputs of unit variance.

        Weights after He et al. (arXiv 1502.01852, eq. 10); the last layer's then fitted to some of the data
        (Krähenbühl et al., arXiv 1511.06856, section 3.1). PyTorch's own start hardly sees entries as small as those
        of singular vectors beside its random biases: every direction gets one and the same prediction, and since the
        norm in the loss is cheapest met by making that one longer, most of it stays. A layer of such predictions has
        rank one and a spectral norm of up to ten times its neighbours'.
        """
        generator = torch.Generator().manual_seed(seed)
        *inner, last = (module for module in self if isinstance(module, nn.Linear))
        for linear in (*inner, last):
            gain = 1.0 if linear is last else 2.0
            fresh = torch.randn(linear.weight.shape, generator=generator) * math.sqrt(gain / linear.in_features)
            linear.weight.copy_(fresh)
            linear.bias.zero_()
        some = samples[torch.randperm(len(samples), generator=generator)[:FITTED_DIRECTIONS]].to(rows.device)
        inputs, target = _inputs_and_target(rows, rank, some)
        first = self(inputs)
        common = first.mean(dim=0)
        size = torch.linalg.vector_norm(target) / torch.linalg.vector_norm(first - common)
        last.weight.mul_(size)
        last.bias.copy_(-common * size)


def prediction_loss(predicted: Tensor, target: Tensor, norm_loss_weight: float, norm_batch: int) -> Tensor:
    """(1-w) MSE(predicted, target) + w MSE(norms of predicted, norms of target), both ``[n, d_in]``.

    A norm is one number for ``norm_batch`` directions (the authors': for their whole batch), so that the weight of
    that term does not depend on how many directions a step sees.
    """
    norm_error = _norms(predicted, norm_batch) - _norms(target, norm_batch)
    error = nn.functional.mse_loss(predicted, target)
    return (1 - norm_loss_weight) * error + norm_loss_weight * norm_error.square().mean()


def _norms(rows: Tensor, norm_batch: int) -> Tensor:
    """``[n, d]`` to the Frobenius norms of ``norm_batch`` rows each, ``[n / norm_batch]`` rounded up."""
    if len(rows) <= norm_batch:
        return torch.linalg.vector_norm(rows).view(1)
    padded = nn.functional.pad(rows, (0, 0, 0, -len(rows) % norm_batch))
    return torch.linalg.vector_norm(padded.view(-1, norm_batch * rows.shape[1]), dim=1)


def train_predictor(
    predictor: Predictor,
    right: Tensor,
    settings: Lesa,
    seed: int,
    note: Callable[[int, int, float], None],
    directions: Tensor | None = None,
) -> float:
    """Teaches G every direction of every layer that has two neighbours, in a new random order each epoch.

    Batches are gathered from ``right`` itself, so that inputs and targets are never laid out beside it.

    Args:
        predictor: trained in place; on the device of ``right``.
        right: V of all base layers, ``[layers, rank, d_in]``; may be mapped from a file.
        note: called from time to time with the steps done, the steps in all, and the mean loss since the last call.
        directions: the singular directions to learn from, of ``range(rank)``; None for all.

    Returns:
        The last epoch's mean loss.
    """
    rows = right.flatten(0, 1)
    samples = _samples(right.shape[0], right.shape[1], directions)
    learning_rate = settings.learning_rate
    if settings.standardized:
        predictor.fit_first_predictions(rows, right.shape[1], samples, seed)
        learning_rate *= min(1.0, TUNED_WIDTH / right.shape[2])  # Adam's best is as one over the width (2203.03466)
    steps_per_epoch = -(-len(samples) // settings.batch_size)
    total = steps_per_epoch * settings.epochs
    optimizer = torch.optim.AdamW(
        predictor.parameters(), lr=learning_rate, weight_decay=settings.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(settings.schedule, step, total))
    mean_loss, done = float("nan"), 0
    for losses in _epochs(predictor, rows, right.shape[1], samples, settings, seed, optimizer, schedule):
        done += len(losses)
        mean_loss = float(torch.stack(losses).mean())
        note(done, total, mean_loss)
    return mean_loss


def _samples(layers: int, rank: int, directions: Tensor | None) -> Tensor:
    """Row numbers of V_i in the rows of all layers; its neighbours' are ``rank`` rows away."""
    inner = torch.arange(1, layers - 1)[:, None] * rank
    return (inner + (torch.arange(rank) if directions is None else directions)).flatten()


def _inputs_and_target(rows: Tensor, rank: int, samples: Tensor) -> tuple[Tensor, Tensor]:
    """What G is given for some rows of V_i, ``[n, 2 d_in]``, and what it is to say, ``[n, d_in]``."""
    inputs = rows[torch.stack([samples - rank, samples + rank], dim=1)].view(len(samples), 2 * rows.shape[1])
    return inputs, rows[samples]


def _rate(schedule: str, step: int, total: int) -> float:
    """The fraction of the learning rate at a step."""
    if schedule == "constant":
        return 1.0
    warm_up = (step + 1) / max(1.0, WARMUP_FRACTION * total)
    return min(1.0, warm_up) * (1 + math.cos(math.pi * step / total)) / 2


def _epochs(
    predictor: Predictor,
    rows: Tensor,
    rank: int,
    samples: Tensor,
    settings: Lesa,
    seed: int,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LambdaLR,
) -> Iterator[list[Tensor]]:
    """The losses of the steps of each epoch."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(settings.epochs):
        losses = []
        for target in samples[torch.randperm(len(samples), generator=generator)].split(settings.batch_size):
            inputs, known = _inputs_and_target(rows, rank, target.to(rows.device))
            loss = prediction_loss(predictor(inputs), known, settings.norm_loss_weight, settings.norm_batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
        yield losses
