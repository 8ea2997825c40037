"""The loss of an evaluated split by block, from which its standard error follows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.config import Split
from pipeline.standard_errors import ratio_influences, standard_error

# The names of losses in training.json.
LOSS_OF: dict[Split, str] = {"held_out": "loss", "validation": "validation_loss", "forgetting": "forgetting_loss"}
LARGEST_EXPONENT = 700.0  # math.exp overflows above 709


def perplexity(loss: float) -> float:
    """Returns exp of a mean loss per token, in the model's own tokens; capped where a float would overflow."""
    return math.exp(min(loss, LARGEST_EXPONENT))


@dataclass(frozen=True)
class BlockLosses:
    """The losses and the numbers of targets of some blocks, as ``training.json`` keeps them.

    Attributes:
        losses: of every block: the sum over its targets, in nats.
        targets: of every block: how many of its tokens are predicted.
    """

    losses: Sequence[float]
    targets: Sequence[int]

    @property
    def mean(self) -> float:
        """The loss per target over all blocks, a ratio of two sums; 0 without targets."""
        return sum(self.losses) / max(1, sum(self.targets))

    @property
    def stderr(self) -> float | None:
        """One standard error of the mean over blocks; None for fewer than two blocks."""
        return standard_error(self._influences)

    def change_stderr(self, earlier: BlockLosses) -> float | None:
        """Returns one standard error of the mean minus an earlier one, over pairs of the same blocks."""
        assert self.targets == earlier.targets
        return standard_error([y - x for x, y in zip(earlier._influences, self._influences, strict=True)])

    @property
    def _influences(self) -> list[float]:
        return ratio_influences(self.losses, self.targets) if any(self.targets) else []
