"""Successive halving finds the best rate, and shows that both of its neighbors are worse."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from pipeline.config.study import Tune
from pipeline.study.halving import Tuned, tune

GRID = [0.001, 0.003, 0.009, 0.027]


def _settings(rungs: list[float], keep: float = 0.5, new: int = 20) -> Tune:
    return Tune(learning_rates=GRID, seeds=[0], rungs=rungs, keep=keep, max_new_rates=new)


def _run(settings: Tune, loss: Callable[[int, float], float]) -> tuple[Tuned, dict[tuple[int, float], float]]:
    """Trains whatever is pending, one batch after the other."""
    losses: dict[tuple[int, float], float] = {}
    while (found := tune(GRID, settings, losses)).pending:
        assert not losses.keys() & set(found.pending)
        losses |= {pair: loss(*pair) for pair in found.pending}
    return found, losses


@pytest.mark.parametrize("best", [1e-5, 0.0008, 0.001, 0.0031, 0.02, 0.027, 0.3, 40.0])
@pytest.mark.parametrize("rungs", [[1.0], [0.25, 0.5], [0.1, 0.3, 1.0]])
def test_the_chosen_rate_is_better_than_both_neighbors_on_the_last_rung(best: float, rungs: list[float]) -> None:
    """For any optimum inside or outside the grid, of a loss with a single minimum."""

    def loss(rung: int, rate: float) -> float:
        return abs(math.log(rate / best))

    found, losses = _run(_settings(rungs), loss)
    last = len(rungs) - 1
    place = list(found.rates).index(found.rate)
    around = [found.rates[place - 1], found.rates[place + 1]]
    assert all(losses[last, found.rate] < losses[last, rate] for rate in around) and not found.at_edge
    assert set(found.rates) >= set(GRID) and list(found.rates) == sorted(found.rates)
    assert found.rate == min(found.rates, key=lambda rate: loss(last, rate))


def test_rates_reach_a_rung_by_their_losses_on_the_previous_one() -> None:
    trained = _run(_settings([0.5, 1.0]), lambda rung, rate: GRID.index(rate) != 1 and GRID.index(rate) + 1.0)[1]
    assert {rate for rung, rate in trained if rung == 0} == set(GRID)
    assert {rate for rung, rate in trained if rung == 1} == set(GRID[:3])  # the best two, and the other neighbor


def test_a_later_rung_can_move_the_best_rate_to_one_that_was_dropped() -> None:
    """The optimum decreases with the length of training, as it does for real models."""
    optima = [0.027, 0.003, 0.001]
    found, _ = _run(_settings([0.1, 0.3, 1.0], keep=0.25), lambda rung, rate: abs(math.log(rate / optima[rung])))
    assert found.rate == 0.001 and not found.at_edge


def test_diverged_rates_are_worse_than_all_others() -> None:
    found, _ = _run(_settings([0.5, 1.0]), lambda rung, rate: math.inf if rate > 0.002 else -rate)
    assert found.rate == 0.001 and not found.at_edge
    everything, losses = _run(_settings([1.0], new=3), lambda rung, rate: math.inf)
    assert everything.at_edge and len(losses) == len(GRID) + 3


def test_the_limit_of_new_rates_is_reported() -> None:
    found, losses = _run(_settings([0.5, 1.0], new=2), lambda rung, rate: -rate)
    assert found.at_edge and found.rate == max(rate for _, rate in losses) == 0.243
