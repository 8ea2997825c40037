"""``action=status``: the artifacts of a run, its jobs, the latest metrics, the time left, and why a stage failed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from pipeline.artifacts.store import ATTEMPTS_FILE
from pipeline.config import Settings, Train
from pipeline.driver.graph import Node, select_nodes
from pipeline.driver.run import FAILURE_FILE
from pipeline.driver.submit import cancel_held_jobs, submitted_jobs
from pipeline.files import read_json
from pipeline.launch import slurm
from pipeline.launch.failure import failure_message
from pipeline.tracking import METRICS_FILE, read_metrics
from pipeline.training.schedule import total_steps

Infos = Mapping[int, slurm.JobInfo | None]  # by job: None if Slurm has forgotten it, no entry if it was not asked
SHOWN_METRICS = ("loss", "tokens_per_second", "held_out_loss")


def print_status(run: Settings, nodes: Mapping[str, Node], console: Console) -> None:
    """Prints one line per node, and why it failed if it did."""
    console.print(f"[bold]{escape(run.name)}[/]")
    selected = select_nodes(nodes, run.stages)
    # Jobs that were submitted with other settings build other artifacts.
    jobs = {
        name: entry
        for name, entry in submitted_jobs(run).items()
        if name in selected and entry["key"] == selected[name].artifact.key
    }
    infos = _job_infos(run, {name: jobs[name] for name in jobs if not selected[name].artifact.is_complete()}, console)
    for name, node in selected.items():
        job = _job(jobs[name], infos) if name in jobs else ""
        failure = _failure(node, jobs.get(name), infos)
        shown = latest_metrics(node, running=failure is None)
        parts = [f"{_state(node):<8}", f"{name:<24}", node.artifact.key[:12], job, shown]
        console.print("  " + " ".join(part for part in parts if part).rstrip(), markup=False)
        if failure is not None:
            console.print("\n".join(f"           {line}" for line in failure.splitlines()), markup=False)


def _state(node: Node) -> str:
    if node.artifact.is_complete():
        return "complete"
    return "partial" if node.artifact.partial.exists() else "absent"


# --------------------------------------------------------------------------------------------- jobs


def _job_infos(run: Settings, jobs: Mapping[str, Mapping[str, Any]], console: Console) -> Infos:
    """Asks Slurm about jobs, and cancels those that a killed submission left held."""
    found = {}
    try:
        cancel_held_jobs(run, console)
        for entry in jobs.values():
            found[entry["job"]] = slurm.job_info(entry["job"])
    except slurm.SlurmUnreachable as error:  # not asked again, because each answer can take a minute
        console.print(f"Slurm does not answer, so the states of jobs are unknown ({error})", markup=False)
    return found


def _job(entry: Mapping[str, Any], infos: Infos) -> str:
    """Describes a job, such as ``job 12 RUNNING 00:10:00 of 1-00:00:00, restarts 2``."""
    info = infos.get(entry["job"])
    if info is None:
        return f"job {entry['job']}" + (" ended" if entry["job"] in infos else "")
    reason = f" ({info.reason})" if info.reason != "None" else ""
    time = f" {info.run_time} of {info.time_limit}" if info.state == "RUNNING" else ""
    restarts = f", restarts {info.restarts}" if info.restarts else ""
    return f"job {info.job} {info.state}{reason}{time}{restarts}"


def _failure(node: Node, entry: Mapping[str, Any] | None, infos: Infos) -> str | None:
    """Returns what the driver recorded when a process of the stage died, or the end of the log of a job that failed."""
    if node.artifact.is_complete():
        return None
    recorded = node.artifact.partial / FAILURE_FILE
    if recorded.exists():
        return recorded.read_text()
    if entry is None or entry["job"] not in infos or not _was_last(Path(entry["log"]), node):
        return None
    info = infos[entry["job"]]
    if info is None:  # it failed, unless its artifact was finished and is built again
        ending = ", and Slurm has forgotten how" if not node.artifact.path.exists() else None
    else:
        ending = f": {info.state} ({info.reason})" if info.state in slurm.FAILED else None
    return None if ending is None else failure_message(f"job {entry['job']} ended{ending}", Path(entry["log"]))


def _was_last(log: Path, node: Node) -> bool:
    """Whether a job has written its log, and nothing has begun to build the artifact since."""
    attempts = node.artifact.partial / ATTEMPTS_FILE
    return log.exists() and not (attempts.exists() and attempts.stat().st_mtime > log.stat().st_mtime)


# ------------------------------------------------------------------------------------------ metrics


def latest_metrics(node: Node, running: bool) -> str:
    """Describes a node's latest metrics; for training, also its step and, while it is running, the time left."""
    directory = node.artifact.path if node.artifact.is_complete() else node.artifact.partial
    lines = read_metrics(directory / METRICS_FILE)
    if not lines:
        return ""
    latest = {key: value for line in lines for key, value in line.items() if isinstance(value, (int, float))}
    shown = [f"{key} {latest[key]:.4g}" for key in SHOWN_METRICS if key in latest]
    if isinstance(node.settings, Train):
        steps = _total_steps(node, node.settings)
        shown.insert(0, f"step {latest['step']}" + ("" if steps is None else f" of {steps}"))
        shown += _time_left(latest, steps) if running and steps is not None else []
    return ", ".join(shown)


def _total_steps(node: Node, train: Train) -> int | None:
    """Returns the number of steps; None if it depends on data that have been removed since."""
    if train.steps is not None:
        return train.steps
    data = node.parents["data"].artifact
    return total_steps(train, read_json(data.path / "dataset.json")["blocks"]["train"]) if data.is_complete() else None


def _time_left(latest: Mapping[str, float], steps: int) -> list[str]:
    step, seconds = int(latest["step"]), latest.get("seconds", 0.0)
    if not 0 < step < steps:
        return []
    left = round(seconds / step * (steps - step))
    return [f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"]
