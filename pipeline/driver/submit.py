"""A run as dependent batch jobs: one job an artifact that is missing, each after the jobs of its parents.

What a job does is frozen beside its script as JSON, the composed settings included, rather than repeated as a command
line: a job may start days later, and must then do what was asked for and what its dependants wait for, whatever has
become of conf/ meanwhile. The script may be submitted again by hand at any time: a job whose artifact is there does
nothing, and one that was cut off goes on.

    <output_dir>/<name>/slurm/pretrain.sh     the script; sbatch takes it again
                              pretrain.json   what the job does
                              pretrain-12.log what job 12 printed
                              jobs.json       the last job of every artifact
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.artifacts.store import Artifact
from pipeline.config import Settings
from pipeline.driver.graph import Node, forced, select
from pipeline.driver.run import missing
from pipeline.files import read_record, write_json
from pipeline.launch import slurm
from pipeline.launch.slurm import escape_percent
from pipeline.launch.workers import package_environment

FOLDER, JOBS_FILE = "slurm", "jobs.json"
Run = tuple[Settings, Mapping[str, Node]]


@dataclass(frozen=True)
class StageJob:
    """One artifact to be built by one batch job."""

    node: Node
    runs: tuple[Settings, ...]  # that want it: the first builds it, and all link to it
    redo: bool  # although it is there
    sweep: tuple[Settings, ...] = ()  # of a sweep's report: all its runs

    @property
    def place(self) -> Path:
        """Script, JSON and logs, but for their suffixes."""
        return folder(self.runs[0]) / self.node.name.replace("/", "-")


def folder(run: Settings) -> Path:
    """Where a run keeps its jobs."""
    return (Path(run.output_dir) / run.name / FOLDER).absolute()


# ---------------------------------------------------------------------------------------- which jobs


def stage_jobs(runs: Sequence[Run], report: Run | None) -> list[StageJob]:
    """The jobs of these runs, parents first; what several runs share is there once.

    Args:
        report: a sweep's own: its settings, and the one node.
    """
    jobs: dict[str, StageJob] = {}
    for run, nodes in runs:
        redo = forced(select(nodes, run.stages), run.force)
        for node in missing(run, nodes).values():
            known = jobs.get(node.artifact.key, StageJob(node, (), node.name in redo))
            jobs[node.artifact.key] = replace(known, runs=(*known.runs, run))
    if report is not None:
        whole, nodes = report
        for node in missing(whole, nodes).values():
            jobs[node.artifact.key] = StageJob(node, (whole,), redo=False, sweep=tuple(run for run, _ in runs))
    return list(jobs.values())


def frozen(job: StageJob) -> dict[str, Any]:
    """What the job does, as JSON values. ``force`` has been seen to, and a requeued job must not begin again."""
    run = job.runs[0].model_copy(update={"action": "run", "force": [], "stages": [job.node.stage]})
    return {
        "node": job.node.name,
        "key": job.node.artifact.key,
        "run": run.model_dump(mode="json"),
        "linked": [other.name for other in job.runs[1:]],
        "sweep": [other.model_dump(mode="json") for other in job.sweep],
    }


def script(job: StageJob) -> str:
    """The job's batch script."""
    run, place = job.runs[0], job.place
    python_path = package_environment(os.environ)["PYTHONPATH"]
    here = [f"export PYTHONPATH={shlex.quote(python_path)}"]
    settings = run.slurm.model_copy(update={"environment": [*run.slurm.environment, *here]})
    batch = slurm.BatchJob(
        name=f"{run.name}/{job.node.name}",
        command=[sys.executable, "-m", "pipeline", "--job", f"{place}.json"],
        resources=run.slurm.resources(job.node.stage),
        directory=Path.cwd(),
        log=Path(f"{escape_percent(place)}-%j.log"),
    )
    return slurm.batch_script(batch, settings)


# ------------------------------------------------------------------------------------ submitting them


