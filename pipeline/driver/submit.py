"""``action=submit``: run as batch jobs, one per missing artifact, each depending on the jobs of its parents.

A job's task, with the composed settings, is stored as JSON next to its script rather than repeated as a command line.
A job may start days later and must then build the artifact that was asked for and that other jobs wait for, even if the
files in conf/ have changed since, or the run was submitted again with other settings: the task's file is named by the
artifact's key. The script can be submitted again by hand at any time: a job whose artifact exists does nothing, and one
that was interrupted resumes.

    <output_dir>/<name>/slurm/pretrain.sh                 the script
                              pretrain-0a1b2c3d4e5f.json  the job's task
                              pretrain-12.log             the output of job 12
                              jobs.json                   the last job of every artifact

All jobs are held until every one of them is queued and recorded. Until they are released, a list of their scripts is in
``<output_dir>/artifacts``, so that the next command finds the held jobs of a submission that was killed.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from pipeline.artifacts.lock import Holder, Lock
from pipeline.config import Settings, Slurm
from pipeline.driver.graph import Node
from pipeline.driver.run import Rebuild, Run, forced_nodes, missing_nodes
from pipeline.errors import UserError
from pipeline.files import read_record, write_json, write_text
from pipeline.launch import slurm
from pipeline.launch.environment import python_path
from pipeline.launch.slurm import escape_percent

SLURM_DIR, JOBS_FILE = "slurm", "jobs.json"


@dataclass(frozen=True)
class StageJob:
    """A batch job that builds one artifact.

    Attributes:
        runs: the runs that need the artifact. The first one builds it, and all of them link to it.
        redo: the rebuild that the artifact is part of; None if it is built only because it is missing.
        sweep: all runs of the sweep, if the artifact is the sweep's report.
    """

    node: Node
    runs: tuple[Settings, ...]
    redo: Rebuild | None
    sweep: tuple[Settings, ...] = ()

    @property
    def place(self) -> Path:
        """The path of the script and the logs without their suffixes."""
        return slurm_dir(self.runs[0]) / self.node.name.replace("/", "-")

    @property
    def task_file(self) -> Path:
        """The file with the task. A job of an earlier submission with other settings keeps its own while it waits."""
        return self.place.with_name(f"{self.place.name}-{self.node.artifact.key[:12]}.json")


def slurm_dir(run: Settings) -> Path:
    """The directory of a run's jobs."""
    return (Path(run.output_dir) / run.name / SLURM_DIR).absolute()


# ------------------------------------------------------------------------------------------------ jobs


def stage_jobs(runs: Sequence[Run], report: Run | None) -> list[StageJob]:
    """Creates the jobs of some runs, parents first. An artifact that several runs share gets one job.

    Args:
        report: the report of a sweep: its settings and its only node.

    Raises:
        UserError: Slurm would stop one of the jobs at its start.
    """
    jobs: dict[str, StageJob] = {}
    rebuild = Rebuild.of(runs)
    for run, nodes in [*runs, *([report] if report else [])]:
        redo = forced_nodes(run, nodes)
        for node in missing_nodes(run, nodes).values():
            known = jobs.get(node.artifact.key, StageJob(node, (), rebuild if node.name in redo else None))
            jobs[node.artifact.key] = replace(known, runs=(*known.runs, run))
    if report is not None:
        key = report[1]["report"].artifact.key
        if key in jobs:
            jobs[key] = replace(jobs[key], sweep=tuple(run for run, _ in runs))
    for job in jobs.values():
        _check_time(job.runs[0].slurm, job.node.stage)
    return list(jobs.values())


def _check_time(settings: Slurm, stage: str) -> None:
    """Refuses a time limit that ends with the signal before the program has started and handles signals."""
    if settings.has_time_to_start(stage):
        return
    needed = settings.least_time_seconds
    raise UserError(
        setting=f"slurm.{stage}.time",
        value=settings.resources(stage).time,
        rule=f"Slurm would send the signal to stop (slurm.signal_seconds={settings.signal_seconds}) while the job is "
        f"starting, which kills it; the limit must exceed {needed} seconds",
        remedy=f"Set slurm.{stage}.time to at least {needed // 60 + 1} (minutes), or a smaller slurm.signal_seconds.",
    )


