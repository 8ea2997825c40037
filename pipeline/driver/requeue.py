"""A batch job that Slurm interrupts goes on by itself, but not for ever.

Slurm warns ahead of a time limit or a preemption, the run saves, and the job puts itself back into the queue. It also
comes back after a node failed. Each time it counts whether anything was finished since it last began; a time limit
too short for one checkpoint would otherwise be hit until the project's hours are spent.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from pipeline.config import Settings
from pipeline.driver.graph import Node
from pipeline.driver.submit import folder
from pipeline.errors import NoProgress
from pipeline.files import read_record, sha256_file, write_json
from pipeline.launch import slurm

DURABLE = ("checkpoints/step-*", "tasks/*.json")  # what a stage that was cut off need not do again
GROWING = (".model.kept", "checkpoint/progress.json")  # what expand and tokenize say of how far they got


def requeue_this_job() -> str | None:
    """Puts the batch job around this process back into the queue; Slurm then ends this process.

    Returns:
        What to tell; None where this is no batch job, or one that was cancelled or must not be requeued.
    """
    if "SLURM_JOB_ID" not in os.environ:
        return None
    job = int(os.environ["SLURM_JOB_ID"])
    try:
        info = slurm.job_info(job)
        if info is None or not (info.batch and info.may_requeue and _was_interrupted(info)):
            return None
        slurm.requeue(job)
    except slurm.SlurmUnreachable as error:
        return f"job {job} could not be requeued ({error}); submit its script again"
    return f"job {job} is requeued"


def _was_interrupted(info: slurm.JobInfo) -> bool:
    """Rather than cancelled: it still runs, or its time is up before it had saved."""
    return info.state == "RUNNING" or info.reason == "TimeLimit"


@contextmanager
def counted_restarts(run: Settings, nodes: Collection[Node]) -> Iterator[None]:
    """Counts the restarts of this batch job between which nothing was finished; begins anew when it ends well.

    Args:
        run: in whose directory the count is kept.
        nodes: all that this job is to make.

    Raises:
        NoProgress: they are more than ``slurm.max_requeues_without_progress``.
    """
    if "SLURM_JOB_ID" not in os.environ:
        yield
        return
    record = folder(run) / f"progress-{os.environ['SLURM_JOB_ID']}.json"
    finished = sorted({entry for node in nodes for entry in _finished(node)})
    in_vain = 0
    before = read_record(
        record, lambda value: isinstance(value["in_vain"], int) and isinstance(value["finished"], list)
    )
    if int(os.environ.get("SLURM_RESTART_COUNT", "0")) and before is not None:
        in_vain = before["in_vain"] + 1 if before["finished"] == finished else 0
    record.parent.mkdir(parents=True, exist_ok=True)
    write_json(record, {"finished": finished, "in_vain": in_vain})
    if in_vain > run.slurm.max_requeues_without_progress:
        raise _no_progress(run, in_vain)
    yield
    record.unlink(missing_ok=True)


def _no_progress(run: Settings, in_vain: int) -> NoProgress:
    return NoProgress(
        f"Slurm restarted this job {in_vain} times in a row, and nothing was finished in between: no stage, no "
        f"checkpoint, no benchmark. Give the stage more time (slurm.STAGE.time), a longer warning "
        f"(slurm.signal_seconds, now {run.slurm.signal_seconds}) or more frequent checkpoints "
        f"(STAGE.checkpoint_every_steps), and submit again."
    )


def _finished(node: Node) -> list[str]:
    """What of a node need not be done again."""
    if node.artifact.is_complete():
        return [node.artifact.key]
    partial = node.artifact.partial
    found = (path for pattern in DURABLE for path in partial.glob(pattern))
    whole = [path.name for path in found if path.suffix != ".partial"]
    growing = [f"{name} {sha256_file(partial / name)}" for name in GROWING if (partial / name).is_file()]
    return [f"{node.artifact.key}/{name}" for name in whole + growing]
