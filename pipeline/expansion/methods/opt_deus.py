"""OpT-DeUS (arXiv 2508.08011, algorithm 1): neighbours fused by optimal transport, outputs at zero.

Each matrix of the lower layer has its neurons moved onto those of the upper one, then the two are averaged:

    T_out = Sinkhorn(distances between the rows of W1 T_in and of W2),   fused = (T_out^T W1 T_in + W2) / 2

T_in is the flow of transport through the layer: the identity for what reads the layer's input (and, as in the
authors' code, for v -> o and up -> down), the attention output's plan T_o for gate and up, and (T_o + I) / 2 for the
norm between, which sees the residual path too. Where attention and MLP both read the layer's input, no attention
output flows into the MLP, and T_in is the identity there too. Experts are matrices like others, each fused with the
expert of its index; so a router's outputs stay in their order.

The released code does not rescale a plan, which sums to one over all entries, so that its fused matrices are close to
W2 / 2; ``rescale_plan`` makes its rows sum to one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor, cdist

from pipeline.config import OptDeusExpand
from pipeline.expansion.layer_plan import LayerPlan
from pipeline.expansion.layers import Journal, Layer, NewTensor, grow, silenced
from pipeline.expansion.sinkhorn import CONVERGED, TransportPlan, sinkhorn_log, sinkhorn_pot
from pipeline.models.families import LayerTensor, Role

SOLVERS: dict[str, Callable[[Tensor, float, int, float], TransportPlan]] = {
    "log": sinkhorn_log,
    "pot_float32": sinkhorn_pot,
}
Solve = Callable[[LayerTensor, Tensor, Tensor], Tensor]  # (which, W1 [n, d], W2 [n, d]) -> T [n, n]


def expand(
    base: Sequence[Layer], plan: LayerPlan, settings: OptDeusExpand, seed: int, journal: Journal
) -> Iterator[NewTensor]:
    """Every new layer is its neighbours' fusion, silenced; how each transport problem ended is recorded."""

    def make(layer: int, lower: Layer, upper: Layer) -> Layer:
        def solve(tensor: LayerTensor, w1: Tensor, w2: Tensor) -> Tensor:
            return _solve(w1, w2, settings, f"layer {layer} {tensor.module}", journal)

        return fuse(lower, upper, solve)

    for layer, tensor, value in grow(base, plan, journal, make):
        yield NewTensor(layer, tensor, silenced(tensor, value))
    _warn_of_unsolved(journal)


def _warn_of_unsolved(journal: Journal) -> None:
    outcomes = Counter(facts["outcome"] for facts in journal.records.values())
    for outcome, count in outcomes.items():
        if outcome != CONVERGED:
            journal.warnings.append(f"{count} of {outcomes.total()} transport problems: {outcome}")


def _solve(w1: Tensor, w2: Tensor, settings: OptDeusExpand, name: str, journal: Journal) -> Tensor:
    """The plan ``[n, n]`` that fuses, after telling the journal how good it is."""
    solved = SOLVERS[settings.solver](
        cdist(w1, w2), settings.regularization, settings.max_iterations, settings.marginal_error
    )
    journal.record(
        name,
        outcome=solved.outcome(settings.marginal_error),
        marginal_error=solved.marginal_error,
        iterations=solved.iterations,
    )
    journal.note(name, marginal_error=solved.marginal_error)
    return solved.plan * len(w1) if settings.rescale_plan else solved.plan


def fuse(lower: Layer, upper: Layer, solve: Solve) -> Layer:
    """All tensors of the layer between two, float32, outputs not yet silenced."""
    fused: dict[LayerTensor, Tensor] = {}
    (attention_output,) = (tensor for tensor in lower if _writes_attention(tensor.role))
    t_o = _fuse_linear(fused, lower, upper, attention_output, solve, None)
    for tensor in lower:
        role = tensor.role
        if role.kind == "matrix" and tensor != attention_output:
            _fuse_linear(fused, lower, upper, tensor, solve, t_o if role.after_attention else None)
        elif role.kind not in ("matrix", "bias"):
            fused[tensor] = (_flow(role, lower[tensor].float(), t_o) + upper[tensor].float()) / 2
    return fused


def _flow(role: Role, w1: Tensor, t_o: Tensor) -> Tensor:
    """What has no plan of its own, its input side moved: norms ``[n]``, sinks ``[n]``, routers ``[experts, n]``."""
    if role.kind == "norm" and role.after_attention:
        scale = w1 + role.offset
        return (scale @ t_o + scale) / 2 - role.offset
    return w1 @ t_o if role.kind == "router" and w1.dim() == 2 else w1


def _writes_attention(role: Role) -> bool:
    return role.kind == "matrix" and role.block == "attention" and role.side == "output"


def _fuse_linear(
    fused: dict[LayerTensor, Tensor],
    lower: Layer,
    upper: Layer,
    matrix: LayerTensor,
    solve: Solve,
    t_in: Tensor | None,
) -> Tensor:
    """Fuses a matrix ``[out, in]``, and its bias by the same plan; returns the plan ``[out, out]``."""
    w1, w2 = lower[matrix].float(), upper[matrix].float()
    w1 = w1 if t_in is None else w1 @ t_in
    t_out = solve(matrix, w1, w2)
    fused[matrix] = (t_out.T @ w1 + w2) / 2
    for bias in lower:
        if bias.module == matrix.module and bias.role.kind == "bias":
            fused[bias] = (t_out.T @ lower[bias].float() + upper[bias].float()) / 2
    return t_out
