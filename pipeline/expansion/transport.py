"""Entropic optimal transport between the rows (output neurons) of two matrices, uniform marginals."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

CHECK_EVERY_ITERATIONS = 10
CONVERGED = "converged"


@dataclass(frozen=True)
class TransportPlan:
    """A solved plan.

    Attributes:
        plan: ``[n, m]``, float32; sums to one where the solve worked.
        iterations: Sinkhorn iterations taken; None where the solver does not say.
        marginal_error: L1 distance of the plan's row and column sums from uniform, the two added.
    """

    plan: Tensor
    iterations: int | None
    marginal_error: float

    def outcome(self, wanted_error: float) -> str:
        """How the solve ended, in a word or two."""
        if float(self.plan.sum()) < 0.5:
            return "underflow: the plan is zero"
        return CONVERGED if self.marginal_error <= wanted_error else "not converged"


def sinkhorn_log(cost: Tensor, regularization: float, max_iterations: int, marginal_error: float) -> TransportPlan:
    """Sinkhorn's iterations on the potentials, which cannot underflow (Peyre and Cuturi 2019, section 4.4).

    After each iteration the column sums are exact, so the error left is that of the row sums.
    """
    rows, columns = cost.shape
    scaled = cost / -regularization
    f, g = scaled.new_zeros(rows, 1), scaled.new_zeros(1, columns)
    iterations = 0
    while iterations < max_iterations:
        f = -math.log(rows) - torch.logsumexp(scaled + g, dim=1, keepdim=True)
        g = -math.log(columns) - torch.logsumexp(scaled + f, dim=0, keepdim=True)
        iterations += 1
        if iterations % CHECK_EVERY_ITERATIONS == 0 and _row_error(scaled, f, g) <= marginal_error:
            break
    plan = (scaled + f + g).exp()
    return TransportPlan(plan, iterations, _marginal_error(plan))


def _row_error(scaled: Tensor, f: Tensor, g: Tensor) -> float:
    row_sums = torch.logsumexp(scaled + f + g, dim=1).exp()
    return float((row_sums - 1 / len(row_sums)).abs().sum())


def sinkhorn_pot(cost: Tensor, regularization: float, max_iterations: int, marginal_error: float) -> TransportPlan:
    """The OpT-DeUS authors' own call: POT's plain Sinkhorn in float32.

    Where ``cost / regularization`` is above about 100 the kernel underflows, POT warns at iteration 0 and the plan
    is all zeros; that is reproduced here, and shows in the marginal error of 2.
    """
    import ot

    rows, columns = cost.shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what POT warns of is in the marginal error
        plan = ot.sinkhorn(
            torch.full((rows,), 1 / rows),
            torch.full((columns,), 1 / columns),
            cost.float(),
            regularization,
            numItermax=max_iterations,
            stopThr=marginal_error,
        )
    return TransportPlan(plan, None, _marginal_error(plan))


def _marginal_error(plan: Tensor) -> float:
    rows, columns = plan.shape
    row_error = (plan.sum(dim=1) - 1 / rows).abs().sum()
    return float(row_error + (plan.sum(dim=0) - 1 / columns).abs().sum())
