"""The numbers of a study's report, as JSON values: every loss by contender, budget and seed, and how they compare."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.report.significance import LEVEL
from pipeline.study.progress import Budget, Loss, SeedOutcome, StudyProgress
from pipeline.study.statistics import Mean, SeedDifference, differences, mean_of
from pipeline.study.trials import Measured
from pipeline.training.block_losses import BlockLosses

COMPARED: tuple[Loss, ...] = ("held_out", "forgetting")


@dataclass(frozen=True)
class Comparison:
    """All contenders at one budget.

    Attributes:
        outcomes: of the contenders that are finished, by their names, in the order of the seeds.
        means: by loss and contender. A loss that was not measured is absent.
        differences: to the reference, by loss and contender.
        text_errors: one standard error of these differences over the blocks of the text, by loss and contender, where
            losses are known by block.
    """

    budget: Budget
    outcomes: dict[str, list[SeedOutcome]]
    means: dict[Loss, dict[str, Mean]]
    differences: dict[Loss, dict[str, SeedDifference]]
    text_errors: dict[Loss, dict[str, float]]

    @property
    def ranked(self) -> list[str]:
        """The contenders by their mean held-out loss, the best one first."""
        return sorted(self.outcomes, key=lambda name: self.means["held_out"][name].value)


def compare(progress: StudyProgress, budget: Budget) -> Comparison:
    """Compares the contenders whose runs at a budget are finished."""
    found = {name: progress.outcomes(name, budget) for name in progress.study.contenders}
    outcomes = {name: each for name, each in found.items() if each is not None}
    losses: dict[Loss, dict[str, list[float]]] = {}
    for loss in COMPARED:
        by_name = {name: [outcome.loss(loss) for outcome in each] for name, each in outcomes.items()}
        known = {name: [value for value in values if value is not None] for name, values in by_name.items()}
        losses[loss] = {name: values for name, values in known.items() if len(values) == len(progress.study.seeds)}
    reference = progress.study.reference
    return Comparison(
        budget,
        outcomes,
        {loss: {name: mean_of(values) for name, values in known.items()} for loss, known in losses.items()},
        {loss: differences(known, reference) if reference in known else {} for loss, known in losses.items()},
        {loss: _text_errors(outcomes, reference, loss) for loss in COMPARED},
    )


def _text_errors(outcomes: Mapping[str, Sequence[SeedOutcome]], reference: str, loss: Loss) -> dict[str, float]:
    """Returns one standard error, over blocks, of every contender's difference to the reference.

    Every block has the mean of its losses over the seeds. The blocks are the same for all contenders, hence pairs.
    """
    by_name = {name: [outcome.blocks(loss) for outcome in each] for name, each in outcomes.items()}
    means = {
        name: BlockLosses([statistics.fmean(seeds) for seeds in zip(*(each.losses for each in known), strict=True)],
                          known[0].targets)
        for name, blocks in by_name.items()
        if len(known := [each for each in blocks if each is not None]) == len(blocks)
    }  # fmt: skip
    if reference not in means:
        return {}
    errors = {name: mean.change_stderr(means[reference]) for name, mean in means.items() if name != reference}
    return {name: error for name, error in errors.items() if error is not None}


def base_losses(progress: StudyProgress) -> dict[str, float]:
    """Returns the base model's losses by name, from a run that added no layer; empty if there is none."""
    for trial in progress.known():
        measured = progress.trials.measured(trial)
        if measured is not None and measured.keeps_depth and measured.before:
            return dict(measured.before)
    return {}


def any_run(outcomes: list[SeedOutcome]) -> Measured:
    """Returns what the first run behind some outcomes measured, for what does not depend on the seed.

    That is the first one that did not diverge, if there is one.
    """
    runs = [outcome.measured[0][1] for outcome in outcomes]
    return next((run for run in runs if not run.diverged), runs[0])


# ------------------------------------------------------------------------------------------- JSON


def to_json(progress: StudyProgress, comparisons: list[Comparison]) -> dict[str, Any]:
    """Returns the content of results.json. Infinite numbers are null."""
    return {
        "study": progress.study.model_dump(mode="json"),
        "base": base_losses(progress),
        "rows": [row for comparison in comparisons for row in _rows(progress, comparison)],
        "differences": [row for comparison in comparisons for row in _differences(comparison)],
        "tuning": list(_tuning(progress)),
    }


def _rows(progress: StudyProgress, comparison: Comparison) -> Iterator[dict[str, Any]]:
    for name, outcomes in comparison.outcomes.items():
        for outcome in outcomes:
            last = outcome.measured[-1][1]
            share = outcome.steps / last.steps if last.steps else 0.0
            yield {
                "contender": name,
                "budget": comparison.budget,
                "seed": outcome.seed,
                "learning_rate": progress.tuned(name).rate,
                "steps": outcome.steps,
                "runs_of_steps": [steps for steps, _ in outcome.measured],
                "tokens": round(last.tokens * share),
                "flops": round(last.flops * share),
                "seconds": _finite(last.seconds_per_step * outcome.steps),
                **{f"{loss}_loss": _finite(outcome.loss(loss)) for loss in ("held_out", "validation", "forgetting")},
            }


def _differences(comparison: Comparison) -> Iterator[dict[str, Any]]:
    for loss, by_name in comparison.differences.items():
        for name, found in by_name.items():
            yield {
                "contender": name,
                "budget": comparison.budget,
                "loss": loss,
                "difference": found.mean.value,
                "stderr": found.mean.stderr,
                "stderr_over_text": comparison.text_errors[loss].get(name),
                "seeds": found.mean.n,
                "p": found.p,
                "p_adjusted": found.adjusted,
                "counts": found.counts(LEVEL),
            }


def _tuning(progress: StudyProgress) -> Iterator[dict[str, Any]]:
    for name in progress.study.contenders:
        tuned = progress.tuned(name)
        for rung, share in enumerate(progress.study.tune.rungs):
            for rate in tuned.rates:
                loss = progress.validation_loss(name, rung, rate)
                if loss is not None:
                    yield {
                        "contender": name,
                        "rung": rung,
                        "share_of_tokens": share,
                        "learning_rate": rate,
                        "validation_loss": _finite(loss),
                        "chosen": not tuned.pending and rate == tuned.rate,
                        "at_edge": not tuned.pending and rate == tuned.rate and tuned.at_edge,
                    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
