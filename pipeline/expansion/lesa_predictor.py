"""LESA's predictor G and its training (arXiv 2502.13794, section 3.2, with the loss of the authors' code)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from pipeline.expansion.methods.lesa import Lesa

WARMUP_FRACTION = 0.05  # of the steps of a cosine schedule
INITIALIZATION_SAMPLES = 4096  # on which first predictions are centered and scaled
TUNED_WIDTH = 576  # the d_in above which the learning rate of a standardized predictor decreases


class Predictor(nn.Sequential):
    """Linear(2 d_in -> hidden), ReLU, Linear(hidden -> hidden), ReLU, Linear(hidden -> d_in).

    Input ``[n, 2 d_in]``: the rows of the same singular direction in the lower and in the upper layer. Output
    ``[n, d_in]``: its row in the layer between them.
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
    def initialize_on(self, rows: Tensor, rank: int, samples: Tensor, seed: int) -> None:
        """Initializes for inputs of unit variance, so that first predictions are centered and as long as the targets.

        Weights are initialized as by He et al. (arXiv 1502.01852, eq. 10), then the last layer is fitted to some of the
        data (Krähenbühl et al., arXiv 1511.06856, section 3.1). In PyTorch's default initialization, random biases
        dominate inputs as small as the entries of singular vectors, so every direction gets nearly the same prediction.
        Most of that persists, because making the common part longer is the easiest way to reduce the norm term of the
        loss. A layer of such predictions has rank one and a spectral norm of up to ten times its neighbors'.

        Args:
            rows: V of all base layers, ``[layers * rank, d_in]``.
            rank: the number of singular directions of each layer.
            samples: indices into ``rows``; see ``_sample_indices``.
            seed: of the random weights and the choice of samples.
        """
        generator = torch.Generator().manual_seed(seed)
        *inner, last = (module for module in self if isinstance(module, nn.Linear))
        for linear in (*inner, last):
            gain = 1.0 if linear is last else 2.0  # ReLU halves the variance
            fresh = torch.randn(linear.weight.shape, generator=generator) * math.sqrt(gain / linear.in_features)
            linear.weight.copy_(fresh)
            linear.bias.zero_()
        some = samples[torch.randperm(len(samples), generator=generator)[:INITIALIZATION_SAMPLES]]
        inputs, target = _inputs_and_target(rows, rank, some, last.weight.device)
        first = self(inputs)
        # Subtracting the mean removes what all predictions have in common, so it must come before measuring the scale.
        mean = first.mean(dim=0)
        scale = torch.linalg.vector_norm(target) / torch.linalg.vector_norm(first - mean)
        last.weight.mul_(scale)
        last.bias.copy_(-mean * scale)


def prediction_loss(predicted: Tensor, target: Tensor, norm_loss_weight: float, norm_batch: int) -> Tensor:
    """Returns (1 - w) MSE(predicted, target) + w MSE(norms of predicted, norms of target), for ``[n, d_in]``.

    There is one norm per ``norm_batch`` directions (in the authors' code one per batch), so the weight of the norm term
    does not depend on the number of directions per step.
    """
    norm_error = _norms(predicted, norm_batch) - _norms(target, norm_batch)
    error = nn.functional.mse_loss(predicted, target)
    return (1 - norm_loss_weight) * error + norm_loss_weight * norm_error.square().mean()


def _norms(rows: Tensor, norm_batch: int) -> Tensor:
    """Returns the Frobenius norm of every ``norm_batch`` rows of ``[n, d]``."""
    if len(rows) <= norm_batch:
        return torch.linalg.vector_norm(rows).view(1)
    # Rows of zeros complete the last group without changing its norm.
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
    """Trains G on every direction of every layer that has two neighbors, in a new random order in each epoch.

    Batches are gathered from ``right`` itself, so inputs and targets need no additional memory.

    Args:
        predictor: trained in place, on its device.
        right: V of all base layers, ``[layers, rank, d_in]``. May be mapped from a file, and on another device.
        seed: of the order of the samples.
        note: called after each epoch with the completed steps, the total steps, and the epoch's mean loss.
        directions: the singular directions to learn from, a subset of ``range(rank)``. None for all.

    Returns:
        The mean loss of the last epoch.
    """
    rows = right.flatten(0, 1)
    samples = _sample_indices(right.shape[0], right.shape[1], directions)
    if settings.standardized:
        predictor.initialize_on(rows, right.shape[1], samples, seed)
    steps_per_epoch = -(-len(samples) // settings.batch_size)
    total = steps_per_epoch * settings.epochs
    optimizer, schedule = _optimizer(predictor, right.shape[2], settings, total)
    generator = torch.Generator().manual_seed(seed)
    mean_loss, done = float("nan"), 0
    for _ in range(settings.epochs):
        losses = []
        for batch in samples[torch.randperm(len(samples), generator=generator)].split(settings.batch_size):
            loss = _batch_loss(predictor, rows, right.shape[1], batch, settings)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
        done += len(losses)
        mean_loss = float(torch.stack(losses).mean())
        note(done, total, mean_loss)
    return mean_loss


def _sample_indices(layers: int, rank: int, directions: Tensor | None) -> Tensor:
    """Returns the indices of targets in the rows of all layers. The neighbors' rows are ``rank`` before and after."""
    inner = torch.arange(1, layers - 1)[:, None] * rank
    return (inner + (torch.arange(rank) if directions is None else directions)).flatten()


def _inputs_and_target(rows: Tensor, rank: int, samples: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns G's inputs ``[n, 2 d_in]`` and targets ``[n, d_in]`` for some rows of V_i, on ``device``."""
    samples = samples.to(rows.device)
    inputs = rows[torch.stack([samples - rank, samples + rank], dim=1)].view(len(samples), 2 * rows.shape[1])
    return inputs.to(device), rows[samples].to(device)


def _learning_rate_factor(schedule: str, step: int, total: int) -> float:
    """Returns the factor of the learning rate at a step."""
    if schedule == "constant":
        return 1.0
    warmup = (step + 1) / max(1.0, WARMUP_FRACTION * total)  # steps count from 0, so the first rate is above zero
    return min(1.0, warmup) * (1 + math.cos(math.pi * step / total)) / 2


def _optimizer(
    predictor: Predictor, d_in: int, settings: Lesa, total: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Returns the optimizer and the schedule of so many steps in total."""
    learning_rate = settings.learning_rate
    if settings.standardized:
        # The best learning rate of Adam is proportional to 1 / width (arXiv 2203.03466).
        learning_rate *= min(1.0, TUNED_WIDTH / d_in)
    optimizer = torch.optim.AdamW(
        predictor.parameters(), lr=learning_rate, weight_decay=settings.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _learning_rate_factor(settings.schedule, step, total)
    )
    return optimizer, schedule


def _batch_loss(predictor: Predictor, rows: Tensor, rank: int, samples: Tensor, settings: Lesa) -> Tensor:
    """Returns the loss on some samples, on the predictor's device."""
    inputs, targets = _inputs_and_target(rows, rank, samples, next(predictor.parameters()).device)
    return prediction_loss(predictor(inputs), targets, settings.norm_loss_weight, settings.norm_batch)
