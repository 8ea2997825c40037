"""What a study runs next, and what each contender has reached, from the runs that are finished."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pipeline.study.halving import Tuned, tune
from pipeline.study.trials import Measured, Trial, Trials
from pipeline.training.block_losses import LOSS_OF, BlockLosses

Budget = Literal["tokens", "flops", "seconds"]
SAME_STEPS = 0.05  # a number of steps this close to that of a finished run counts as the same
Loss = Literal["held_out", "validation", "forgetting"]


@dataclass(frozen=True)
class SeedOutcome:
    """The losses of one contender with one seed at one budget.

    Attributes:
        steps: what the budget pays for.
        measured: the finished runs from which the losses are: one, or two between whose steps the budget lies.
    """

    seed: int
    steps: int
    measured: tuple[tuple[int, Measured], ...]

    @property
    def interpolated(self) -> bool:
        """Whether the losses are interpolated."""
        return len(self.measured) == 2

    def loss(self, name: Loss) -> float | None:
        """Returns a loss, linearly interpolated in the logarithm of the steps if there are two runs."""
        values = [getattr(measured, name) for _, measured in self.measured]
        if None in values or len(values) == 1:
            return None if None in values else float(values[0])
        (low, high), (first, second) = (steps for steps, _ in self.measured), values
        share = math.log(self.steps / low) / math.log(high / low)
        return float(first + share * (second - first))

    def blocks(self, name: Loss) -> BlockLosses | None:
        """Returns a loss by block; None if it is interpolated, or not known by block."""
        return None if self.interpolated else self.measured[0][1].blocks.get(LOSS_OF[name])


class StudyProgress:
    """What follows from the finished runs of a study.

    Args:
        trials: the runs. All losses that decide anything are read here and are validation losses.
    """

    def __init__(self, trials: Trials) -> None:
        self.trials, self.study = trials, trials.study

    # ------------------------------------------------------------------------------------- tuning

    def tuned(self, contender: str) -> Tuned:
        """Returns how far a contender's learning rate is tuned."""
        settings, losses = self.study.tune, dict[tuple[int, float], float]()
        while True:
            found = tune(self.study.rates_of(contender), settings, losses)
            known = {pair: self.validation_loss(contender, *pair) for pair in found.pending}
            measured = {pair: loss for pair, loss in known.items() if loss is not None}
            losses |= measured
            if not measured or len(measured) < len(known):
                return found

    def validation_loss(self, contender: str, rung: int, rate: float) -> float | None:
        """Returns the mean validation loss over the tuning seeds, or None if one of the runs is not finished."""
        measured = [self.trials.measured(trial) for trial in self.rung_trials(contender, rung, rate)]
        found = [each.validation for each in measured if each is not None]
        return statistics.fmean(found) if len(found) == len(measured) else None

    def rung_trials(self, contender: str, rung: int, rate: float) -> list[Trial]:
        """Returns the runs of a rate on a rung, one per tuning seed."""
        steps = max(1, round(self.study.tune.rungs[rung] * self.trials.token_steps[contender]))
        return [Trial(contender, rate, steps, seed, final=False) for seed in self.study.tune.seeds]

    # ------------------------------------------------------------------------------------- final runs

    @property
    def budgets(self) -> list[Budget]:
        """The budgets at which contenders are compared."""
        asked: dict[Budget, bool] = {"flops": self.study.equal_flops, "seconds": self.study.equal_seconds}
        return ["tokens", *(budget for budget, wanted in asked.items() if wanted)]

    def steps_at(self, contender: str, budget: Budget) -> int | None:
        """Returns the steps that a budget pays for, or None if that is not known before further runs."""
        if budget == "tokens":
            return self.trials.token_steps[contender]
        cost = self.step_flops if budget == "flops" else self.seconds_per_step
        reference, own = cost(self.study.reference), cost(contender)
        if reference is None or own is None or not math.isfinite(reference + own):
            return None
        return self.steps_for(reference, own)

    def steps_for(self, reference: float, own: float) -> int:
        """Returns the steps that cost what the reference spends at equal tokens, given the costs of one step each."""
        return max(1, round(self.trials.token_steps[self.study.reference] * reference / own))

    def step_flops(self, contender: str) -> float | None:
        """Returns the floating-point operations of a step, as a run of the tuning counted them; None until then."""
        tuned = self.tuned(contender)
        if tuned.pending or tuned.rate is None:
            return None
        measured = self.trials.measured(self.rung_trials(contender, len(self.study.tune.rungs) - 1, tuned.rate)[0])
        return None if measured is None or measured.diverged else measured.flops / measured.steps

    def planned_step_flops(self, contender: str) -> float | None:
        """Returns the operations of a step as ``action=plan`` counts them; None if the model's config is not known."""
        plan = self.trials.plan(self.rung_trials(contender, 0, self.study.rates_of(contender)[0])[0])
        return None if plan is None else float(plan.step_flops)

    def seconds_per_step(self, contender: str) -> float | None:
        """Returns the median seconds per step of the contender's fastest run; None until it is known.

        Other programs on the machine only ever slow a run down, hence the fastest one. Only the runs of the tuning and
        those at the study's tokens count, so that further runs change nothing.
        """
        tuned = self.tuned(contender)
        if tuned.pending or tuned.rate is None:
            return None
        final = self.final_trials(contender, self.trials.token_steps[contender], tuned.rate)
        trials = [*self._tuning_trials(contender, tuned), *final]
        if any(self.trials.measured(trial) is None for trial in final):
            return None
        found = map(self.trials.measured, trials)
        return min(each.seconds_per_step for each in found if each is not None)

    def _tuning_trials(self, contender: str, tuned: Tuned) -> list[Trial]:
        """Returns all runs that the tuning can have made so far."""
        rungs = range(len(self.study.tune.rungs))
        return [trial for rung in rungs for rate in tuned.rates for trial in self.rung_trials(contender, rung, rate)]

    def runs_by_rung(self, contender: str) -> list[list[Trial]]:
        """Returns the runs on every rung that are finished or can start now."""
        tuned = self.tuned(contender)
        return [
            [
                trial
                for rate in tuned.rates
                for trial in self.rung_trials(contender, rung, rate)
                if (rung, rate) in tuned.pending or self.trials.measured(trial) is not None
            ]
            for rung in range(len(self.study.tune.rungs))
        ]

    def final_trial(self, contender: str, steps: int, rate: float, seed: int) -> Trial:
        """Returns the final run with one seed."""
        return Trial(contender, rate, steps, seed, final=True)

    def final_trials(self, contender: str, steps: int, rate: float) -> list[Trial]:
        """Returns the final runs of a number of steps."""
        return [self.final_trial(contender, steps, rate, seed) for seed in self.study.seeds]

    def final_steps(self, contender: str) -> list[int]:
        """Returns the numbers of steps to run, ascending.

        No run is made for the budget of seconds if its number of steps is that of another run, to within
        ``SAME_STEPS``, or lies between two.
        """
        found = {budget: self.steps_at(contender, budget) for budget in self.budgets}
        run = sorted({steps for budget, steps in found.items() if budget != "seconds" and steps is not None})
        seconds = found.get("seconds")
        if seconds is None or runs_at(seconds, run) is not None:
            return run
        return sorted({*run, seconds})

    def outcomes(self, contender: str, budget: Budget) -> list[SeedOutcome] | None:
        """Returns the losses of a contender at a budget in the order of the seeds, or None if some are not known."""
        tuned, steps = self.tuned(contender), self.steps_at(contender, budget)
        if tuned.pending or tuned.rate is None or steps is None:
            return None
        used = runs_at(steps, self.final_steps(contender))
        found = []
        for seed in self.study.seeds:
            runs = [
                (each, self.trials.measured(self.final_trial(contender, each, tuned.rate, seed))) for each in used or []
            ]
            known = tuple((each, measured) for each, measured in runs if measured is not None)
            if not known or len(known) < len(runs):
                return None
            found.append(SeedOutcome(seed, steps, known))
        return found

    # ------------------------------------------------------------------------------------- what is next

    def pending(self) -> list[Trial]:
        """Returns the runs that can start now: the next rung of every contender, or its final runs.

        They are ordered by contender, with the reference first, because the other budgets are what it spends.
        """
        names = sorted(self.study.contenders, key=lambda name: name != self.study.reference)
        found = [trial for name in names for trial in self._pending_of(name)]
        return [trial for trial in dict.fromkeys(found) if self.trials.measured(trial) is None]

    def known(self, contender: str | None = None) -> list[Trial]:
        """Returns the finished runs, of all contenders or of one."""
        found: list[Trial] = []
        for name in self.study.contenders if contender is None else [contender]:
            tuned = self.tuned(name)
            found += self._tuning_trials(name, tuned)
            if not tuned.pending and tuned.rate is not None:
                for steps in self.final_steps(name):
                    found += self.final_trials(name, steps, tuned.rate)
        return [trial for trial in found if self.trials.measured(trial) is not None]

    def _pending_of(self, contender: str) -> Iterator[Trial]:
        tuned = self.tuned(contender)
        for rung, rate in tuned.pending:
            yield from self.rung_trials(contender, rung, rate)
        if not tuned.pending and tuned.rate is not None:
            for steps in self.final_steps(contender):
                yield from self.final_trials(contender, steps, tuned.rate)


def runs_at(steps: int, run: list[int]) -> list[int] | None:
    """Returns the numbers of steps among ``run`` from which the losses at ``steps`` are known, or None."""
    near = [each for each in run if abs(each - steps) <= SAME_STEPS * steps]
    if near:
        return [min(near, key=lambda each: abs(each - steps))]
    if len(run) > 1 and run[0] < steps < run[-1]:
        low = max(each for each in run if each < steps)
        return [low, min(each for each in run if each > steps)]
    return None
