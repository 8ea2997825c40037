"""A study whose runs are not trained: a function returns what each of them measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.config.study import Study
from pipeline.study.progress import StudyProgress
from pipeline.study.trials import DIVERGED, Measured, Trial, Trials
from tests.study.small_study import STUDY

TOKENS_PER_STEP = 100
DIVERGES = replace(DIVERGED, forgetting=float("inf"))


class SimulatedTrials(Trials):
    """The runs of a study, of which those in ``finished`` are."""

    def __init__(self, study: Study, directory: Path) -> None:
        super().__init__(study, dict.fromkeys(study.contenders))  # type: ignore[arg-type]  # no settings are read
        self.finished: dict[Trial, Measured] = {}
        self._directory = directory

    def measured(self, trial: Trial) -> Measured | None:
        return self.finished.get(trial)

    def tokens_per_step(self, contender: str) -> int:
        return TOKENS_PER_STEP

    @property
    def directory(self) -> Path:
        return self._directory


def measured(trial: Trial, loss: float, **changes: Any) -> Measured:
    """Returns what a run of 10 FLOPs and one second per step measured, with the same loss on all texts."""
    steps = trial.steps
    found = Measured(
        held_out=loss, validation=loss, forgetting=loss, before={"loss": 9.0} if trial.final else {}, blocks={},
        steps=steps, tokens=steps * TOKENS_PER_STEP, flops=10 * steps, seconds=float(steps), seconds_per_step=1.0,
        trained_parameters=2_000_000, total_parameters=3_000_000, keeps_depth=False,
    )  # fmt: skip
    return replace(found, **changes)


def simulate(
    directory: Path, outcome: Callable[[Trial], Measured], most_runs: int | None = None, **changes: Any
) -> StudyProgress:
    """Returns a study of 10 steps per final run, finished or stopped after some runs.

    Args:
        outcome: what a run measured.
        most_runs: the number of runs after which it is stopped.
        changes: to the study's settings.
    """
    study = Study.model_validate({**STUDY, "tokens": 10 * TOKENS_PER_STEP, "equal_flops": False, **changes})
    trials = SimulatedTrials(study, directory)
    progress = StudyProgress(trials)
    while pending := progress.pending():
        for trial in pending:
            if len(trials.finished) == most_runs:
                return progress
            trials.finished[trial] = outcome(trial)
    return progress
