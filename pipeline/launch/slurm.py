"""An interface to Slurm: batch scripts, commands that submit and inspect jobs, and the allocation of this process.

``batch_script`` is a pure function. Everything else calls ``sbatch``, ``scontrol`` or ``scancel``. ``sacct`` is not
used, so that clusters without accounting are supported. This module does not depend on the pipeline's stages.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from pipeline.config import Resources, Slurm
from pipeline.errors import UserError

# The states of a job that has failed. In all others but COMPLETED, such as RESV_DEL_HOLD, it is running or will run.
FAILED = frozenset({
    "BOOT_FAIL", "CANCELLED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT",
})  # fmt: skip
COMMAND_SECONDS = 60
# Which Slurm its commands reach, and what they may do there. All other variables within a job describe that job.
ACCESS_VARIABLES = re.compile("SLURM_(CONF|CONF_SERVER|CLUSTERS|JWT|UMASK)")
JOB_VARIABLES = re.compile("(SLURM|SLURMD|SRUN)_.*|CUDA_VISIBLE_DEVICES")


class SlurmUnreachable(RuntimeError):
    """Slurm's commands are missing or its controller does not answer, so a job's state is unknown."""


# ------------------------------------------------------------------------------------------- scripts


@dataclass(frozen=True)
class BatchJob:
    """A batch job, without the settings that apply to all jobs."""

    name: str
    command: Sequence[str]
    resources: Resources  # one task per node, which gets all of the job's resources on that node
    directory: Path  # the command's working directory
    log: Path  # standard output and error, appended to after a requeue; %j is replaced by the job's id


def batch_script(job: BatchJob, slurm: Slurm) -> str:
    """Returns the script for ``sbatch``, which can also be resubmitted by hand.

    The command replaces the shell (``exec``), because Slurm sends the signal that precedes the time limit to the batch
    shell (``B:``), and a shell would not pass it on before its child ends.
    """
    resources = job.resources
    options: dict[str, object] = {
        "job-name": job.name,
        "chdir": str(job.directory),
        "output": str(job.log),
        "open-mode": "append",
        "partition": resources.partition or slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "nodes": resources.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": resources.cpus,
        "gpus-per-node": resources.gpus or None,
        "mem": resources.memory,
        "time": resources.time,
        "signal": f"B:USR1@{slurm.signal_seconds}",
        "kill-on-invalid-dep": "yes",
    }
    given = [_option(name, str(value)) for name, value in options.items() if value is not None]
    # The user's own options come last, since sbatch uses the last value of an option that is given twice.
    lines = [f"#SBATCH {option}" for option in [*given, "--requeue", *slurm.options, *resources.options]]
    return "\n".join(
        ["#!/usr/bin/env bash", *lines, "set -e", *slurm.environment, f"exec {shlex.join(job.command)}", ""]
    )


def _option(name: str, value: str) -> str:
    if "\n" in value or "\r" in value:  # settings are checked before, but not the directory of the command
        raise UserError(
            setting=f"sbatch --{name}",
            value=repr(value),
            rule="an option of a batch script is one line, and the rest would run as shell commands",
            remedy="Start the command in a directory without line breaks in its path.",
        )
    return f"--{name}={shlex.quote(value)}"


def escape_percent(path: Path) -> str:
    """Returns a path for Slurm's ``--output``, in which a percent sign starts a placeholder unless it is doubled."""
    return str(path).replace("%", "%%")


# ------------------------------------------------------------------------------------------ commands


def require_slurm() -> None:
    """Raises a ``UserError`` if Slurm's commands are not installed."""
    if shutil.which("sbatch") is None:
        raise UserError(
            setting="action",
            value="submit",
            rule="sbatch is not installed on this machine",
            remedy="Run the command on a login node of the cluster, or add dry_run=true to print the scripts.",
        )