def job_task(job: StageJob) -> dict[str, Any]:
    """Describes a job's task as JSON values.

    ``force`` is dropped: artifacts to be rebuilt are invalidated on submission, and a requeued job must resume.
    """
    run = job.runs[0].model_copy(update={"action": "run", "force": [], "stages": [job.node.stage]})
    return {
        "node": job.node.name,
        "key": job.node.artifact.key,
        "run": run.model_dump(mode="json"),
        "linked": [other.name for other in job.runs[1:]],
        "sweep": [other.model_dump(mode="json") for other in job.sweep],
    }


def job_script(job: StageJob) -> str:
    """Writes a job's batch script."""
    name = f"{job.runs[0].name}/{job.node.name}"
    return command_script(job.runs[0], name, ["--job", str(job.task_file)], job.node.stage, job.place)


def command_script(run: Settings, name: str, arguments: Sequence[str], stage: str, place: Path) -> str:
    """Writes a batch script that runs this program.

    Args:
        run: the settings, for ``slurm``.
        name: the job's name.
        arguments: of the program.
        stage: the stage whose resources the job requests.
        place: the path of the job's files without their suffixes.
    """
    settings = run.slurm.model_copy(update={"environment": [*run.slurm.environment, _export_python_path()]})
    batch = slurm.BatchJob(
        name=name,
        command=[sys.executable, "-m", "pipeline", *arguments],
        resources=run.slurm.resources(stage),
        directory=Path.cwd(),
        log=Path(f"{escape_percent(place)}-%j.log"),
    )
    return slurm.batch_script(batch, settings)


def _export_python_path() -> str:
    """Lets a job import the same package, and what this command or the commands before this one let it find."""
    inherited = os.environ.get("PYTHONPATH")
    own, later = shlex.quote(python_path({})), f":{shlex.quote(inherited)}" if inherited else ""
    return f"export PYTHONPATH={own}${{PYTHONPATH:+:$PYTHONPATH}}{later}"


# ------------------------------------------------------------------------------------------ submission


def print_scripts(jobs: Sequence[StageJob], console: Console) -> None:
    """Prints the scripts that would be submitted. No file is written."""
    for job in jobs:
        parents = [parent.node.name for parent in jobs if parent.node.artifact.key in _parent_keys(job)]
        after = f", after {', '.join(parents)}" if parents else ""
        console.print(f"[bold]{escape(str(job.place))}.sh[/]{after}")
        console.print(job_script(job), markup=False)


def submit_jobs(jobs: Sequence[StageJob], console: Console, last: Path | None = None) -> int | None:
    """Queues all jobs or none. Jobs of an earlier submission that are still in the queue are not queued again.

    Args:
        last: a script to run once all of the jobs have ended, in whatever way.

    Returns:
        The id of the job that runs it.

    Raises:
        UserError: sbatch rejects one of them.
        SlurmUnreachable: Slurm does not answer.
    """
    run = jobs[0].runs[0]
    with _submission_lock(run).held(lambda holder: console.print(f"  [yellow]waits[/]  {holder}")):
        _cancel_held(run, console)
        return _queue_all(jobs, console, last)


def _queue_all(jobs: Sequence[StageJob], console: Console, last: Path | None) -> int | None:
    known = {key: entry["job"] for key, entry in _still_queued(jobs)}
    for job in jobs:
        if job.node.artifact.key in known:
            console.print(f"  [green]queued[/] {job.node.name:<24} job {known[job.node.artifact.key]} already")
    new = [job for job in jobs if job.node.artifact.key not in known]
    if not new and last is None:
        return None
    run = jobs[0].runs[0]
    write_json(_unreleased(run), [*(f"{job.place}.sh" for job in new), *([] if last is None else [str(last)])])
    submitted: list[int] = []
    last_job = None
    try:
        for job in new:
            _write(job)
            parents = [known[key] for key in _parent_keys(job) if key in known]
            number = slurm.submit_script(Path(f"{job.place}.sh"), parents)
            known[job.node.artifact.key] = number
            submitted.append(number)
            _print_submitted(job, number, parents, console)
        if last is not None:
            last_job = slurm.submit_script(last, [known[job.node.artifact.key] for job in jobs], "afterany")
            submitted.append(last_job)
        if rebuild := next((job.redo for job in new if job.redo), None):
            # On submission, so that a job that is requeued resumes.
            rebuild.begin([job.node for job in new if job.redo], console)
        for job in new:
            _record(job, known[job.node.artifact.key])
        slurm.release(submitted)
    except BaseException:
        _cancel_held(run, console)
        raise
    _unreleased(run).unlink()
    return last_job


