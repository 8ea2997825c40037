"""Means over seeds, paired differences, and which of them are significant."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Mean:
    """A mean over seeds with its standard error: the standard deviation divided by the square root of their number."""

    value: float
    stderr: float
    n: int


@dataclass(frozen=True)
class SeedDifference:
    """The mean of the differences to the reference at the same seeds.

    Attributes:
        mean: contender minus reference.
        p: of the two-sided paired t test.
        adjusted: p after Holm's correction for the number of comparisons.
    """

    mean: Mean
    p: float
    adjusted: float

    def counts(self, level: float) -> bool:
        """Whether the difference is significant at a level after the correction."""
        return self.adjusted < level


def mean_of(values: Sequence[float]) -> Mean:
    """Returns the mean of at least two values. A diverged run has the loss inf, and so has a mean with one."""
    if not all(map(math.isfinite, values)):
        return Mean(math.inf, math.inf, len(values))
    return Mean(statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values)), len(values))


def paired_p(differences: Sequence[float]) -> float:
    """Returns the p value of the two-sided paired t test.

    With few seeds, Student's distribution matters: at three seeds, a difference of 4.3 standard errors has p = 0.05.
    """
    from scipy.stats import t  # takes half a second, which commands without a report need not spend

    mean = mean_of(differences)
    if not math.isfinite(mean.value):
        return math.nan
    if mean.stderr == 0.0:
        return 0.0 if mean.value else 1.0
    return float(2 * t.sf(abs(mean.value) / mean.stderr, len(differences) - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns p values adjusted for their number by Holm's step-down procedure (Scandinavian J. Stat. 6, 1979)."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def differences(losses: Mapping[str, Sequence[float]], reference: str) -> dict[str, SeedDifference]:
    """Compares every contender with the reference, paired by seed. Contenders that diverged are left out.

    Args:
        losses: by contender, in the order of the seeds.
        reference: the contender to compare with.
    """
    paired = {
        name: [value - other for value, other in zip(values, losses[reference], strict=True)]
        for name, values in losses.items()
        if name != reference and all(map(math.isfinite, (*values, *losses[reference])))
    }
    p_values = [paired_p(values) for values in paired.values()]
    return {
        name: SeedDifference(mean_of(values), p, adjusted)
        for (name, values), p, adjusted in zip(paired.items(), p_values, holm(p_values), strict=True)
    }
