"""Entropic optimal transport between the rows (output neurons) of two matrices, uniform marginals."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 2048  # rows or columns whose logarithms of sums are taken at once
LARGEST_SCALING = 1e6  # a float32 has 32 more decimal places before a product with it underflows
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
    """Sinkhorn's iterations on potentials that cannot underflow, mostly carried out as matrix-vector products.

    One iteration on the potentials f and g in logarithms (Peyre and Cuturi 2019, section 4.4) puts every row and
    column sum of K = exp(f + g - cost / reg) within a float's range, so that the iterations that follow can scale K's
    rows and columns, which is the same arithmetic at a tenth of the cost. Once a scaling has grown large it goes into
    the potentials and a new K is made (Schmitzer 2019, section 3.1). After each iteration the column sums are exact,
    so the error left is that of the row sums.
    """
    rows, columns = cost.shape
    scaled = cost / -regularization
    del cost  # nobody else holds a large one
    g = scaled.new_zeros(1, columns)
    iterations, converged = 0, False
    while not converged:
        f = -math.log(rows) - _log_sums(scaled, g, dim=1)
        g = -math.log(columns) - _log_sums(scaled, f, dim=0)
        kernel = torch.add(scaled, f).add_(g).exp_()
        scaling = _scale(kernel, max_iterations - iterations - 1, marginal_error)
        iterations += 1 + scaling.iterations
        converged = scaling.finished
        g = g + scaling.columns.log()
    plan = kernel.mul_(scaling.rows[:, None]).mul_(scaling.columns)
    return TransportPlan(plan, iterations, _marginal_error(plan))


def _log_sums(scaled: Tensor, potential: Tensor, dim: int) -> Tensor:
    """logsumexp of ``scaled + potential`` over one dimension, a block of the other at a time."""
    other = 1 - dim
    blocks = scaled.split(BLOCK, dim=other)
    return torch.cat([torch.logsumexp(block + potential, dim=dim, keepdim=True) for block in blocks], dim=other)


@dataclass(frozen=True)
class _Scaling:
    """How a kernel's rows ``[n]`` and columns ``[m]`` are to be multiplied."""

    rows: Tensor
    columns: Tensor
    iterations: int
    finished: bool  # converged, or no iterations are left


def _scale(kernel: Tensor, max_iterations: int, marginal_error: float) -> _Scaling:
    """Sinkhorn's plain iterations until the row sums are right, none are left, or a scaling leaves its range."""
    wanted_row, wanted_column = 1 / kernel.shape[0], 1 / kernel.shape[1]
    u, v = kernel.new_ones(kernel.shape[0]), kernel.new_ones(kernel.shape[1])
    for iteration in range(max_iterations + 1):
        row_sums = kernel @ v
        error = float((u * row_sums - wanted_row).abs().sum())
        if error <= marginal_error or iteration == max_iterations:
            return _Scaling(u, v, iteration, finished=True)
        next_u = wanted_row / row_sums
        next_v = wanted_column / (kernel.T @ next_u)
        if not (_in_range(next_u) and _in_range(next_v)):
            return _Scaling(u, v, iteration, finished=False)
        u, v = next_u, next_v
    raise AssertionError("the last iteration returns")


def _in_range(scaling: Tensor) -> bool:
    lowest, highest = (float(bound) for bound in scaling.aminmax())
    return lowest >= 1 / LARGEST_SCALING and highest <= LARGEST_SCALING  # not so for NaN and infinity either


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
