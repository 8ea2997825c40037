"""How many standard errors a difference must exceed to count, at a false-positive rate of one in twenty.

The critical value for two models that were chosen in advance is that of the two-sided t test. The best of several
models is chosen after looking at all of them: the best of seven equal models differs from one of the others by more
than two standard errors in two of five tasks. Tukey's studentized range corrects for this. With it, the best of any
number of equal models differs significantly from any of the others in one of twenty tasks.
"""

from __future__ import annotations

import math
from functools import cache
from statistics import NormalDist

LEVEL = 0.05  # the rate of false positives
_NORMAL = NormalDist()
_GRID = [step / 25 - 8 for step in range(401)]  # of the integral over the normal density


@cache
def critical_value(contenders: int = 2, degrees_of_freedom: int | None = None) -> float:
    """Returns the number of standard errors of a difference that counts.

    Args:
        contenders: the number of models that the compared ones were chosen from; 2 for two given models.
        degrees_of_freedom: of the standard error, one less than the number of documents or clusters. None if it is
            known to be large.
    """
    large = _range_quantile(contenders) / math.sqrt(2)
    if degrees_of_freedom is None:
        return large
    return _with_estimated_error(large, max(1, degrees_of_freedom))


def expected_by_chance(judged: int) -> str:
    """Returns how many of several differences count on average if there is no real effect, as text."""
    return f"{round(LEVEL * judged, 2):g}"


def _range_quantile(contenders: int) -> float:
    """Returns the range of independent standard normal numbers that is exceeded at ``LEVEL``."""
    low, high = 0.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _range_probability(middle, contenders) < 1 - LEVEL else (low, middle)
    return low


def _range_probability(width: float, contenders: int) -> float:
    """Returns the probability that the range is at most ``width``: k ∫ φ(z) (Φ(z) - Φ(z - width))^(k-1) dz."""
    values = (
        _NORMAL.pdf(z) * (_NORMAL.cdf(z) - _NORMAL.cdf(z - width)) ** (contenders - 1) for z in _GRID
    )  # fmt: skip
    return contenders * sum(values) * (_GRID[1] - _GRID[0])


def _with_estimated_error(z: float, nu: int) -> float:
    """Returns the quantile of Student's t that corresponds to the normal quantile z (Abramowitz & Stegun, 26.7.5)."""
    return (
        z
        + (z**3 + z) / (4 * nu)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * nu**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * nu**3)
    )
