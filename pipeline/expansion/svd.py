"""The exact thin SVD of all layers' matrices of one role side by side, without holding them side by side.

    W = [W_1 ... W_L] = U S V^T,  [d_out, L d_in];   W_i = U S V_i with V_i [rank, d_in]

U and S^2 are the eigenvectors and eigenvalues of W W^T = sum_i W_i W_i^T, ``[d_out, d_out]``, which is summed one layer
at a time in float64. Then V_i = S^-1 U^T W_i. The seven SVDs of a 135M model take 4 s instead of 31 s. V,
the largest tensor, can be in a file, even if a GPU computes: it is written once and read one batch of rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.expansion.method import Scratch, in_memory

BLOCK_COLUMNS = 2048  # of the Gram matrix, per matrix product


@dataclass(frozen=True)
class SharedSVD:
    """The SVD that one role's matrices of all layers share, float32.

    Attributes:
        left: U S divided by ``scale``, ``[d_out, rank]``, with descending singular values.
        right: V_i multiplied by ``scale`` of every base layer, ``[layers, rank, d_in]``. May be on the CPU while
            ``left`` is on a GPU.
        scale: 1, or what gives the entries of ``right`` unit variance.
    """

    left: Tensor
    right: Tensor
    scale: float = 1.0

    @property
    def d_out(self) -> int:
        """The number of rows of a layer's matrix."""
        return self.left.shape[0]

    @property
    def d_in(self) -> int:
        """The number of columns of a layer's matrix."""
        return self.right.shape[2]

    @property
    def rank(self) -> int:
        """The number of singular directions."""
        return self.left.shape[1]

    def right_of(self, layer: int) -> Tensor:
        """Returns ``right`` of one base layer on the device of ``left``, ``[rank, d_in]``."""
        return self.right[layer].to(self.left.device)


def decompose(
    read: Callable[[int], Tensor], num_layers: int, scratch: Scratch = in_memory, standardized: bool = False
) -> SharedSVD:
    """Decomposes the matrices ``read(0) ... read(num_layers - 1)``, each ``[d_out, d_in]`` and read twice.

    The largest entry of each left singular vector is positive, because what is learned from the factors depends on
    their signs. Directions whose singular value is numerically zero have no right vector and are dropped. At most four
    ``[d_out, d_out]`` matrices in float64 are held, and V where ``scratch`` allocates memory.

    Args:
        scratch: allocates V.
        standardized: whether the entries of ``right`` get unit variance. A right singular vector is a unit vector over
            all layers, so it is multiplied by the square root of its length.
    """
    values, vectors = _left_factors(read, num_layers)
    d_in = read(0).shape[1]
    scale = float(num_layers * d_in) ** 0.5 if standardized else 1.0
    left = (vectors * (values / scale)).float()  # U S / scale; the division is undone in ``right``
    # [rank, d_out]; float32 is exact to 1e-6 at the condition numbers met in practice.
    to_right = vectors.div_(values / scale).T.float()
    del vectors  # the largest float64 matrix, no longer needed
    right = scratch((num_layers, len(values), d_in), left.device)
    for layer in range(num_layers):
        right[layer].copy_(to_right @ read(layer).float())
    return SharedSVD(left, right, scale)


def _left_factors(read: Callable[[int], Tensor], num_layers: int) -> tuple[Tensor, Tensor]:
    """Returns singular values ``[rank]``, descending, and left singular vectors ``[d_out, rank]`` with fixed signs."""
    eigenvalues, vectors = torch.linalg.eigh(_lower_gram(read, num_layers))  # reads only the lower triangle
    # Eigenvalues are squared singular values, which float64 resolves to about n * eps of the largest one.
    kept = eigenvalues > eigenvalues[-1] * len(eigenvalues) * torch.finfo(torch.float64).eps
    first = len(eigenvalues) - int(kept.sum())  # eigh returns ascending eigenvalues
    vectors = vectors[:, first:].flip(1)
    # Flip a vector if its entry of largest magnitude is negative.
    lowest, highest = vectors.aminmax(dim=0)
    vectors *= torch.where(highest >= -lowest, 1.0, -1.0)
    return eigenvalues[first:].flip(0).sqrt(), vectors


def _lower_gram(read: Callable[[int], Tensor], num_layers: int) -> Tensor:
    """Returns the lower triangle of sum_i W_i W_i^T in float64. The entries above the diagonal are not meaningful."""
    gram: Tensor | None = None
    for layer in range(num_layers):
        matrix = read(layer).double()
        if gram is None:
            gram = matrix.new_zeros(len(matrix), len(matrix))
        # Products of blocks on and below the diagonal are half the work of the complete product.
        for start in range(0, len(matrix), BLOCK_COLUMNS):
            end = start + BLOCK_COLUMNS
            gram[start:, start:end].addmm_(matrix[start:], matrix[start:end].T)
    assert gram is not None, "a model has layers"
    return gram
