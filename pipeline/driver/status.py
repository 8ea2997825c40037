"""What there is of a run: artifacts, jobs, the newest numbers, time left; after a failure its last words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.config import Settings, Train
from pipeline.driver.graph import Node, select
from pipeline.driver.run import FAILURE_FILE
from pipeline.driver.submit import recorded
from pipeline.files import read_json
from pipeline.launch import slurm
from pipeline.launch.failure import failure_message
from pipeline.tracking import METRICS_FILE, read_metrics
from pipeline.training.schedule import total_steps

ENDED_BADLY = frozenset({
    "BOOT_FAIL", "CANCELLED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT",
})  # fmt: skip
SHOWN_METRICS = ("loss", "tokens_per_second", "held_out_loss")


def print_status(run: Settings, nodes: Mapping[str, Node], console: Console) -> None:
    """One line a node, and under it why it failed."""
    console.print(f"[bold]{run.name}[/]")
    jobs = recorded(run)
    for name, node in select(nodes, run.stages).items():
        entry = jobs.get(name)
        if entry is not None and entry["key"] != node.artifact.key:
            entry = None  # of other settings
        info = _info(entry) if entry is not None and not node.artifact.is_complete() else None
        words = _failure(node, entry, info)
        shown = numbers(node, under_way=words is None)
        parts = [f"{_state(node):<8}", f"{name:<24}", node.artifact.key[:12], _job(entry, info), shown]
        console.print("  " + " ".join(part for part in parts if part).rstrip(), markup=False)
        if words is not None:
            console.print("\n".join(f"           {line}" for line in words.splitlines()), markup=False)


def _state(node: Node) -> str:
    if node.artifact.is_complete():
        return "there"
    return "partial" if node.artifact.partial.exists() else "absent"


# --------------------------------------------------------------------------------------------- jobs


def _info(entry: Mapping[str, Any]) -> slurm.JobInfo | None:
    try:
        return slurm.job_info(entry["job"])
    except slurm.SlurmUnreachable:
        return None


def _job(entry: Mapping[str, Any] | None, info: slurm.JobInfo | None) -> str:
    """``job 12 RUNNING 00:10:00 of 1-00:00:00, restarted twice``."""
    if entry is None:
        return ""
    if info is None:
        return f"job {entry['job']}"
    reason = f" ({info.reason})" if info.reason != "None" else ""
    time = f" {info.run_time} of {info.time_limit}" if info.state == "RUNNING" else ""
    restarts = f", restarts {info.restarts}" if info.restarts else ""
    return f"job {info.job} {info.state}{reason}{time}{restarts}"


def _failure(node: Node, entry: Mapping[str, Any] | None, info: slurm.JobInfo | None) -> str | None:
    """What the driver said when a stage's process died; else, of a job that ended badly, the end of its log."""
    if node.artifact.is_complete():
        return None
    told = node.artifact.partial / FAILURE_FILE
    if told.exists():
        return told.read_text()
    if entry is not None and info is not None and info.state in ENDED_BADLY:
        log = Path(entry["log"])
        return failure_message(f"job {info.job} ended: {info.state} ({info.reason})", log) if log.exists() else None
    return None


# ------------------------------------------------------------------------------------------ numbers


def numbers(node: Node, under_way: bool) -> str:
    """Step, newest metrics and, of training under way, the time left."""
    directory = node.artifact.path if node.artifact.is_complete() else node.artifact.partial
    lines = read_metrics(directory / METRICS_FILE)
    if not lines:
        return ""
    newest = {key: value for line in lines for key, value in line.items() if isinstance(value, (int, float))}
    shown = [f"{key} {newest[key]:.4g}" for key in SHOWN_METRICS if key in newest]
    if isinstance(node.settings, Train):
        steps = _total_steps(node, node.settings)
        shown.insert(0, f"step {newest['step']} of {steps}")
        shown += _time_left(newest, steps) if under_way else []
    return ", ".join(shown)


def _total_steps(node: Node, train: Train) -> int:
    return total_steps(train, read_json(node.parents["data"].artifact.path / "dataset.json")["blocks"]["train"])


def _time_left(newest: Mapping[str, float], steps: int) -> list[str]:
    step, seconds = int(newest["step"]), newest.get("seconds", 0.0)
    if not 0 < step < steps:
        return []
    left = round(seconds / step * (steps - step))
    return [f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"]