def print_scripts(jobs: Sequence[StageJob], console: Console) -> None:
    """What would be submitted; nothing is left."""
    for job in jobs:
        parents = [parent.node.name for parent in jobs if parent.node.artifact.key in _parent_keys(job)]
        after = f", after {', '.join(parents)}" if parents else ""
        console.print(f"[bold]{job.place}.sh[/]{after}")
        console.print(script(job), markup=False)


def submit(jobs: Sequence[StageJob], console: Console) -> None:
    """Queues all jobs or none. What is in the queue already, from an earlier submission, is not queued again.

    Raises:
        UserError: sbatch refuses one of them.
    """
    known = {key: entry["job"] for key, entry in _still_queued(jobs)}
    for job in jobs:
        if job.node.artifact.key in known:
            console.print(f"  [green]queued[/] {job.node.name:<24} job {known[job.node.artifact.key]} already")
    new = [job for job in jobs if job.node.artifact.key not in known]
    submitted: dict[str, int] = {}
    try:
        for job in new:
            _write(job)
            parents = [known[key] for key in _parent_keys(job) if key in known]
            number = slurm.submit_script(Path(f"{job.place}.sh"), parents)
            known[job.node.artifact.key] = submitted[job.node.artifact.key] = number
            _print_submitted(job, number, parents, console)
    except BaseException:
        slurm.cancel(list(submitted.values()))
        raise
    for job in new:
        if job.redo:
            _invalidate(job.node.artifact)
        _record(job, submitted[job.node.artifact.key])
    if submitted:
        slurm.release(list(submitted.values()))


def _parent_keys(job: StageJob) -> list[str]:
    return list(dict.fromkeys(parent.artifact.key for parent in job.node.parents.values()))


def _write(job: StageJob) -> None:
    job.place.parent.mkdir(parents=True, exist_ok=True)
    write_json(f"{job.place}.json", frozen(job))
    path = Path(f"{job.place}.sh")
    path.write_text(script(job))
    path.chmod(0o755)


def _print_submitted(job: StageJob, number: int, parents: Sequence[int], console: Console) -> None:
    resources = job.runs[0].slurm.resources(job.node.stage)
    gpus = f", {resources.gpus} GPUs each" if resources.gpus else ""
    after = f"after {', '.join(map(str, parents))}" if parents else ""
    size = f"{resources.nodes} node{'s' if resources.nodes > 1 else ''}{gpus}"
    console.print(f"  [cyan]job[/] {number:<8} {job.node.name:<24} {size:<20} {after}")


def _invalidate(artifact: Artifact) -> None:
    """Once and here, so that a job that is requeued goes on."""
    with artifact.lock().held(lambda holder: None):
        artifact.invalidate()


# -------------------------------------------------------------------------------- what was submitted


def recorded(run: Settings) -> dict[str, dict[str, Any]]:
    """The last job of every node of this run, by the node's name: its id, the artifact's key, its log."""
    entries: dict[str, dict[str, Any]] = read_record(folder(run) / JOBS_FILE, _are_jobs) or {}
    return entries


def _are_jobs(value: Any) -> bool:
    entries = value.values()
    return all(isinstance(entry["job"], int) and {"key", "log"} <= entry.keys() for entry in entries)


def _record(job: StageJob, number: int) -> None:
    entry = {
        "job": number,
        "key": job.node.artifact.key,
        "script": f"{job.place}.sh",
        "log": f"{job.place}-{number}.log",
    }
    for run in job.runs:
        folder(run).mkdir(parents=True, exist_ok=True)
        write_json(folder(run) / JOBS_FILE, {**recorded(run), job.node.name: entry})


def _still_queued(jobs: Sequence[StageJob]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Jobs of an earlier submission that will make, or are making, one of these artifacts."""
    for job in jobs:
        for run in job.runs:
            entry = recorded(run).get(job.node.name)
            if entry is None or entry["key"] != job.node.artifact.key:
                continue
            info = slurm.job_info(entry["job"])
            if info is not None and info.active:
                yield job.node.artifact.key, entry
