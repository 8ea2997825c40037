"""When a step's loss counts as a spike.

A loss is a spike when it lies more than ``DEVIATIONS`` standard deviations above the mean of the up to ``WINDOW``
steps before it, and there are at least ``LEAST`` of those. The measure is OLMo 2's spike score (arXiv 2501.00656),
over a window short enough for runs of some hundred steps.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

WINDOW, LEAST, DEVIATIONS = 128, 16, 7.0


def is_spike(loss: float, before: Sequence[float]) -> bool:
    """Whether ``loss`` is a spike after the losses ``before`` it, oldest first."""
    window = before[-WINDOW:]
    if len(window) < LEAST:
        return False
    return loss > statistics.fmean(window) + DEVIATIONS * statistics.pstdev(window)
