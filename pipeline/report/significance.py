"""How many standard errors a difference must exceed to count, at a false-positive rate of one in twenty.

The critical value for two models that were chosen in advance is that of the two-sided t test. The best of several
models is chosen after looking at all of them: the best of seven equal models differs from one of the others by more
than two standard errors in two of five tasks. Tukey's studentized range corrects for this. With it, the best of any
number of equal models differs significantly from any of the others in one of twenty tasks.
"""

from __future__ import annotations

import math
from functools import cache

LEVEL = 0.05  # the rate of false positives


@cache
def critical_value(contenders: int = 2, degrees_of_freedom: int | None = None) -> float:
    """Returns the number of standard errors of a difference that counts.

    Args:
        contenders: the number of models that the compared ones were chosen from; 2 for two given models.
        degrees_of_freedom: of the standard error, one less than the number of documents or clusters. None if it is
            known to be large.
    """
    # Imported here, because the driver imports this module, and often judges no difference.
    degrees = math.inf if degrees_of_freedom is None else max(1, degrees_of_freedom)
    if contenders == 2:
        # The general case gives the same number, but takes a tenth of a second, and scipy.stats half a second more.
        from scipy.special import stdtrit

        return float(stdtrit(degrees, 1 - LEVEL / 2))
    from scipy.stats import studentized_range

    return float(studentized_range.ppf(1 - LEVEL, contenders, degrees) / math.sqrt(2))


def expected_by_chance(judged: int) -> str:
    """Returns how many of several differences count on average if there is no real effect, as text."""
    return f"{round(LEVEL * judged, 2):g}"
