"""OpT-DeUS (arXiv 2508.08011, algorithm 1): neighbors fused by optimal transport, with zeroed outputs.

The neurons of each matrix of the lower layer are aligned with those of the upper one, then the two are averaged:

    T_out = Sinkhorn(distances between the rows of W1 T_in and of W2),   fused = (T_out^T W1 T_in + W2) / 2

T_in is the transport that flows through the layer. It is the identity for matrices that read the layer's input, and, as
in the authors' code, for v -> o and up -> down. It is the attention output's plan T_o for gate and up, and (T_o + I) /
2 for the norm between them, which sees the residual path too. In models whose attention and MLP both read the layer's
input, no attention output flows into the MLP, and T_in is the identity there too. Experts are matrices like any other,
each fused with the expert of the same index, so a router's outputs keep their order.

The released code does not rescale a plan, whose entries sum to one, so its fused matrices are close to W2 / 2.
``rescale_plan`` makes the rows sum to one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

from pipeline.config.section import Positive, PositiveFloat
from pipeline.errors import UserError
from pipeline.expansion.layer_plan import LayerPlan
from pipeline.expansion.method import InsertionMethod, LayerWeights, NewTensor, Workspace, from_neighbors, silenced
from pipeline.models.families import LayerTensor, Role

if TYPE_CHECKING:
    from torch import Tensor

Solve = Callable[[LayerTensor, "Tensor", "Tensor"], "Tensor"]  # (which, W1 [n, d], W2 [n, d]) -> T [n, n]


class OptDeus(InsertionMethod):
    """Every new layer is the fusion of the two it lies between, with zeroed outputs."""

    title = "OpT-DeUS"
    source = "OpT-DeUS: Progressive Depth Up-scaling via Optimal Transport, arXiv 2508.08011"
    color = "#009e73"
    like_layers = "sources"
    needs_attention_and_mlp = True
    uses_gpu = True

    variant: str  # the preset that the values below come from; recorded, never read
    regularization: PositiveFloat  # Sinkhorn's entropic regularization
    max_iterations: Positive
    marginal_error: PositiveFloat  # L1; a solve with a smaller one has converged
    rescale_plan: bool  # make the rows of a plan sum to one before fusing
    solver: Literal["log", "pot_float32"]  # pot_float32 is the authors' own call, including its underflow

    @property
    def keeps_logits(self) -> bool:
        """Always: both blocks of a new layer add zero."""
        return True

    def check(self, num_base_layers: int) -> None:
        """Checks also that the package with the solver is installed."""
        super().check(num_base_layers)
        if self.solver == "pot_float32" and find_spec("ot") is None:
            raise UserError(
                setting="expand.solver",
                value=self.solver,
                rule="it calls the package POT, which is not installed",
                remedy="Install it with pip install -c constraints.txt pot, or set expand.solver=log.",
            )

    def new_tensors(self, base: Sequence[LayerWeights], plan: LayerPlan, work: Workspace) -> Iterator[NewTensor]:
        """Yields the fused layers, and records the outcome of every transport problem."""

        def make(layer: int, lower: LayerWeights, upper: LayerWeights) -> LayerWeights:
            def solve(tensor: LayerTensor, w1: Tensor, w2: Tensor) -> Tensor:
                return self.solve(w1, w2, f"layer {layer} {tensor.module}", work)

            return fuse(lower, upper, solve)

        # Outputs are silenced only here: further layers of the same gap are made from the fused ones.
        for layer, tensor, value in from_neighbors(base, plan, work, make):
            yield NewTensor(layer, tensor, silenced(tensor, value))
        _warn_about_unsolved(work)

    def solve(self, w1: Tensor, w2: Tensor, subject: str, work: Workspace) -> Tensor:
        """Solves one transport problem, and records its outcome under ``subject``.

        Args:
            w1: ``[n, d]``, the lower layer's matrix.
            w2: ``[n, d]``, the upper layer's matrix.

        Returns:
            The plan T ``[n, n]`` to fuse with.
        """
        from torch import cdist

        from pipeline.expansion.sinkhorn import sinkhorn_log, sinkhorn_pot

        sinkhorn = sinkhorn_log if self.solver == "log" else sinkhorn_pot
        solved = sinkhorn(cdist(w1, w2), self.regularization, self.max_iterations, self.marginal_error)
        work.record(
            subject,
            outcome=solved.outcome(self.marginal_error),
            marginal_error=solved.marginal_error,
            iterations=solved.iterations,
        )
        work.note(subject, marginal_error=solved.marginal_error)
        return solved.plan * len(w1) if self.rescale_plan else solved.plan


def _warn_about_unsolved(work: Workspace) -> None:
    from pipeline.expansion.sinkhorn import CONVERGED

    outcomes = Counter(facts["outcome"] for facts in work.records.values())
    for outcome, count in outcomes.items():
        if outcome != CONVERGED:
            work.warnings.append(f"{count} of {outcomes.total()} transport problems: {outcome}")


def fuse(lower: LayerWeights, upper: LayerWeights, solve: Solve) -> LayerWeights:
    """Returns all tensors of the layer between two, float32, with outputs not yet zeroed."""
    fused: dict[LayerTensor, Tensor] = {}
    (attention_output,) = (tensor for tensor in lower if _writes_attention(tensor.role))
    # The attention output comes first: its plan aligns the inputs of the MLP.
    t_o = _fuse_linear(fused, lower, upper, attention_output, solve, None)
    for tensor in lower:
        role = tensor.role
        if role.kind == "matrix" and tensor != attention_output:
            _fuse_linear(fused, lower, upper, tensor, solve, t_o if role.after_attention else None)
        elif role.kind not in ("matrix", "bias"):  # biases are fused with their matrices
            fused[tensor] = (_align_input(role, lower[tensor].float(), t_o) + upper[tensor].float()) / 2
    return fused


def _align_input(role: Role, w1: Tensor, t_o: Tensor) -> Tensor:
    """Aligns the input side of tensors without a plan: norms ``[n]``, sinks ``[n]``, routers ``[experts, n]``."""
    if role.kind == "norm" and role.after_attention:
        scale = w1 + role.offset  # gemma stores a scale of 1 + w
        return (scale @ t_o + scale) / 2 - role.offset
    return w1 @ t_o if role.kind == "router" and w1.dim() == 2 else w1


def _writes_attention(role: Role) -> bool:
    return role.kind == "matrix" and role.block == "attention" and role.side == "output"


def _fuse_linear(
    fused: dict[LayerTensor, Tensor],
    lower: LayerWeights,
    upper: LayerWeights,
    matrix: LayerTensor,
    solve: Solve,
    t_in: Tensor | None,
) -> Tensor:
    """Fuses a matrix ``[out, in]`` and its bias into ``fused``, and returns the plan ``[out, out]`` of both."""
    w1, w2 = lower[matrix].float(), upper[matrix].float()
    w1 = w1 if t_in is None else w1 @ t_in
    t_out = solve(matrix, w1, w2)
    fused[matrix] = (t_out.T @ w1 + w2) / 2
    for bias in lower:
        if bias.module == matrix.module and bias.role.kind == "bias":
            fused[bias] = (t_out.T @ lower[bias].float() + upper[bias].float()) / 2
    return t_out
