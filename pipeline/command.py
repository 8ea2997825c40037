"""Carries out a command whose settings are valid: what ``action`` says, from ``run`` to ``export``."""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape

from pipeline.config import MODEL_TARGETS, Settings
from pipeline.driver.chat import chat
from pipeline.driver.clean import clean
from pipeline.driver.graph import Node, lineage, make_report, select_nodes
from pipeline.driver.notify import notified
from pipeline.driver.requeue import counted_restarts
from pipeline.driver.run import REBUILD_RECORDS, Rebuild, Run, forced_nodes, link, record_keys, run_graph
from pipeline.driver.status import print_status
from pipeline.driver.submit import print_scripts, slurm_dir, stage_jobs, submit_jobs
from pipeline.driver.target import FinishedModel, finished_models, requested_targets
from pipeline.driver.verify import verify
from pipeline.errors import UserError
from pipeline.export import export_model
from pipeline.files import disk_errors_as_user_errors, read_record
from pipeline.launch.slurm import job_of, require_slurm
from pipeline.planning import (
    INPUT_CHECKS,
    PreparedRun,
    make_plans,
    prepare,
    print_plan,
    refuse_blocked,
    without_force,
)
from pipeline.report.closing import closing_table
from pipeline.trackers import wandb_mode

STATUS_SECONDS = 5.0  # between two updates of the status


@dataclass(frozen=True)
class Job:
    """The settings of a run, and whether the run is part of a sweep."""

    settings: Settings
    sweep: bool


def execute(jobs: Sequence[Job], console: Console) -> None:
    """Prepares and checks every job before the first one starts, then does what ``action`` says.

    Raises:
        UserError: one of the jobs cannot work, and none was started; or the disk is full or fails.
    """
    with disk_errors_as_user_errors(Path(jobs[0].settings.output_dir)):  # hashes of inputs are also written there
        _execute(jobs, console)


def _execute(jobs: Sequence[Job], console: Console) -> None:
    action, sweep = jobs[0].settings.action, jobs[0].sweep
    if action == "clean":
        for output_dir in dict.fromkeys(job.settings.output_dir for job in jobs):
            clean(Path(output_dir), jobs[0].settings.confirm, console)
        return
    if action in ("chat", "export"):
        models, nodes = _finished_models(jobs)
        if action == "chat":
            chat(jobs[0].settings, models)
        else:
            export_model(jobs[0].settings, models[0], nodes, console)
        return
    prepared = prepare([job.settings for job in jobs])
    if action in ("run", "plan", "submit") and jobs[0].settings.force and not prepared[0].run.force:
        records = Path(prepared[0].run.output_dir) / "artifacts" / REBUILD_RECORDS
        console.print(
            f"force: the rebuild that this command began is unfinished and continues (record: {records})", markup=False
        )
    if action == "plan":
        _plan_all(prepared, sweep, console)
        return
    if action in ("status", "verify"):
        _inspect_all(prepared, sweep, console)
        return
    for job in prepared:
        refuse_blocked(job)
    if action == "submit":
        _submit_all(prepared, sweep, console)
    else:
        run_prepared(prepared, sweep, console)


def _inspect_all(jobs: Sequence[PreparedRun], sweep: bool, console: Console) -> None:
    for job in jobs:
        refuse_blocked(job, INPUT_CHECKS)
    runs = [(job.run, job.nodes) for job in jobs] + ([_sweep_report(jobs)] if sweep else [])
    if jobs[0].run.action == "verify":
        verify(runs, console)
    elif jobs[0].run.watch:
        _watch(runs, console)
    else:
        for run, nodes in runs:
            print_status(run, nodes, console)


