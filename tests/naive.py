"""The methods' arithmetic once more, written from their descriptions and as plainly as possible: the tests' oracles."""

from __future__ import annotations

import torch
from torch import Tensor


def svd_factors(matrices: list[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Thin SVD of the matrices side by side, float64: U, S, and the block of V^T of each matrix.

    The largest entry of each left singular vector is made positive, as the project fixes signs.
    """
    left, values, right = torch.linalg.svd(torch.cat([m.double() for m in matrices], dim=1), full_matrices=False)
    for k in range(left.shape[1]):
        if left[left[:, k].abs().argmax(), k] < 0:
            left[:, k] *= -1
            right[k] *= -1
    width = matrices[0].shape[1]
    return left, values, [right[:, i * width : (i + 1) * width] for i in range(len(matrices))]


def predicted_matrix(
    matrices: list[Tensor],
    lower: int,
    upper: int,
    layers_of_predictor: list[tuple[Tensor, Tensor]],
    scale: float = 1.0,
) -> Tensor:
    """LESA's new matrix between two base layers, given the (weight, bias) pairs of a predictor of scaled vectors."""
    left, values, right = svd_factors(matrices)
    hidden = torch.cat([right[lower], right[upper]], dim=1) * scale
    for index, (weight, bias) in enumerate(layers_of_predictor):
        hidden = hidden @ weight.double().T + bias.double()
        if index < len(layers_of_predictor) - 1:
            hidden = hidden.clamp(min=0)
    return left @ torch.diag(values) @ (hidden / scale)


def sinkhorn(cost: Tensor, regularization: float, iterations: int = 5000) -> Tensor:
    """Entropic optimal transport with uniform marginals: the textbook's scaling of exp(-cost / reg), float64."""
    n, m = cost.shape
    kernel = torch.exp(-cost.double() / regularization)
    assert bool((kernel > 0).all()), "too large a cost for this oracle"
    u, v = torch.ones(n).double(), torch.ones(m).double()
    for _ in range(iterations):
        u = 1 / n / (kernel @ v)
        v = 1 / m / (kernel.T @ u)
    return u[:, None] * kernel * v[None, :]


def sinkhorn_in_logs(cost: Tensor, regularization: float, iterations: int) -> Tensor:
    """The same for costs whose exponential would be zero: potentials in float64, that many iterations."""
    n, m = cost.shape
    scaled = -cost.double() / regularization
    f, g = torch.zeros(n).double(), torch.zeros(m).double()
    for _ in range(iterations):
        f = -torch.tensor(float(n)).log() - torch.logsumexp(scaled + g[None, :], dim=1)
        g = -torch.tensor(float(m)).log() - torch.logsumexp(scaled + f[:, None], dim=0)
    return torch.exp(f[:, None] + scaled + g[None, :])


def distances(first: Tensor, second: Tensor) -> Tensor:
    """Euclidean distance of every row of one matrix from every row of the other, pair by pair."""
    return torch.stack([torch.stack([(a - b).norm() for b in second]) for a in first])
