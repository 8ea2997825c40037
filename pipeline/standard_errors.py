"""Standard errors of means and ratios, from how much each document, block or cluster moves them.

The influence of a unit is how much it moves the number to first order: its empirical influence function over n.
Influences sum to zero. Those of a ratio of two sums give the usual standard error of a ratio estimator (the delta
method; Cochran, Sampling Techniques, 1977, chapter 6). Nothing beyond the standard library is needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def ratio_influences(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Returns the influence of every unit on the ratio r of two sums over units, Σy / Σx: (yᵢ - r·xᵢ) / Σx."""
    total = sum(denominators)
    ratio = sum(numerators) / total
    return [(y - ratio * x) / total for y, x in zip(numerators, denominators, strict=True)]


def standard_error(influences: Sequence[float], clusters: Sequence[str] | None = None) -> float | None:
    """Returns the standard error of a number, given the influences ψᵢ of its n units: sqrt(n/(n-1) Σ ψᵢ²).

    Given the differences of two numbers' influences on the same units, it is the standard error of their difference.
    For a mean this is the sample standard deviation over √n. None for fewer than two units.

    Args:
        influences: of every unit; see above.
        clusters: the cluster of every unit. The influences of a cluster are added up first, and n is the number of
            clusters.
    """
    if clusters is not None:
        sums: dict[str, float] = {}
        for cluster, influence in zip(clusters, influences, strict=True):
            sums[cluster] = sums.get(cluster, 0.0) + influence
        influences = list(sums.values())
    n = len(influences)
    return math.sqrt(n / (n - 1) * sum(influence**2 for influence in influences)) if n > 1 else None
