"""The exact thin SVD of all layers' matrices of one role side by side, without holding them side by side.

    W = [W_1 ... W_L] = U S V^T,  [d_out, L d_in];   W_i = U S V_i with V_i [rank, d_in]

U and S^2 are the eigenvectors and eigenvalues of W W^T = sum_i W_i W_i^T, ``[d_out, d_out]``, summed a layer at a
time in float64; then V_i = S^-1 U^T W_i. Seven SVDs of a 135M model take 4 s instead of 31. What is large, V, can lie
in a file: it is written once and read a batch of rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.expansion.method import Scratch, in_memory

COLUMNS_AT_ONCE = 2048  # of the Gram matrix


@dataclass(frozen=True)
class SharedSVD:
    """One role's factors, float32.

    Attributes:
        left: U S over ``scale``, ``[d_out, rank]``, singular values descending.
        right: V_i times ``scale`` of every base layer, ``[layers, rank, d_in]``.
    """

    left: Tensor
    right: Tensor
    scale: float = 1.0

    @property
    def d_out(self) -> int:
        """Rows of a layer's matrix."""
        return self.left.shape[0]

    @property
    def d_in(self) -> int:
        """Columns of a layer's matrix."""
        return self.right.shape[2]

    @property
    def rank(self) -> int:
        """Directions that are kept."""
        return self.left.shape[1]


def decompose(
    read: Callable[[int], Tensor], num_layers: int, scratch: Scratch = in_memory, standardized: bool = False
) -> SharedSVD:
    """The factors of ``read(0) ... read(num_layers - 1)``, each ``[d_out, d_in]`` and read twice.

    ``standardized``: a direction is a unit vector over all layers, so its entries have unit variance once they are
    multiplied by the square root of their number.

    Each left singular vector's largest entry is positive, because what is learnt from the factors depends on their
    signs. Directions with a singular value of numerically zero have no right vector and are left out. Holds at most
    four ``[d_out, d_out]`` matrices in float64, beside V where ``scratch`` gives memory.
    """
    values, vectors = _left_factors(read, num_layers)
    d_in = read(0).shape[1]
    scale = float(num_layers * d_in) ** 0.5 if standardized else 1.0
    left = (vectors * (values / scale)).float()
    to_right = vectors.div_(values / scale).T.float()  # [rank, d_out]; exact to 1e-6 at the conditions met in practice
    del vectors
    right = scratch((num_layers, len(values), d_in), left.device)
    for layer in range(num_layers):
        torch.mm(to_right, read(layer).float(), out=right[layer])
    return SharedSVD(left, right, scale)


def _left_factors(read: Callable[[int], Tensor], num_layers: int) -> tuple[Tensor, Tensor]:
    """Singular values, descending, ``[rank]``, and left singular vectors with fixed signs, ``[d_out, rank]``."""
    eigenvalues, vectors = torch.linalg.eigh(_lower_gram(read, num_layers))  # reads the lower triangle only
    kept = eigenvalues > eigenvalues[-1] * len(eigenvalues) * torch.finfo(torch.float64).eps
    first = len(eigenvalues) - int(kept.sum())  # they ascend
    vectors = vectors[:, first:].flip(1)
    lowest, highest = vectors.aminmax(dim=0)
    vectors *= torch.where(highest >= -lowest, 1.0, -1.0)
    return eigenvalues[first:].flip(0).sqrt(), vectors


def _lower_gram(read: Callable[[int], Tensor], num_layers: int) -> Tensor:
    """The lower triangle of sum_i W_i W_i^T, float64; what stands above it is of no use."""
    gram: Tensor | None = None
    for layer in range(num_layers):
        matrix = read(layer).double()
        if gram is None:
            gram = matrix.new_zeros(len(matrix), len(matrix))
        for start in range(0, len(matrix), COLUMNS_AT_ONCE):
            end = start + COLUMNS_AT_ONCE
            gram[start:, start:end].addmm_(matrix[start:], matrix[start:end].T)
    assert gram is not None, "a model has layers"
    return gram