def submit_script(script: Path, parents: Iterable[int], condition: Literal["afterok", "afterany"] = "afterok") -> int:
    """Submits a script. The job is held until ``release``, and starts after its parents.

    Args:
        script: the batch script.
        parents: the ids of jobs.
        condition: afterok if all of them must have succeeded, afterany if they need only have ended.

    Returns:
        The job's id.

    Raises:
        UserError: sbatch rejects the script. The message quotes its error.
        SlurmUnreachable: Slurm does not answer. The job may have been submitted nevertheless.
    """
    after = ":".join(map(str, parents))
    dependency = [f"--dependency={condition}:{after}"] if after else []
    answer = _call("sbatch", "--parsable", "--hold", *dependency, str(script), environment=_outside_of_job(os.environ))
    if answer.returncode != 0:
        _ask("scontrol", "ping")  # fails if it was not the script that sbatch could not process
        raise UserError(
            setting="slurm",
            value=script,
            rule="sbatch rejects this script: " + answer.stderr.strip().removeprefix("sbatch: error: ").rstrip("."),
            remedy="Correct slurm.* accordingly. Nothing was started.",
        )
    return int(answer.stdout.strip().partition(";")[0])  # "ID" or, with several clusters, "ID;CLUSTER"


def _outside_of_job(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment without the variables of the job that this process runs in, if any.

    A submitted job inherits them, and srun would apply the other job's memory and GPUs to it or refuse to start.
    """
    if job_of(environment) is None:
        return dict(environment)
    return {
        name: value
        for name, value in environment.items()
        if ACCESS_VARIABLES.fullmatch(name) or not JOB_VARIABLES.fullmatch(name)
    }


def release(jobs: Sequence[int]) -> None:
    """Lets held jobs start."""
    _ask("scontrol", "release", ",".join(map(str, jobs)))


def cancel(jobs: Sequence[int]) -> None:
    """Cancels jobs. Those that have ended are left alone."""
    if jobs:
        _ask("scancel", *map(str, jobs))


def held_jobs(scripts: Collection[str]) -> list[int]:
    """Returns this user's jobs that run one of some scripts and are held.

    Raises:
        SlurmUnreachable: Slurm does not answer.
    """
    queue = _ask("squeue", "--noheader", f"--user={os.getuid()}", "--states=PENDING", "--format=%i|%r|%o")
    jobs = [line.split("|", 2) for line in queue.splitlines()]
    return [int(job) for job, reason, script in jobs if reason == "JobHeldUser" and script in scripts]


def requeue(job: JobInfo) -> None:
    """Returns a running batch job to the queue. Slurm then ends it, including the calling process."""
    _ask("scontrol", "requeue", job.array_task or str(job.job))


@dataclass(frozen=True)
class JobInfo:
    """A job's state, as reported by Slurm."""

    job: int
    state: str  # RUNNING, PENDING, FAILED, ...
    reason: str  # why it is pending, or how it ended
    restarts: int  # how many times it was requeued
    batch: bool  # it runs a script rather than an interactive session
    may_requeue: bool
    run_time: str
    time_limit: str
    array_task: str = ""  # such as 10_3, if it is a task of a job array: one of the tasks has the same id as the array

    @property
    def active(self) -> bool:
        """Whether the job is running or will run."""
        return self.state not in {"COMPLETED", *FAILED}


def job_info(job: int) -> JobInfo | None:
    """Asks Slurm about a job.

    Returns:
        The job's state, or None if Slurm does not know it. Slurm forgets jobs some minutes after their end.

    Raises:
        SlurmUnreachable: Slurm does not answer.
    """
    answer = _call("scontrol", "--oneliner", "show", "job", str(job))
    if answer.returncode != 0 and "Invalid job id" in answer.stderr:
        return None
    if answer.returncode != 0:
        raise SlurmUnreachable(answer.stderr.strip())
    # The id of a job array is also that of one of its tasks, and all of them are listed.
    record = next((line for line in answer.stdout.splitlines() if line.startswith(f"JobId={job} ")), None)
    if record is None:
        return None
    fields = dict(re.findall(r"(\S+?)=(\S*)", record))
    return JobInfo(
        job=job,
        state=fields["JobState"],
        reason=fields["Reason"],
        restarts=int(fields["Restarts"]),
        batch=fields["BatchFlag"] != "0",
        may_requeue=fields["Requeue"] != "0",
        run_time=fields["RunTime"],
        time_limit=fields["TimeLimit"],
        array_task=f"{fields['ArrayJobId']}_{fields['ArrayTaskId']}" if "ArrayTaskId" in fields else "",
    )


@cache
def cluster_name() -> str:
    """Returns the name of the cluster that Slurm's commands reach. A job's id is unique within one cluster only.

    Raises:
        SlurmUnreachable: Slurm does not answer.
    """
    found = re.search(r"^ClusterName\s*=\s*(\S+)", _ask("scontrol", "show", "config"), re.MULTILINE)
    return found.group(1) if found else ""


def host_names(node_list: str) -> list[str]:
    """Expands a node list: ``n[1-3]`` becomes ``["n1", "n2", "n3"]``, in Slurm's order."""
    if not set(node_list) & set(",["):  # a single name needs no program, which a container may not have
        return [node_list]
    return _ask("scontrol", "show", "hostnames", node_list).split()


def node_address(node: str) -> str:
    """Returns the address at which Slurm reaches a node. The node's name does not always resolve."""
    found = re.search(r"NodeAddr=(\S+)", _ask("scontrol", "--oneliner", "show", "node", node))
    return found.group(1) if found else node


def _ask(*command: str) -> str:
    answer = _call(*command)
    if answer.returncode != 0:
        said = answer.stderr.strip() or answer.stdout.strip() or f"exit status {answer.returncode}"
        raise SlurmUnreachable(f"{' '.join(command)}: {said}")
    return answer.stdout


def _call(*command: str, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_SECONDS, env=environment)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SlurmUnreachable(str(error)) from error


# ------------------------------------------------------------------------------- current allocation


@dataclass(frozen=True)
class Allocation:
    """The resources of the Slurm job that this process runs in."""

    job: int
    nodes: tuple[str, ...]
    cpus: int  # per node
    outside: bool  # this process does not run on the nodes, but in a shell that salloc started on a login node

    @property
    def needs_srun(self) -> bool:
        """Whether the workers must be started by srun rather than as children of this process."""
        return self.outside or len(self.nodes) > 1

    def srun(self, nodes: int, *options: str) -> list[str]:
        """Returns the srun command that runs another command once on each of the first ``nodes`` nodes."""
        size = [f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"]
        return [
            "srun",
            *size,
            f"--cpus-per-task={self.cpus}",  # since Slurm 22.05 a step does not inherit it and would get one core
            "--overlap",  # this process may itself run in a step that uses the resources
            "--export=ALL",  # otherwise the --export=NONE of a job's submission would apply
            "--kill-on-bad-exit=1",
            *options,
        ]


@cache
def current_allocation() -> Allocation | None:
    """Returns the allocation of the Slurm job that this process runs in, or None outside a job.

    Raises:
        UserError: srun started several copies of this process, or the job's nodes can only be reached with Slurm's
            programs, which are not installed here.
    """
    return read_allocation(os.environ)


def job_of(environment: Mapping[str, str]) -> int | None:
    """Returns the id of the Slurm job that environment variables describe, or None outside a job."""
    job = environment.get("SLURM_JOB_ID", "")
    return int(job) if job.isdecimal() else None


def read_allocation(environment: Mapping[str, str]) -> Allocation | None:
    """Returns the allocation that Slurm's environment variables describe, or None outside a job."""
    job, node_list = job_of(environment), environment.get("SLURM_JOB_NODELIST")
    if job is None or not node_list:
        return None
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks != "1" and "SLURM_STEP_ID" in environment:
        raise UserError(
            setting="srun",
            value=f"{tasks} tasks",
            rule="a run is driven by one process, which starts the workers on all nodes of the job itself",
            remedy="Omit srun: run the command inside an salloc or sbatch job, or use scripts/submit.",
        )
    here = environment.get("SLURMD_NODENAME", socket.gethostname().partition(".")[0])
    has_srun = shutil.which("srun") is not None
    if not has_srun and node_list != here:
        raise UserError(
            setting="SLURM_JOB_NODELIST",
            value=node_list,
            rule="the nodes of a Slurm job are reached with srun, which is not installed here (perhaps in a container)",
            remedy="Make Slurm's programs available, or request one node, or unset SLURM_JOB_ID to use only this node.",
        )
    # For example "16(x2),8": two nodes with 16 CPUs and one with 8. The smallest node limits all of them.
    cpus = re.findall(r"(\d+)(?:\(x\d+\))?", environment.get("SLURM_JOB_CPUS_PER_NODE", "")) or ["1"]
    return Allocation(
        job=job,
        nodes=tuple(host_names(node_list)),
        cpus=min(map(int, cpus)),
        outside=has_srun and "SLURMD_NODENAME" not in environment,
    )
