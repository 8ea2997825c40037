"""``action=submit`` for a study: its runs as batch jobs, and a last job that repeats the command.

All runs that can start now are submitted together. The last job starts once they have ended, submits what follows from
their results (the next rung, or the final runs) with another last job, and writes the report when nothing is left.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.driver.run import record_keys
from pipeline.driver.submit import SLURM_DIR, command_script, print_scripts, stage_jobs, submit_jobs
from pipeline.errors import WorkersFailed
from pipeline.files import read_record, write_json, write_text
from pipeline.launch import slurm
from pipeline.study.progress import StudyProgress
from pipeline.study.trials import Trial

WAVE_FILE = "study.json"  # the runs of the last submission, and the job that continues after them


def submit_study(progress: StudyProgress, arguments: Sequence[str], console: Console) -> bool:
    """Submits the runs that can start now, and a job that repeats the command after them.

    Args:
        progress: the study so far.
        arguments: those of this command.
        console: where to print the jobs.

    Returns:
        Whether anything was left to submit.

    Raises:
        WorkersFailed: this is the job that continues the study, and a run of the last submission did not finish.
        UserError: sbatch rejects a script.
        SlurmUnreachable: Slurm does not answer.
    """
    pending = progress.pending()
    if not pending:
        return False
    prepared = progress.trials.prepare(pending)
    jobs = stage_jobs([(job.run, job.nodes) for job in prepared], None)
    run, directory = prepared[0].run, progress.trials.directory.absolute() / SLURM_DIR
    if run.dry_run:
        print_scripts(jobs, console)
        return True
    slurm.require_slurm()
    _refuse_repeated(directory, pending)
    for job in prepared:
        record_keys(job.run, job.selected)
    directory.mkdir(parents=True, exist_ok=True)
    script = directory / "study.sh"
    content = command_script(run, f"{progress.study.name}/study", arguments, "report", script.with_suffix(""))
    write_text(script, content, mode=0o700)
    last = submit_jobs(jobs, console, None if _is_waiting(directory) else script)
    if last is not None:
        names = [f"{trial.contender}/{trial.name}" for trial in pending]
        write_json(directory / WAVE_FILE, {"job": last, "runs": names})
        console.print(f"  [cyan]job[/] {last:<8} continues the study after them")
    return True


def _refuse_repeated(directory: Path, pending: Sequence[Trial]) -> None:
    """Stops a study whose runs fail, which would otherwise be submitted again and again.

    Only in the job that continues it: a user who repeats the command wants another attempt.
    """
    wave = _last_wave(directory)
    if wave is None or slurm.job_of(os.environ) != wave["job"]:
        return
    repeated = {f"{trial.contender}/{trial.name}" for trial in pending} & set(wave["runs"])
    if repeated:
        raise WorkersFailed(
            f"{len(repeated)} runs of the last submission did not finish, such as {min(repeated)}: see the logs in "
            f"{directory.parent / min(repeated) / SLURM_DIR}. Repeat the command to submit them again."
        )


def _is_waiting(directory: Path) -> bool:
    """Whether the last job of an earlier submission still waits for the same runs."""
    wave = _last_wave(directory)
    if wave is None or slurm.job_of(os.environ) == wave["job"]:
        return False
    info = slurm.job_info(wave["job"])
    return info is not None and info.active


def _last_wave(directory: Path) -> dict[str, Any] | None:
    wave: dict[str, Any] | None = read_record(
        directory / WAVE_FILE, lambda value: isinstance(value["job"], int) and list(value["runs"])
    )
    return wave
