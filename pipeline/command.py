"""What a command does with its jobs once they are validated: run, plan, submit or status."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pydantic import ValidationError
from rich.console import Console

from pipeline.config import Settings
from pipeline.driver.graph import Node, build_graph, lineage, make_report, select
from pipeline.driver.requeue import counted_restarts
from pipeline.driver.run import link, missing, run_graph
from pipeline.driver.status import print_status
from pipeline.driver.submit import folder, print_scripts, stage_jobs, submit
from pipeline.errors import UserError
from pipeline.files import read_json
from pipeline.launch.machine import Machine
from pipeline.launch.slurm import require_slurm
from pipeline.models.source import ModelSource, resolve
from pipeline.planning import Planner, print_plan
from pipeline.planning.checks import check, check_output, identify, pin_data
from pipeline.report.closing import closing_table


@dataclass(frozen=True)
class Job:
    """One pipeline run, and whether it is one of a sweep's."""

    settings: Settings
    sweep: bool


@dataclass(frozen=True)
class Prepared:
    """A job whose inputs were found, with its graph."""

    run: Settings
    source: ModelSource
    nodes: dict[str, Node]


def execute(jobs: Sequence[Job], console: Console) -> None:
    """Prepares every job before the first starts, then does what ``action`` says.

    Raises:
        UserError: one of the jobs cannot work; none was started.
    """
    action = jobs[0].settings.action
    if action == "plan":
        _plan_all(jobs, console)
        return
    prepared = [_prepare(job.settings) for job in jobs]
    if action == "run":
        _run_all(prepared, jobs[0].sweep, console)
    if action == "submit":
        _submit_all(prepared, jobs[0].sweep, console)
    for job in prepared:
        if action == "status":
            print_status(job.run, job.nodes, console)


def _plan_all(jobs: Sequence[Job], console: Console) -> None:
    planner = Planner()
    for job in jobs:
        print_plan(planner.plan(job.settings), console)
    if jobs[0].sweep:
        first = jobs[0].settings
        place = Path(first.output_dir) / first.name.rpartition("/")[0] / "report"
        console.print(f"and one report over all {len(jobs)} jobs: {place}")


def execute_batch_job(file: Path, console: Console) -> None:
    """Does what one job of ``action=submit`` was submitted for; see ``submit.frozen``.

    Raises:
        UserError: the inputs are not those of the submission any more.
    """
    frozen = read_json(file)
    run, *sweep = (_frozen_settings(values, file) for values in (frozen["run"], *frozen["sweep"]))
    prepared = [_prepare(settings) for settings in sweep or [run]]
    nodes = _sweep_report(prepared)[1] if sweep else prepared[0].nodes
    node = nodes[frozen["node"]]
    if node.artifact.key != frozen["key"]:
        raise _changed(file, f"model, data or program are others, so {node.name} would be another artifact")
    needed = lineage([node])
    job = Prepared(run, prepared[0].source, {name: n for name, n in nodes.items() if n.artifact.key in needed})
    _run_all([job], sweep=False, console=console)
    for name in frozen["linked"]:
        link(run.model_copy(update={"name": name}), node)


def _frozen_settings(values: Mapping[str, object], file: Path) -> Settings:
    try:
        return Settings.model_validate_json(json.dumps(values))
    except ValidationError as error:
        raise _changed(file, "the program's settings are others") from error


def _changed(file: Path, what: str) -> UserError:
    return UserError(
        setting="--job",
        value=file,
        rule=f"{what} than when it was submitted",
        remedy="Submit the run again: the same command with action=submit.",
    )


# ------------------------------------------------------------------------------------------ submit


def _submit_all(jobs: Sequence[Prepared], sweep: bool, console: Console) -> None:
    for job in jobs:
        check(job.run, job.source, missing(job.run, job.nodes), partial(_asked_for, job.run))
    runs = [(job.run, job.nodes) for job in jobs]
    planned = stage_jobs(runs, _sweep_report(jobs) if sweep else None)
    if jobs[0].run.dry_run:
        return print_scripts(planned, console)
    require_slurm()
    if not planned:
        return console.print("everything is there; nothing was submitted")
    submit(planned, console)
    return console.print(f"jobs, scripts and logs: {folder(planned[-1].runs[0])}; add action=status to see how they do")


def _asked_for(run: Settings, stage: str) -> Machine:
    """The nodes that a stage's job will run on."""
    resources = run.slurm.resources(stage)
    return Machine(cores=resources.cpus, gpus=resources.gpus, nodes=resources.nodes)


# --------------------------------------------------------------------------------------------- run


def _run_all(jobs: Sequence[Prepared], sweep: bool, console: Console) -> None:
    for job in jobs:
        check(job.run, job.source, missing(job.run, job.nodes))
    with counted_restarts(jobs[0].run, [node for job in jobs for node in select(job.nodes, job.run.stages).values()]):
        for job in jobs:
            _run(job, console)
        if sweep:
            _report_sweep(jobs, console)


def _prepare(run: Settings) -> Prepared:
    check_output(run)
    source = resolve(run.model)
    if source.commit is not None:  # what a branch stands for now is what will be loaded, however long that takes
        run = run.model_copy(update={"model": run.model.model_copy(update={"revision": source.commit})})
    run = pin_data(run)
    return Prepared(run, source, build_graph(run, identify(run, source)))


def _run(job: Prepared, console: Console) -> None:
    console.print(f"[bold]{job.run.name}[/]  {job.run.expand.method}, seed {job.run.seed}")
    seconds = run_graph(job.run, job.nodes, console)
    if any(seconds.values()):
        _print_seconds(seconds, console)
    else:
        console.print("everything is there; nothing was done")
    report = job.nodes.get("report")
    if report is not None and report.name in seconds:
        console.print(closing_table(report.artifact.path))
        console.print(f"report: {Path(job.run.output_dir) / job.run.name / 'report' / 'report.md'}")
    if any(seconds.values()) and job.run.tracking.wandb == "offline":
        runs = Path(job.run.output_dir) / job.run.name / "wandb" / "offline-run-*"
        console.print(f"to send the metrics to W&B: wandb sync {runs}")


def _print_seconds(seconds: dict[str, float], console: Console) -> None:
    parts = [f"{name} {value:.0f} s" for name, value in seconds.items() if value]
    console.print("seconds by stage: " + ", ".join(parts) + f"; together {sum(seconds.values()):.0f} s")


def _report_sweep(jobs: Sequence[Prepared], console: Console) -> None:
    """One report over all jobs of a sweep, beside them: ``<output_dir>/<name>/report``."""
    whole, nodes = _sweep_report(jobs)
    run_graph(whole, nodes, console)
    node = nodes["report"]
    console.print(closing_table(node.artifact.path))
    console.print(f"report: {Path(whole.output_dir) / whole.name / 'report' / 'report.md'}")


def _sweep_report(jobs: Sequence[Prepared]) -> tuple[Settings, dict[str, Node]]:
    """The sweep as a run of its own, and its one node."""
    whole = jobs[0].run.model_copy(update={"name": jobs[0].run.name.rpartition("/")[0], "stages": ["report"]})
    return whole, {"report": make_report(whole, [(job.run, select(job.nodes, job.run.stages)) for job in jobs])}