def _parent_keys(job: StageJob) -> list[str]:
    awaited = [*job.node.parents.values(), *job.node.reuses.values()]
    return list(dict.fromkeys(node.artifact.key for node in awaited))


def _write(job: StageJob) -> None:
    job.place.parent.mkdir(parents=True, exist_ok=True)
    # Only for the user, since shell commands and settings may say more about an account than others should know.
    write_json(job.task_file, job_task(job), mode=0o600)
    write_text(Path(f"{job.place}.sh"), job_script(job), mode=0o700)


def _print_submitted(job: StageJob, number: int, parents: Sequence[int], console: Console) -> None:
    resources = job.runs[0].slurm.resources(job.node.stage)
    gpus = f", {resources.gpus} GPUs each" if resources.gpus else ""
    after = f"after {', '.join(map(str, parents))}" if parents else ""
    size = f"{resources.nodes} node{'s' if resources.nodes > 1 else ''}{gpus}"
    console.print(f"  [cyan]job[/] {number:<8} {job.node.name:<24} {size:<20} {after}")


# ------------------------------------------------------------------------------ interrupted submissions


def cancel_held_jobs(run: Settings, console: Console) -> None:
    """Cancels the jobs that a killed submission of this user left held. One that is still in progress is left alone.

    Raises:
        SlurmUnreachable: Slurm does not answer.
    """
    if not _unreleased(run).exists():
        return
    lock = _submission_lock(run)
    holder = lock.holder()
    if holder is not None and not holder.is_dead(lock.me):
        console.print(f"{holder} is submitting jobs")
        return
    with lock.held(lambda holder: None):
        _cancel_held(run, console)


def _cancel_held(run: Settings, console: Console) -> None:
    """Cancels the held jobs of the last submission, if it did not release them. Only for the lock's holder."""
    scripts = read_record(_unreleased(run), lambda value: isinstance(value, list))
    if scripts is not None:
        try:
            held = slurm.held_jobs(scripts)
            slurm.cancel(held)
        except slurm.SlurmUnreachable as error:
            hint = "jobs of an interrupted submission may be held; the next action=submit or action=status cancels them"
            raise slurm.SlurmUnreachable(f"{error}; {hint}") from error
        if held:
            console.print(f"cancelled jobs that were still held: {', '.join(map(str, held))}")
    _unreleased(run).unlink(missing_ok=True)


def _unreleased(run: Settings) -> Path:
    """The list of the scripts that this user is submitting, or was submitting when the submission was killed."""
    return Path(run.output_dir).absolute() / "artifacts" / f"submission-{os.getuid()}.json"


def _submission_lock(run: Settings) -> Lock:
    return Lock(_unreleased(run).with_suffix(".builder"), Holder.current(os.environ))


# -------------------------------------------------------------------------------------- submitted jobs


def submitted_jobs(run: Settings) -> dict[str, dict[str, Any]]:
    """Reads the last job of every node of a run by the node's name: job id, artifact key, script and log."""
    entries: dict[str, dict[str, Any]] = read_record(slurm_dir(run) / JOBS_FILE, _are_jobs) or {}
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
        slurm_dir(run).mkdir(parents=True, exist_ok=True)
        write_json(slurm_dir(run) / JOBS_FILE, {**submitted_jobs(run), job.node.name: entry})


def _still_queued(jobs: Sequence[StageJob]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Finds the jobs of earlier submissions that will build, or are building, one of these artifacts."""
    for job in jobs:
        for run in job.runs:
            entry = submitted_jobs(run).get(job.node.name)
            if entry is None or entry["key"] != job.node.artifact.key:
                continue
            info = slurm.job_info(entry["job"])
            if info is not None and info.active:
                yield job.node.artifact.key, entry
