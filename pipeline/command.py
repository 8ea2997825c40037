"""What a command does with its jobs once they are validated: run, plan or status."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from pipeline.artifact import read_json
from pipeline.comparison.closing import closing_table
from pipeline.config import Settings
from pipeline.graph import Node, build_graph, make_report, select
from pipeline.planning import Planner, print_plan
from pipeline.preflight import check, check_output, identify, pin_data
from pipeline.run import missing, run_graph
from pipeline.source import ModelSource, resolve


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
    for job in prepared:
        if action == "status":
            _print_status(job, console)


def _plan_all(jobs: Sequence[Job], console: Console) -> None:
    planner = Planner()
    for job in jobs:
        print_plan(planner.plan(job.settings), console)
    if jobs[0].sweep:
        first = jobs[0].settings
        place = Path(first.output_dir) / first.name.rpartition("/")[0] / "report"
        console.print(f"and one report over all {len(jobs)} jobs: {place}")


def _run_all(jobs: Sequence[Prepared], sweep: bool, console: Console) -> None:
    for job in jobs:
        check(job.run, job.source, missing(job.run, job.nodes))
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


# --------------------------------------------------------------------------------------------- run


def _run(job: Prepared, console: Console) -> None:
    console.print(f"[bold]{job.run.name}[/]  {job.run.expand.method}, seed {job.run.seed}")
    seconds = run_graph(job.run, job.nodes, console)
    if any(seconds.values()):
        _print_seconds(seconds, console)
    else:
        console.print("everything is there; nothing was done")
    report = job.nodes["report"]
    if report.name in seconds:
        console.print(closing_table(read_json(report.artifact.path / "results.json")))
        console.print(f"report: {Path(job.run.output_dir) / job.run.name / 'report' / 'report.md'}")
    if any(seconds.values()) and job.run.tracking.wandb == "offline":
        runs = Path(job.run.output_dir) / job.run.name / "wandb" / "offline-run-*"
        console.print(f"to send the metrics to W&B: wandb sync {runs}")


def _print_seconds(seconds: dict[str, float], console: Console) -> None:
    parts = [f"{name} {value:.0f} s" for name, value in seconds.items() if value]
    console.print("seconds by stage: " + ", ".join(parts) + f"; together {sum(seconds.values()):.0f} s")


def _report_sweep(jobs: Sequence[Prepared], console: Console) -> None:
    """One report over all jobs of a sweep, beside them: ``<output_dir>/<name>/report``."""
    whole = jobs[0].run.model_copy(update={"name": jobs[0].run.name.rpartition("/")[0], "stages": ["report"]})
    node = make_report(whole, [(job.run, select(job.nodes, job.run.stages)) for job in jobs])
    run_graph(whole, {node.name: node}, console)
    console.print(closing_table(read_json(node.artifact.path / "results.json")))
    console.print(f"report: {Path(whole.output_dir) / whole.name / 'report' / 'report.md'}")


# ------------------------------------------------------------------------------------------ status


def _print_status(job: Prepared, console: Console) -> None:
    console.print(f"[bold]{job.run.name}[/]")
    for name, node in select(job.nodes, job.run.stages).items():
        console.print(f"  {_state(node):<8} {name:<24} {node.artifact.key[:12]}  {_last_metrics(node)}")


def _state(node: Node) -> str:
    if node.artifact.is_complete():
        return "there"
    return "partial" if node.artifact.partial.exists() else "absent"


def _last_metrics(node: Node) -> str:
    """The newest line of the stage's metrics, finished or not."""
    for directory in (node.artifact.path, node.artifact.partial):
        path = directory / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        if lines:
            shown = json.loads(lines[-1])
            return "  ".join(f"{key} {value:.4g}" for key, value in shown.items() if isinstance(value, (int, float)))
    return ""
