"""The floating-point operations that a training step needs: integers in, integers out, for the engine and the plan.

A matrix product of [m, k] and [k, n] counts 2·m·k·n. For one token in a sequence of S tokens, with W_i the entries
of layer i's weight matrices, A = heads · head size, V·H the head, and l the lowest trainable layer:

    forward            Σ_i (2·W_i + 4·S·A)  +  2·V·H        over all layers; the head only for supervised tokens
    input gradients    Σ_{i ≥ l} (2·W_i + 8·S·A)  +  2·V·H  down to l and no further
    weight gradients   Σ_{trainable matrices} 2·W           (the head's for supervised tokens)

Attention counts queries against all S keys, as PaLM's appendix B (arXiv 2204.02311) and torch's FLOP counter do,
although documents in one block do not see each other. Of experts only those count that a token meets. Norms,
activations, the softmax and the optimizer are left out, and recomputation is never needed, only chosen. In layer l
itself the gradient stops at its first norm, which trains; where it does not, the true count is smaller by that layer's
input projections.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import prod


@dataclass(frozen=True)
class LayerWork:
    """One decoder layer's matrices, in entries that a token is multiplied with."""

    matrices: int
    trained: int  # of these, the ones that train


@dataclass(frozen=True)
class HeadWork:
    """The head's matrix, in entries, and what is asked of it."""

    entries: int
    trained: bool
    passes_gradient: bool  # something below it trains


@dataclass(frozen=True)
class TrainingFlops:
    """Operations a token for one model, choice of trainable parameters and sequence length."""

    body: int  # decoder layers, every token
    head: int  # only tokens with a target

    @classmethod
    def count(cls, layers: Sequence[LayerWork], lowest: int, head: HeadWork, attention: int) -> TrainingFlops:
        """The formula above.

        Args:
            layers: from input to output.
            lowest: the lowest layer that gradients must reach; their number where they reach none.
            attention: S·A, sequence length times heads times head size.
        """
        body = 0
        for index, layer in enumerate(layers):
            body += 2 * layer.matrices + 4 * attention + 2 * layer.trained
            if index >= lowest:
                body += 2 * layer.matrices + 8 * attention
        return cls(body, 2 * head.entries * (1 + int(head.passes_gradient) + int(head.trained)))

    def of_tokens(self, tokens: int, supervised_tokens: int) -> int:
        """Operations for so many tokens, of which so many have a target."""
        return tokens * self.body + supervised_tokens * self.head


def matrix_entries(name: str, shape: Sequence[int], expert_share: Fraction = Fraction(1)) -> int:
    """Entries of a tensor that one token is multiplied with; 0 for what is no matrix.

    Args:
        name: within its layer; biases of stacked experts have two dimensions and are no matrices.
        shape: of three dimensions for a stack of experts' matrices.
        expert_share: of the experts, those that one token meets.
    """
    if len(shape) < 2 or name.endswith("bias"):
        return 0
    return int(prod(shape) * (expert_share if len(shape) == 3 else 1))
