"""Numbers of steps at equal seconds, and losses between two runs."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from pipeline.study.progress import SeedOutcome, runs_at
from pipeline.study.trials import DIVERGED, Measured

FINISHED = replace(DIVERGED, seconds_per_step=1.0, forgetting=None)


def _measured(steps: int, loss: float) -> tuple[int, Measured]:
    return steps, replace(FINISHED, held_out=loss, validation=loss, steps=steps)


def test_a_loss_between_two_runs_is_interpolated_in_the_logarithm_of_the_steps() -> None:
    """Exact for a loss that is linear in it."""

    def loss(steps: int) -> float:
        return 4.0 - 0.3 * math.log(steps)

    for steps in (51, 70, 99):
        outcome = SeedOutcome(0, steps, (_measured(50, loss(50)), _measured(100, loss(100))))
        assert outcome.interpolated and outcome.loss("held_out") == pytest.approx(loss(steps))
        assert outcome.loss("forgetting") is None
    assert SeedOutcome(0, 97, (_measured(100, 2.5),)).loss("held_out") == 2.5


@pytest.mark.parametrize(
    ("steps", "existing", "used"),
    [
        (100, [100], [100]),
        (97, [100], [100]),  # within five percent
        (90, [100], None),  # must be run
        (80, [60, 100], [60, 100]),
        (98, [60, 100], [100]),
        (50, [60, 100], None),
        (120, [60, 100], None),
        (80, [60, 75, 90, 100], [75, 90]),
    ],
)
def test_losses_come_from_a_run_of_almost_that_length_or_from_two_around_it(
    steps: int, existing: list[int], used: list[int] | None
) -> None:
    assert runs_at(steps, existing) == used