def _finished_models(jobs: Sequence[Job]) -> tuple[list[FinishedModel], Mapping[str, Node]]:
    """Returns the models that a command is about, and the run's graph.

    The graph is empty, and inputs of the run are not looked up, if no model is a stage's.
    """
    run = jobs[0].settings
    if jobs[0].sweep:
        raise UserError(setting="action", value=run.action, rule="it is not for sweeps", remedy="Leave out --multirun.")
    setting, names = requested_targets(run)
    if set(names).isdisjoint(MODEL_TARGETS):
        return finished_models(run, names, setting, {}), {}
    (prepared,) = prepare([run])
    refuse_blocked(prepared, INPUT_CHECKS)
    return finished_models(prepared.run, names, setting, prepared.nodes), prepared.nodes


def _watch(runs: Sequence[Run], console: Console) -> None:
    """Repeats the status until all artifacts are complete, or until Ctrl-C."""
    with suppress(KeyboardInterrupt):
        while True:
            console.clear()  # has no effect if the output is not a terminal
            for run, nodes in runs:
                print_status(run, nodes, console)
            selected = [node for run, nodes in runs for node in select_nodes(nodes, run.stages).values()]
            if all(node.artifact.is_complete() for node in selected):
                return
            time.sleep(STATUS_SECONDS)


def _plan_all(jobs: Sequence[PreparedRun], sweep: bool, console: Console) -> None:
    for plan in make_plans(jobs):
        print_plan(plan, console)
    if sweep:
        first = jobs[0].run
        path = Path(first.output_dir) / first.name.rpartition("/")[0] / "report"
        console.print(f"and one report over all {len(jobs)} jobs: {path}", markup=False)


def execute_batch_job(file: Path, console: Console) -> None:
    """Carries out the task of a job that ``action=submit`` submitted.

    Args:
        file: the task as ``driver.submit.job_task`` describes it.

    Raises:
        UserError: the inputs have changed since the submission, or the disk is full or fails.
    """
    with disk_errors_as_user_errors(file.parent):
        _execute_batch_job(file, console)


def _execute_batch_job(file: Path, console: Console) -> None:
    names = {"node", "key", "run", "linked", "sweep"}
    task = read_record(file, lambda value: names <= value.keys()) if os.path.isfile(file) else None
    if task is None:
        raise _unusable_task(file, "it must be the file that action=submit wrote for this job")
    run, *sweep = (_submitted_settings(values, file) for values in (task["run"], *task["sweep"]))
    prepared = prepare(sweep or [run])
    for each in prepared:
        refuse_blocked(each, INPUT_CHECKS)
    nodes = _sweep_report(prepared)[1] if sweep else prepared[0].nodes
    node = nodes[task["node"]]
    if node.artifact.key != task["key"]:
        raise _unusable_task(
            file,
            f"since this job was submitted, the model, the data or the program has changed, and {node.name} with it",
        )
    needed = lineage([node])
    job = replace(prepared[0], run=run, nodes={name: n for name, n in nodes.items() if n.artifact.key in needed})
    refuse_blocked(job)
    run_prepared([job], sweep=False, console=console)
    for name in task["linked"]:
        link(run.model_copy(update={"name": name}), node)


def _submitted_settings(values: Mapping[str, object], file: Path) -> Settings:
    try:
        return Settings.model_validate_json(json.dumps(values))
    except ValidationError as error:
        raise _unusable_task(file, "since this job was submitted, the program accepts other settings now") from error


def _unusable_task(file: Path, rule: str) -> UserError:
    return UserError(setting="--job", value=file, rule=rule, remedy="Submit the run again with action=submit.")


# ------------------------------------------------------------------------------------------ submit


def _submit_all(jobs: Sequence[PreparedRun], sweep: bool, console: Console) -> None:
    runs = [(job.run, job.nodes) for job in jobs]
    report = _sweep_report(jobs) if sweep else None
    planned = stage_jobs(runs, report)
    if jobs[0].run.dry_run:
        return print_scripts(planned, console)
    require_slurm()
    for run, nodes in [*((job.run, job.selected) for job in jobs), *([report] if report else [])]:
        record_keys(run, nodes)
    if not planned:
        return console.print("all artifacts are complete; nothing was submitted")
    submit_jobs(planned, console)
    place = slurm_dir(planned[-1].runs[0])
    return console.print(f"jobs, scripts and logs: {place}; action=status shows their state", markup=False)


