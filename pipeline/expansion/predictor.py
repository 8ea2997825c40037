"""LESA's predictor G and its training (arXiv 2502.13794, section 3.2; loss as in the authors' code)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pipeline.config import LesaExpand


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


def prediction_loss(predicted: Tensor, target: Tensor, norm_loss_weight: float) -> Tensor:
    """(1-w) MSE(predicted, target) + w (|predicted| - |target|)^2, the norms over the whole batch ``[n, d_in]``."""
    norm_error = torch.linalg.vector_norm(predicted) - torch.linalg.vector_norm(target)
    return (1 - norm_loss_weight) * nn.functional.mse_loss(predicted, target) + norm_loss_weight * norm_error.square()


def train_predictor(
    predictor: Predictor, right: Tensor, settings: LesaExpand, seed: int, note: Callable[[int, float], None]
) -> float:
    """Teaches G every direction of every layer that has two neighbours, in a new random order each epoch.

    Batches are gathered from ``right`` itself, so that inputs and targets are never laid out beside it.

    Args:
        right: V of all base layers, ``[layers, rank, d_in]``.
        note: called after each epoch with its number and mean loss.

    Returns:
        The last epoch's mean loss.
    """
    layers, rank, d_in = right.shape
    rows = right.reshape(layers * rank, d_in)
    samples = torch.arange(rank, (layers - 1) * rank)  # the row of V_i; its neighbours' are rank rows away
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        predictor.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
    )
    mean_loss = float("nan")
    for epoch in range(settings.epochs):
        order = samples[torch.randperm(len(samples), generator=generator)]
        losses = []
        for target in order.split(settings.batch_size):
            inputs = rows[torch.stack([target - rank, target + rank], dim=1)].view(len(target), 2 * d_in)
            loss = prediction_loss(predictor(inputs), rows[target], settings.norm_loss_weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        mean_loss = float(torch.stack(losses).mean())
        note(epoch, mean_loss)
    return mean_loss
