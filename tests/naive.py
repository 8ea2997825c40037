"""Reference implementations of the methods' arithmetic, written as plainly as possible from their descriptions."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def svd_factors(matrices: list[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Returns the thin SVD of the matrices side by side, float64: U, S, and the block of V^T of each matrix.

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
    """Returns LESA's new matrix between two base layers.

    Args:
        layers_of_predictor: (weight, bias) pairs.
        scale: of the right singular vectors that the predictor reads and predicts.
    """
    left, values, right = svd_factors(matrices)
    hidden = torch.cat([right[lower], right[upper]], dim=1) * scale
    for index, (weight, bias) in enumerate(layers_of_predictor):
        hidden = hidden @ weight.double().T + bias.double()
        if index < len(layers_of_predictor) - 1:
            hidden = hidden.clamp(min=0)
    return left @ torch.diag(values) @ (hidden / scale)


def sinkhorn(cost: Tensor, regularization: float, iterations: int = 5000) -> Tensor:
    """Solves entropic optimal transport with uniform marginals by scaling exp(-cost / reg), float64."""
    n, m = cost.shape
    kernel = torch.exp(-cost.double() / regularization)
    assert bool((kernel > 0).all()), "this oracle underflows for such costs"
    u, v = torch.ones(n).double(), torch.ones(m).double()
    for _ in range(iterations):
        u = 1 / n / (kernel @ v)
        v = 1 / m / (kernel.T @ u)
    return u[:, None] * kernel * v[None, :]


def sinkhorn_in_logs(cost: Tensor, regularization: float, iterations: int) -> Tensor:
    """Solves the same with float64 potentials, for costs whose exponential underflows, in a number of iterations."""
    n, m = cost.shape
    scaled = -cost.double() / regularization
    f, g = torch.zeros(n).double(), torch.zeros(m).double()
    for _ in range(iterations):
        f = -torch.tensor(float(n)).log() - torch.logsumexp(scaled + g[None, :], dim=1)
        g = -torch.tensor(float(m)).log() - torch.logsumexp(scaled + f[:, None], dim=0)
    return torch.exp(f[:, None] + scaled + g[None, :])


def distances(first: Tensor, second: Tensor) -> Tensor:
    """Returns the Euclidean distance between every row of one matrix and every row of the other."""
    return torch.stack([(row - second).norm(dim=1) for row in first])


def fused_layer(
    lower: Mapping[str, Tensor], upper: Mapping[str, Tensor], iterations: Mapping[str, int], rescale: bool
) -> dict[str, Tensor]:
    """Returns OpT-DeUS's layer between two Llama layers, before outputs are zeroed, float64.

    Modules are in the order of the paper's appendix.

    Args:
        iterations: Sinkhorn iterations at the authors' regularization of 0.06, by module.
        rescale: whether the rows of a plan sum to one, as in the paper, or to 1 / n, as in the released code.
    """
    lower, upper = ({name: tensor.double() for name, tensor in layer.items()} for layer in (lower, upper))
    identity, plans = torch.eye(len(lower["input_layernorm.weight"])).double(), dict[str, Tensor]()

    def fuse(module: str, t_in: Tensor) -> None:
        w1, w2 = lower[f"{module}.weight"] @ t_in, upper[f"{module}.weight"]
        plan = sinkhorn_in_logs(distances(w1, w2), 0.06, iterations[module])
        plans[module] = plan * len(w1) if rescale else plan
        fused[f"{module}.weight"] = (plans[module].T @ w1 + w2) / 2
        if f"{module}.bias" in lower:
            fused[f"{module}.bias"] = (plans[module].T @ lower[f"{module}.bias"] + upper[f"{module}.bias"]) / 2

    before, after = "input_layernorm.weight", "post_attention_layernorm.weight"
    fused = {before: (lower[before] + upper[before]) / 2}
    for module in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"):
        fuse(module, t_in=identity)
    t_o = plans["self_attn.o_proj"]
    fused[after] = (lower[after] @ (0.5 * t_o + 0.5 * identity) + upper[after]) / 2
    for module in ("mlp.gate_proj", "mlp.up_proj"):
        fuse(module, t_in=t_o)
    fuse("mlp.down_proj", t_in=torch.eye(lower["mlp.down_proj.weight"].shape[1]).double())
    return fused


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    """Returns the relative difference in the Frobenius norm."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())