# --------------------------------------------------------------------------------------------- run


def run_prepared(jobs: Sequence[PreparedRun], sweep: bool, console: Console) -> None:
    """Builds what is missing of runs that passed all checks; for a sweep, also the report on all of them."""
    first = jobs[0].run
    with (
        notified(*_ending(jobs, sweep)),
        disk_errors_as_user_errors(Path(first.output_dir)),
        counted_restarts(first, [node for job in jobs for node in job.selected.values()]),
    ):
        jobs = _begin_rebuild(jobs, sweep, console)
        for job in jobs:
            _run(job, console)
        if sweep:
            _report_sweep(jobs, console)


def _begin_rebuild(jobs: Sequence[PreparedRun], sweep: bool, console: Console) -> Sequence[PreparedRun]:
    """Invalidates what ``force`` names, once for all jobs, which then only build what is missing."""
    runs = [(job.run, job.nodes) for job in jobs]
    rebuild = Rebuild.of(runs)
    if rebuild is None:
        return jobs
    together = [*runs, _sweep_report(jobs)] if sweep else runs
    rebuild.begin([node for run, nodes in together for node in forced_nodes(run, nodes).values()], console)
    return [without_force(job) for job in jobs]


def _ending(jobs: Sequence[PreparedRun], sweep: bool) -> tuple[Settings, Path | None]:
    """Returns the settings of a run or sweep, and the path to notify about: the report, or without one the directory.

    The path is None for a batch job that does not build the report, since other jobs complete the run.
    """
    run = _sweep_report(jobs)[0] if sweep else jobs[0].run
    path = Path(run.output_dir) / run.name
    if sweep or "report" in jobs[0].selected:
        return run, path / "report" / "report.md"
    return run, path if job_of(os.environ) is None else None


def _run(job: PreparedRun, console: Console) -> None:
    console.print(f"[bold]{escape(job.run.name)}[/]  {escape(job.run.summary)}")
    seconds = run_graph(job.run, job.nodes, console)
    if any(seconds.values()):
        _print_seconds(seconds, console)
    else:
        console.print("all artifacts are complete; nothing was done")
    report = job.nodes.get("report")
    if report is not None and report.name in seconds:
        console.print(closing_table(report.artifact.path))
        _print_report(job.run, console)
    if any(seconds.values()) and wandb_mode(job.run.tracking) == "offline":
        runs = Path(job.run.output_dir) / job.run.name / "wandb"
        console.print(f"to upload the metrics to W&B: wandb sync {shlex.quote(str(runs))}/offline-run-*", markup=False)


def _print_report(run: Settings, console: Console) -> None:
    console.print(f"report: {Path(run.output_dir) / run.name / 'report' / 'report.md'}", markup=False)


def _print_seconds(seconds: dict[str, float], console: Console) -> None:
    parts = [f"{name} {value:.0f} s" for name, value in seconds.items() if value]
    console.print("seconds by stage: " + ", ".join(parts) + f"; total {sum(seconds.values()):.0f} s")


def _report_sweep(jobs: Sequence[PreparedRun], console: Console) -> None:
    """Builds one report on all jobs of a sweep and links it as ``<output_dir>/<name>/report``."""
    settings, nodes = _sweep_report(jobs)
    run_graph(settings, nodes, console)
    node = nodes["report"]
    console.print(closing_table(node.artifact.path))
    _print_report(settings, console)


def _sweep_report(jobs: Sequence[PreparedRun]) -> tuple[Settings, dict[str, Node]]:
    """Returns the settings and the only node of the report on a sweep."""
    settings = jobs[0].run.model_copy(update={"name": jobs[0].run.name.rpartition("/")[0], "stages": ["report"]})
    return settings, {"report": make_report(settings, [(job.run, job.selected) for job in jobs])}
