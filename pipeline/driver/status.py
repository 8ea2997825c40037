"""``action=status``: the artifacts of a run, its jobs, the latest metrics, the time left, and why a stage failed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.config import Settings, Train
from pipeline.driver.graph import Node, select_nodes
from pipeline.driver.run import FAILURE_FILE
from pipeline.driver.submit import cancel_held_jobs, submitted_jobs
from pipeline.files import read_json
from pipeline.launch import slurm
from pipeline.launch.failure import failure_message
from pipeline.tracking import METRICS_FILE, read_metrics
from pipeline.training.schedule import total_steps

FAILED_STATES = frozenset({
    "BOOT_FAIL", "CANCELLED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT",
})  # fmt: skip
SHOWN_METRICS = ("loss", "tokens_per_second", "held_out_loss")


def print_status(run: Settings, nodes: Mapping[str, Node], console: Console) -> None:
    """Prints one line per node, and why it failed if it did."""
    console.print(f"[bold]{run.name}[/]")
    selected = select_nodes(nodes, run.stages)
    # Jobs that were submitted with other settings build other artifacts.
    jobs = {
        name: entry
        for name, entry in submitted_jobs(run).items()
        if name in selected and entry["key"] == selected[name].artifact.key
    }
    infos = _job_infos(run, {name: jobs[name] for name in jobs if not selected[name].artifact.is_complete()}, console)
    for name, node in selected.items():
        entry, info = jobs.get(name), infos.get(name)
        failure = _failure(node, entry, info)
        shown = latest_metrics(node, running=failure is None)
        parts = [f"{_state(node):<8}", f"{name:<24}", node.artifact.key[:12], _job(entry, info), shown]
        console.print("  " + " ".join(part for part in parts if part).rstrip(), markup=False)
        if failure is not None:
            console.print("\n".join(f"           {line}" for line in failure.splitlines()), markup=False)


def _state(node: Node) -> str:
    if node.artifact.is_complete():
        return "complete"
    return "partial" if node.artifact.partial.exists() else "absent"


# --------------------------------------------------------------------------------------------- jobs


def _job_infos(run: Settings, jobs: Mapping[str, Mapping[str, Any]], console: Console) -> dict[str, slurm.JobInfo]:
    """Asks Slurm about jobs, and cancels those that a killed submission left held."""
    found = {}
    try:
        cancel_held_jobs(run, console)
        for name, entry in jobs.items():
            if (info := slurm.job_info(entry["job"])) is not None:
                found[name] = info
    except slurm.SlurmUnreachable as error:  # not asked again, because each answer can take a minute
        console.print(f"Slurm does not answer, so the states of jobs are unknown ({error})", markup=False)
    return found


def _job(entry: Mapping[str, Any] | None, info: slurm.JobInfo | None) -> str:
    """Describes a job, such as ``job 12 RUNNING 00:10:00 of 1-00:00:00, restarts 2``."""
    if entry is None:
        return ""
    if info is None:
        return f"job {entry['job']}"
    reason = f" ({info.reason})" if info.reason != "None" else ""
    time = f" {info.run_time} of {info.time_limit}" if info.state == "RUNNING" else ""
    restarts = f", restarts {info.restarts}" if info.restarts else ""
    return f"job {info.job} {info.state}{reason}{time}{restarts}"


def _failure(node: Node, entry: Mapping[str, Any] | None, info: slurm.JobInfo | None) -> str | None:
    """Returns what the driver recorded when a process of the stage died, or the end of the log of a job that failed."""
    if node.artifact.is_complete():
        return None
    recorded = node.artifact.partial / FAILURE_FILE
    if recorded.exists():
        return recorded.read_text()
    if entry is not None and info is not None and info.state in FAILED_STATES:
        log = Path(entry["log"])
        return failure_message(f"job {info.job} ended: {info.state} ({info.reason})", log) if log.exists() else None
    return None


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
