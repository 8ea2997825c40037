"""Counts the floating-point operations of a training step, by one formula for the engine and for the plan.

A matrix product of [m, k] and [k, n] counts 2·m·k·n. Per token in a sequence of S tokens, with W_i the number of
elements of layer i's weight matrices, A = heads · head size (the mean of key and value where these differ), V·H the
elements of the head, and l the lowest trainable layer:

    forward            Σ_i (2·W_i + 4·S·A)  +  2·V·H        over all layers; the head for supervised tokens only
    input gradients    Σ_{i ≥ l} (2·W_i + 8·S·A)  +  2·V·H  down to layer l
    weight gradients   Σ_{trainable matrices} 2·W           (that of the head for supervised tokens only)

and per optimizer step with Muon, for every matrix of n by m elements that it updates, with n ≤ m, five iterations of

    orthogonalization  4·n²·m + 2·n³

Attention counts every query against all S keys, as PaLM's appendix B (arXiv 2204.02311) and torch's FLOP counter do,
although the documents of one block do not attend to each other. Only the experts that a token is routed to are counted.
Norms, activations, softmax and AdamW are not counted. Recomputation is not counted either, because it is never
required. In layer l itself the gradient stops at the first norm, which is trainable. If that norm is frozen, the true
count is smaller by the input projections of that layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import prod


@dataclass(frozen=True)
class LayerWork:
    """The matrices of one decoder layer, in elements that a token is multiplied with."""

    matrices: int
    trained: int  # elements of the trainable matrices


@dataclass(frozen=True)
class HeadWork:
    """The matrix of the head, and which gradients the backward pass computes for it."""

    entries: int
    trained: bool
    passes_gradient: bool  # whether anything below the head trains


@dataclass(frozen=True)
class TrainingFlops:
    """Operations per token for one model, choice of trainable parameters and sequence length."""

    body: int  # the decoder layers, for every token
    head: int  # for tokens with a target only
    update: int = 0  # per optimizer step

    @classmethod
    def count(cls, layers: Sequence[LayerWork], lowest: int, head: HeadWork, attention: int) -> TrainingFlops:
        """Applies the formula of this module.

        Args:
            layers: from input to output.
            lowest: index of the lowest layer that gradients must reach, or the number of layers if they reach none.
            head: the head.
            attention: S·A, sequence length times heads times head size.
        """
        body = 0
        for index, layer in enumerate(layers):
            body += 2 * layer.matrices + 4 * attention + 2 * layer.trained
            if index >= lowest:
                body += 2 * layer.matrices + 8 * attention
        return cls(body, 2 * head.entries * (1 + int(head.passes_gradient) + int(head.trained)))

    def of_tokens(self, tokens: int, supervised_tokens: int) -> int:
        """Returns the operations for a number of tokens, some of which have a target, without the optimizer's."""
        return tokens * self.body + supervised_tokens * self.head

    def of_step(self, tokens: int, supervised_tokens: int) -> int:
        """Returns the operations of an optimizer step with so many tokens."""
        return self.of_tokens(tokens, supervised_tokens) + self.update


def orthogonalization_flops(rows: int, columns: int, steps: int) -> int:
    """Returns the operations with which Muon orthogonalizes a matrix in so many iterations."""
    small, large = sorted((rows, columns))
    return steps * (4 * small**2 * large + 2 * small**3)


def matrix_entries(name: str, shape: Sequence[int], expert_share: Fraction = Fraction(1)) -> int:
    """Returns the number of elements of a tensor that one token is multiplied with, or 0 if it is not a matrix.

    Args:
        name: within the layer. Biases of stacked experts also have two dimensions, so they are recognized by name.
        shape: the shape of the tensor. The stacked matrices of experts have three dimensions.
        expert_share: the fraction of the experts that a token is routed to.
    """
    if len(shape) < 2 or name.endswith("bias"):
        return 0
    return int(prod(shape) * (expert_share if len(shape) == 3 else 1))
