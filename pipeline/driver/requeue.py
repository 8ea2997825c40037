"""Requeues batch jobs that Slurm interrupts, unless they make no progress.

Slurm sends a signal ahead of a time limit or a preemption. The run then saves its state, and the job requeues itself.
Slurm also requeues a job after a node failure. Every restart checks whether anything was finished since the previous
one. Otherwise, a time limit that is too short for one checkpoint would be hit until the project's budget is spent.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from pipeline.config import Settings
from pipeline.driver.graph import Node
from pipeline.driver.submit import slurm_dir
from pipeline.errors import NoProgress
from pipeline.files import read_record, sha256_file, write_json
from pipeline.launch import slurm

DURABLE = ("checkpoints/step-*", "tasks/*.json")  # results that an interrupted stage does not compute again
GROWING = (".model.kept", "checkpoint/progress.json")  # files in which expand and tokenize record their progress


def requeue_this_job() -> str | None:
    """Requeues the batch job that this process is part of, upon which Slurm ends this process.

    Returns:
        A message for the user; None outside a batch job, or if the job was cancelled or must not be requeued.
    """
    job = slurm.job_of(os.environ)
    if job is None:
        return None
    try:
        info = slurm.job_info(job)
        if info is None or not (info.batch and info.may_requeue and _was_interrupted(info)):
            return None
        slurm.requeue(info)
    except slurm.SlurmUnreachable as error:
        return f"job {job} could not be requeued ({error}); submit its script again"
    return f"job {job} is requeued"


def _was_interrupted(info: slurm.JobInfo) -> bool:
    """Whether the job was not cancelled: it is still running, or reached its time limit before it had saved."""
    return info.state == "RUNNING" or info.reason == "TimeLimit"


@contextmanager
def counted_restarts(run: Settings, nodes: Collection[Node]) -> Iterator[None]:
    """Counts the consecutive restarts of this batch job without progress, and forgets the count when the job succeeds.

    Args:
        run: the run whose directory holds the count.
        nodes: everything that this job is to build.

    Raises:
        NoProgress: there were more than ``slurm.max_requeues_without_progress``.
    """
    job = slurm.job_of(os.environ)
    if job is None:
        yield
        return
    record = slurm_dir(run) / f"progress-{job}.json"
    finished = sorted({entry for node in nodes for entry in _finished(node)})
    without_progress = 0
    previous = read_record(
        record, lambda value: isinstance(value["in_vain"], int) and isinstance(value["finished"], list)
    )
    if os.environ.get("SLURM_RESTART_COUNT", "0") != "0" and previous is not None:
        without_progress = previous["in_vain"] + 1 if previous["finished"] == finished else 0
    record.parent.mkdir(parents=True, exist_ok=True)
    write_json(record, {"finished": finished, "in_vain": without_progress})
    if without_progress > run.slurm.max_requeues_without_progress:
        raise _no_progress(run, without_progress)
    yield
    record.unlink(missing_ok=True)


def _no_progress(run: Settings, without_progress: int) -> NoProgress:
    return NoProgress(
        f"Slurm restarted this job {without_progress} times in a row without any progress: no stage, checkpoint or "
        f"benchmark was finished. Allow the stage more time (slurm.STAGE.time), an earlier signal "
        f"(slurm.signal_seconds, now {run.slurm.signal_seconds}) or more frequent checkpoints "
        f"(STAGE.checkpoint_every_steps), and submit again."
    )


def _finished(node: Node) -> list[str]:
    """Identifies the results of a node that a restart does not compute again."""
    if node.artifact.is_complete():
        return [node.artifact.key]
    partial = node.artifact.partial
    found = (path for pattern in DURABLE for path in partial.glob(pattern))
    complete = [path.name for path in found if path.suffix != ".partial"]
    # A file that grows counts by its content: writing the same content again is not progress.
    growing = [f"{name} {sha256_file(partial / name)}" for name in GROWING if (partial / name).is_file()]
    return [f"{node.artifact.key}/{name}" for name in complete + growing]
