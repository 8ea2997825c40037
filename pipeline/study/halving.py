"""Chooses a learning rate by successive halving. The best rate of every rung lies between two that are worse.

A rung trains every remaining rate for a fraction of the final steps, and the best of them reach the next rung. While a
neighbor of the best rate has not been trained on the rung, it is trained too, even if an earlier rung dropped it. Where
the grid has no neighbor it is extended by one more rate at the same ratio. Therefore the chosen rate is never at an
edge of the grid, unless ``max_new_rates`` was reached, and a reader sees what its neighbors achieve.

Everything here is a function of the losses measured so far, so a study keeps no state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.config.study import Tune

Losses = Mapping[tuple[int, float], float]  # (rung, rate) -> validation loss; inf if training diverged


@dataclass(frozen=True)
class Tuned:
    """How far the tuning of one contender has come.

    Attributes:
        pending: the (rung, rate) pairs to train next; empty once a rate is chosen.
        rate: the best rate of the latest rung that is complete, or None.
        rates: all rates so far, ascending, those beyond the given grid included.
        at_edge: the chosen rate has no worse neighbor on one side, because ``max_new_rates`` was reached.
    """

    pending: Sequence[tuple[int, float]]
    rate: float | None
    rates: Sequence[float]
    at_edge: bool


def tune(grid: Sequence[float], settings: Tune, losses: Losses) -> Tuned:
    """Returns what to train next, or the chosen rate.

    Args:
        grid: the rates to begin with, ascending.
        settings: the rungs, and how many rates remain.
        losses: what has been measured so far.
    """
    ladder, tried, best, at_edge = _Ladder(grid, settings.max_new_rates), list(grid), None, False
    for rung in range(len(settings.rungs)):
        while True:
            if missing := [rate for rate in sorted(tried) if (rung, rate) not in losses]:
                return Tuned([(rung, rate) for rate in missing], best, ladder.rates, False)
            ranked = sorted(tried, key=lambda rate: (losses[rung, rate], rate))
            neighbors = ladder.neighbors(ranked[0])
            if not (further := [rate for rate in neighbors if rate not in tried]):
                break
            tried += further
        best, at_edge = ranked[0], len(neighbors) < 2
        tried = ranked[: max(1, math.ceil(settings.keep * len(ranked)))]
    return Tuned([], best, ladder.rates, at_edge)


class _Ladder:
    """The rates of one contender, extended at the edges on demand."""

    def __init__(self, grid: Sequence[float], max_new: int) -> None:
        self.rates, self._left = list(grid), max_new

    def neighbors(self, rate: float) -> list[float]:
        """Returns the next lower and the next higher rate. One of them is missing if no more rates may be added."""
        if rate == self.rates[0] and self._may_add():
            self.rates.insert(0, _rounded(rate * rate / self.rates[1]))
        if rate == self.rates[-1] and self._may_add():
            self.rates.append(_rounded(rate * rate / self.rates[-2]))
        place = self.rates.index(rate)
        return [self.rates[index] for index in (place - 1, place + 1) if 0 <= index < len(self.rates)]

    def _may_add(self) -> bool:
        self._left -= 1
        return self._left >= 0


def _rounded(rate: float) -> float:
    """Rounds to three digits, because the rate is part of a run's name and of its artifact's key."""
    return float(f"{rate:.3g}")
