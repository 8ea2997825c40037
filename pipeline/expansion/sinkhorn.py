"""Entropic optimal transport between the rows (output neurons) of two matrices, with uniform marginals.

For a cost C ``[n, m]`` it is the plan T that minimizes sum(T * C) - reg * entropy(T) among those whose rows sum to 1/n
and whose columns sum to 1/m (Cuturi, arXiv 1306.0895). T = diag(u) K diag(v) with K = exp(-C / reg).
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_ROWS = 2048  # rows or columns per logsumexp, which needs a copy of them
LARGEST_SCALING = 1e6  # of u and v; float32 leaves 32 decimal orders of magnitude to products with them
FLOAT32_ERROR = 1e-5  # marginal errors of converged plans are 1e-7 to 1e-6, from rounding alone
CONVERGED = "converged"


@dataclass(frozen=True)
class TransportPlan:
    """The solution of a transport problem.

    Attributes:
        plan: ``[n, m]``, float32. Its entries sum to one, unless the solver underflowed.
        iterations: the number of Sinkhorn iterations, or None if the solver does not report it.
        marginal_error: the L1 distance of the row sums from uniform, plus that of the column sums.
    """

    plan: Tensor
    iterations: int | None
    marginal_error: float

    def outcome(self, tolerance: float) -> str:
        """Describes how the solve ended, given the marginal error at which it counts as converged.

        The authors' tolerance of 1e-9 is below the rounding of float32, so ``FLOAT32_ERROR`` counts as converged too.
        """
        if float(self.plan.sum()) < 0.5:
            return "underflow: the plan is zero"
        return CONVERGED if self.marginal_error <= max(tolerance, FLOAT32_ERROR) else "not converged"


def sinkhorn_log(cost: Tensor, regularization: float, max_iterations: int, marginal_error: float) -> TransportPlan:
    """Solves with Sinkhorn iterations on potentials, which cannot underflow, mostly as matrix-vector products.

    One iteration on the potentials f and g in the log domain (Peyré and Cuturi 2019, section 4.4) brings every row and
    column sum of K = exp(f + g - cost / reg) into the range of a float. The iterations that follow can then scale the
    rows and columns of K, which is the same arithmetic at a tenth of the cost. When a scaling has grown large, it is
    absorbed into the potentials and K is recomputed (Schmitzer 2019, section 3.1). After each iteration the column sums
    are exact, so the remaining error is that of the row sums.

    Args:
        cost: ``[n, m]``, float32.
        regularization: the weight of the entropy.
        max_iterations: stop after this many iterations.
        marginal_error: stop when the L1 error of the row sums is at most this.
    """
    rows, columns = cost.shape
    scaled = cost / -regularization
    del cost  # frees it if the caller holds no reference
    g = scaled.new_zeros(1, columns)
    iterations, finished = 0, False
    while not finished:
        # One iteration in the log domain. f and g are divided by the regularization; -log(rows) is log(1 / rows).
        f = -math.log(rows) - _log_sums(scaled, g, dim=1)
        g = -math.log(columns) - _log_sums(scaled, f, dim=0)
        kernel = torch.add(scaled, f).add_(g).exp_()
        scaling = _scale(kernel, max_iterations - iterations - 1, marginal_error)
        iterations += 1 + scaling.iterations
        finished = scaling.finished
        g = g + scaling.columns.log()  # f follows from g at the start of the next round
    plan = kernel.mul_(scaling.rows[:, None]).mul_(scaling.columns)
    return TransportPlan(plan, iterations, _marginal_error(plan))


def _log_sums(scaled: Tensor, potential: Tensor, dim: int) -> Tensor:
    """Returns logsumexp of ``scaled + potential`` over ``dim``, one block of the other dimension at a time."""
    other = 1 - dim
    blocks = scaled.split(BLOCK_ROWS, dim=other)
    return torch.cat([torch.logsumexp(block + potential, dim=dim, keepdim=True) for block in blocks], dim=other)


@dataclass(frozen=True)
class _Scaling:
    """Factors for the rows ``[n]`` and columns ``[m]`` of a kernel."""

    rows: Tensor
    columns: Tensor
    iterations: int
    finished: bool  # converged, or the iterations are used up


def _scale(kernel: Tensor, max_iterations: int, marginal_error: float) -> _Scaling:
    """Runs plain Sinkhorn iterations until they converge, are used up, or a scaling becomes too large or too small."""
    row_sum, column_sum = 1 / kernel.shape[0], 1 / kernel.shape[1]
    u, v = kernel.new_ones(kernel.shape[0]), kernel.new_ones(kernel.shape[1])
    for iteration in range(max_iterations + 1):
        # diag(u) K diag(v) has the row sums u * (K v). Its column sums are exact after the previous update of v.
        row_sums = kernel @ v
        error = float((u * row_sums - row_sum).abs().sum())
        if error <= marginal_error or iteration == max_iterations:
            return _Scaling(u, v, iteration, finished=True)
        next_u = row_sum / row_sums
        next_v = column_sum / (kernel.T @ next_u)
        if not (_in_range(next_u) and _in_range(next_v)):
            return _Scaling(u, v, iteration, finished=False)  # the last scalings in range; the caller absorbs them
        u, v = next_u, next_v
    raise AssertionError("the last iteration returns")


def _in_range(scaling: Tensor) -> bool:
    lowest, highest = (float(bound) for bound in scaling.aminmax())
    return lowest >= 1 / LARGEST_SCALING and highest <= LARGEST_SCALING  # false for NaN and infinity too


def sinkhorn_pot(cost: Tensor, regularization: float, max_iterations: int, marginal_error: float) -> TransportPlan:
    """Solves as the authors of OpT-DeUS do, with POT's plain Sinkhorn in float32. See ``sinkhorn_log`` for arguments.

    Where ``cost / regularization`` is above about 100, the kernel underflows, POT warns at iteration 0, and the plan is
    all zeros. That is reproduced here and visible as a marginal error of 2.
    """
    import ot

    rows, columns = cost.shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the marginal error reports the same
        plan = ot.sinkhorn(
            torch.full((rows,), 1 / rows, device=cost.device),
            torch.full((columns,), 1 / columns, device=cost.device),
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
