"""What the actions of a study do: print its plan, run or submit its next runs, show its state, write its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from pipeline.command import run_prepared
from pipeline.config import Settings
from pipeline.config.section import setting_value
from pipeline.config.study import Study
from pipeline.driver.run import is_linked, keys_recorded, link, record_keys
from pipeline.errors import UserError, WorkersFailed
from pipeline.files import disk_errors_as_user_errors
from pipeline.planning import refuse_blocked
from pipeline.study.batch import submit_study
from pipeline.study.plan import print_study_plan, print_study_status
from pipeline.study.progress import StudyProgress
from pipeline.study.trials import Compose, Trial, Trials

ACTIONS = ("run", "plan", "submit", "status")


@dataclass(frozen=True)
class StudyCommand:
    """A study, and how its runs are composed.

    Attributes:
        overrides: of all runs, from the command line.
        arguments: the complete command line, for batch jobs and the report.
        compose: turns overrides into settings.
    """

    study: Study
    overrides: Sequence[str]
    arguments: Sequence[str]
    compose: Compose


def execute_study(command: StudyCommand, console: Console) -> None:
    """Composes and checks every contender before the first run starts, then does what ``action`` says.

    Raises:
        UserError: a contender cannot work, and nothing was started; or the disk is full or fails.
        WorkersFailed: a process of a run died for another reason than a loss that is not finite.
    """
    study = command.study
    bases = {
        name: command.compose([*study.common, *contender.overrides, *command.overrides, f"name={study.name}/{name}"])
        for name, contender in study.contenders.items()
    }
    _check(study, bases)
    first = bases[study.reference]
    progress = StudyProgress(Trials(study, bases))
    with disk_errors_as_user_errors(Path(first.output_dir)):
        if first.action == "plan":
            print_study_plan(progress, console)
        elif first.action == "status":
            print_study_status(progress, console)
        else:
            _refuse_blocked(progress)
            if first.action == "run":
                _run(progress, command.arguments, console)
            elif not submit_study(progress, command.arguments, console):
                finish(progress, command.arguments, console)


def _run(progress: StudyProgress, arguments: Sequence[str], console: Console) -> None:
    """Finishes one contender after the other, and writes the report after each."""
    current: str | None = None
    while pending := progress.pending():
        if current not in (None, pending[0].contender):
            finish(progress, arguments, console)
        current = pending[0].contender
        now = [trial for trial in pending if trial.contender == current]
        for number, trial in enumerate(now, 1):
            console.print(f"[bold]{escape(current)}[/] {escape(trial.name)} ({number} of {len(now)} that can run now)")
            _build(progress.trials, trial, console)
    finish(progress, arguments, console)


def _build(trials: Trials, trial: Trial, console: Console) -> None:
    (prepared,) = trials.prepare([trial])
    try:
        run_prepared([prepared], sweep=False, console=console)
    except WorkersFailed:
        measured = trials.measured(trial)
        if measured is None or not measured.diverged:
            raise
        console.print("  [yellow]diverged[/]: the loss is not finite, which counts as an infinite loss")


def finish(progress: StudyProgress, arguments: Sequence[str], console: Console) -> None:
    """Links the runs that were found finished, such as those of another study, and writes the report.

    Args:
        progress: the study.
        arguments: the command line, to repeat the study.
        console: where to print the path of the report.
    """
    from pipeline.study.report import write_study_report

    for trial in progress.known():
        (prepared,) = progress.trials.prepare([trial])
        if not prepared.missing and not keys_recorded(prepared.run, prepared.selected):
            record_keys(prepared.run, prepared.selected)
        for node in prepared.selected.values():
            if node.artifact.is_complete() and not is_linked(prepared.run, node):
                link(prepared.run, node)
    console.print(
        f"report: {write_study_report(progress, arguments, progress.trials.directory / 'report')}", markup=False
    )


# ------------------------------------------------------------------------------------------- checks


def _check(study: Study, bases: Mapping[str, Settings]) -> None:
    """Checks what can be told from the settings alone.

    Raises:
        UserError: a study does not support the action, there is no validation split, or contenders cannot be compared.
    """
    first = bases[study.reference]
    if first.action not in ACTIONS:
        raise UserError(
            setting="action",
            value=first.action,
            rule=f"a study supports only {', '.join(ACTIONS)}",
            remedy="For other actions, use scripts/run with the settings of one of its runs.",
        )
    if first.data.validation_fraction == 0:
        raise UserError(
            setting="data.validation_fraction",
            value=0,
            rule="a study selects learning rates on a validation split, not on the held-out one",
            remedy="Add data.validation_fraction=0.05 to the study's common settings.",
        )
    for name, base in bases.items():
        for setting in ("data", "pretrain.sequence_length", "pretrain.held_out_blocks", "output_dir", "model.path"):
            value, expected = (setting_value(settings, setting) for settings in (base, first))
            if value != expected:
                raise UserError(
                    setting=f"{setting} (study, contenders.{name})",
                    value=value,
                    rule=f"losses on other text cannot be compared, and {study.reference} has {expected}",
                    remedy="Set it in the study's common settings.",
                )


def _refuse_blocked(progress: StudyProgress) -> None:
    """Applies the checks of ``scripts/run`` to the first and the longest run of every contender.

    Raises:
        UserError: one of them would be stopped.
    """
    study, trials = progress.study, progress.trials
    for name in study.contenders:
        rate = study.rates_of(name)[0]
        first = progress.rung_trials(name, 0, rate)[0]
        last = progress.final_trial(name, trials.token_steps[name], rate, study.seeds[0])
        for prepared in trials.prepare([first, last]):
            refuse_blocked(prepared)
