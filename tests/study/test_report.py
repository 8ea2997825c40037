"""What the report and the plan of a study say about runs that diverged or are missing. The runs are simulated."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from pipeline.study import plan, report
from pipeline.study.progress import StudyProgress
from pipeline.study.report import write_study_report
from pipeline.study.trials import Measured, Trial
from tests.study.simulated import DIVERGES, measured, simulate

CONTENDERS: dict[str, list[str]] = {"base": [], "other": [], "third": []}
LOSSES = {"base": 3.0, "other": 2.0, "third": 2.5}
TUNE: dict[str, Any] = {
    "learning_rates": [0.001, 0.01], "seeds": [9], "rungs": [0.5], "keep": 0.5, "max_new_rates": 1,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "_draw", lambda *arguments: {})


def _report(directory: Path, *diverging: str, seed: int | None = None, **changes: Any) -> str:
    """Returns the report of a study some of whose contenders diverge with all seeds, or with one."""

    def outcome(trial: Trial) -> Measured:
        diverges = trial.contender in diverging and seed in (None, trial.seed)
        return DIVERGES if diverges else measured(trial, LOSSES[trial.contender] + trial.seed / 100)

    progress = simulate(directory, outcome, contenders=CONTENDERS, reference="base", **changes)
    return write_study_report(progress, ["+study=tiny"], directory).read_text()


def test_a_report_on_contenders_that_all_diverged_names_them(tmp_path: Path) -> None:
    text = _report(tmp_path, *CONTENDERS)
    assert "> No contender has a loss to compare. Diverged: base, other, third." in text


def test_without_a_loss_of_the_reference_the_others_are_not_compared_with_it(tmp_path: Path) -> None:
    text = _report(tmp_path, "base")
    assert (
        "> At equal tokens, **other** has the lowest held-out loss (2.0050 ± 0.0050). The reference, base, has no loss "
        "to compare it with. Diverged: base." in text
    )


def test_the_headline_names_contenders_that_diverged(tmp_path: Path) -> None:
    text = _report(tmp_path, "other")
    assert "**third** has the lowest held-out loss" in text
    assert "Compared with base: 1 better, 0 worse, 0 not significantly different. Diverged: other." in text


@pytest.mark.parametrize("seed", [0, 1])
def test_costs_do_not_depend_on_which_seed_diverged(tmp_path: Path, seed: int) -> None:
    """One of the two final runs is as good as the other for what does not depend on the seed."""
    (line,) = [line for line in _report(tmp_path, "other", seed=seed).splitlines() if line.startswith("| 2 ")]
    assert [cell.strip() for cell in line.strip("| ").split("|")][3:6] == ["2.0M", "9.000", "diverged"]
    assert line.endswith("|    10 | 1.0×10² |      1 |")


def test_a_rate_that_is_not_chosen_yet_is_not_at_the_edge(tmp_path: Path) -> None:
    """The limit of new rates is reached on the first rung, and the second one has not been trained."""

    def outcome(trial: Trial) -> Measured:
        return measured(trial, 1 / trial.learning_rate)

    tune = {**TUNE, "rungs": [0.5, 1.0]}
    progress = simulate(tmp_path, outcome, most_runs=6, tune=tune)
    assert [len(progress.tuned(name).pending) for name in progress.study.contenders] == [2, 2]
    text = write_study_report(progress, ["+study=tiny"], tmp_path).read_text()
    assert "not tuned yet" in text and "at the edge" not in text
    finished = write_study_report(simulate(tmp_path, outcome, tune=tune), ["+study=tiny"], tmp_path).read_text()
    assert "The best rate of copy, untouched is at the edge of the grid" in finished


@pytest.mark.parametrize("best", [0.002, 1e-6, 10.0])
@pytest.mark.parametrize("rungs", [[0.5], [0.2, 1.0]])
def test_once_a_rate_is_chosen_the_plan_has_exactly_the_cost_that_is_left(
    tmp_path: Path, best: float, rungs: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if rates beyond the grid were trained, which the first plan does not foresee."""
    monkeypatch.setattr(StudyProgress, "planned_step_flops", lambda progress, name: 10.0)
    monkeypatch.setattr(plan, "_own_disk", lambda *arguments: 0)
    settings = {"equal_flops": True, "tune": {**TUNE, "rungs": rungs, "max_new_rates": 3}}

    def outcome(trial: Trial) -> Measured:
        return measured(trial, 1 + abs(math.log(trial.learning_rate / best)))

    finished = simulate(tmp_path, outcome, **settings)
    for most_runs in range(len(finished.known()) + 1):
        progress = simulate(tmp_path, outcome, most_runs=most_runs, **settings)
        for cost in plan._costs(progress):
            runs = finished.known(cost.contender)
            missing = [trial for trial in runs if progress.trials.measured(trial) is None]
            total, left = (sum(10.0 * trial.steps for trial in trials) for trials in (runs, missing))
            if progress.tuned(cost.contender).pending:
                assert cost.left is not None and 0 < cost.left <= left
            else:
                assert (cost.flops, cost.left) == (total, left)
