"""Slurm as a user sees it: batch scripts from settings, and the commands that submit, ask, requeue. Knows no stage.

``batch_script`` is pure. Everything else is one call of ``sbatch`` or ``scontrol``; ``sacct`` is never needed, so a
cluster without accounting does.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pipeline.config import Resources, Slurm
from pipeline.errors import UserError

ACTIVE = frozenset({
    "PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "STOPPED", "COMPLETING", "REQUEUED", "REQUEUE_HOLD", "RESIZING",
    "SIGNALING", "STAGE_OUT",
})  # fmt: skip
COMMAND_SECONDS = 60


class SlurmUnreachable(RuntimeError):
    """Slurm's commands are missing or its controller does not answer, so nothing is known about a job."""


# ------------------------------------------------------------------------------------------- scripts


@dataclass(frozen=True)
class BatchJob:
    """One batch job, as far as it does not come from the general settings."""

    name: str
    command: Sequence[str]
    resources: Resources  # one task a node, with all of the node's share
    directory: Path  # where the command runs
    log: Path  # standard output and error, appended over requeues; %j stands for the job's id


def batch_script(job: BatchJob, slurm: Slurm) -> str:
    """The script that ``sbatch`` takes, now or again by hand.

    The command takes the shell's place (``exec``), so the signal ahead of the time limit, which Slurm sends to the
    batch shell (``B:``), reaches the command itself: a shell would sit on it until its child ends.
    """
    resources = job.resources
    options = {
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
    given = [f"--{name}={shlex.quote(str(value))}" for name, value in options.items() if value is not None]
    lines = [f"#SBATCH {option}" for option in [*given, "--requeue", *slurm.options, *resources.options]]
    return "\n".join(
        ["#!/usr/bin/env bash", *lines, "set -e", *slurm.environment, f"exec {shlex.join(job.command)}", ""]
    )


# ------------------------------------------------------------------------------------------ commands


def require_slurm() -> None:
    """Raises a ``UserError`` where Slurm's commands are not installed."""
    if shutil.which("sbatch") is None:
        raise UserError(
            setting="action",
            value="submit",
            rule="there is no sbatch on this machine",
            remedy="Run it on a login node of the cluster; or add dry_run=true to see the scripts.",
        )


def submit_script(script: Path, parents: Iterable[int]) -> int:
    """Queues a script, held until ``release``, after its parents have ended well.

    Returns:
        The job's id.

    Raises:
        UserError: sbatch refuses it, in sbatch's own words.
    """
    after = ":".join(map(str, parents))
    dependency = [f"--dependency=afterok:{after}"] if after else []
    answer = _call("sbatch", "--parsable", "--hold", *dependency, str(script))
    if answer.returncode != 0:
        raise UserError(
            setting="slurm",
            value=script,
            rule="sbatch refuses it: " + answer.stderr.strip().removeprefix("sbatch: error: ").rstrip("."),
            remedy="Correct slurm.* accordingly; nothing was started.",
        )
    return int(answer.stdout.strip().partition(";")[0])


def release(jobs: Sequence[int]) -> None:
    """Lets held jobs start."""
    _scontrol("release", ",".join(map(str, jobs)))


def cancel(jobs: Sequence[int]) -> None:
    """Removes jobs from the queue."""
    if jobs:
        _call("scancel", *map(str, jobs))


def requeue(job: int) -> None:
    """Puts a running batch job back into the queue; Slurm then ends it, the caller included."""
    _scontrol("requeue", str(job))


@dataclass(frozen=True)
class JobInfo:
    """What Slurm knows about a job."""

    job: int
    state: str  # RUNNING, PENDING, FAILED, ...
    reason: str  # why it is pending, or how it ended
    restarts: int  # how often it was requeued
    batch: bool  # it runs a script, rather than somebody's terminal
    may_requeue: bool
    run_time: str
    time_limit: str

    @property
    def active(self) -> bool:
        """It runs, or will."""
        return self.state in ACTIVE


def job_info(job: int) -> JobInfo | None:
    """Asks Slurm; None where it knows no such job, which a while after its end is the rule.

    Raises:
        SlurmUnreachable: there is no answer.
    """
    answer = _call("scontrol", "--oneliner", "show", "job", str(job))
    if answer.returncode != 0 and "Invalid job id" in answer.stderr:
        return None
    if answer.returncode != 0:
        raise SlurmUnreachable(answer.stderr.strip())
    fields = dict(re.findall(r"(\S+?)=(\S*)", answer.stdout))
    return JobInfo(
        job=job,
        state=fields["JobState"],
        reason=fields["Reason"],
        restarts=int(fields["Restarts"]),
        batch=fields["BatchFlag"] != "0",
        may_requeue=fields["Requeue"] != "0",
        run_time=fields["RunTime"],
        time_limit=fields["TimeLimit"],
    )


def host_names(node_list: str) -> list[str]:
    """``n[1-3]`` as ``["n1", "n2", "n3"]``, in Slurm's order."""
    return _scontrol("show", "hostnames", node_list).split()


def node_address(node: str) -> str:
    """The address at which Slurm itself reaches a node; names need not resolve."""
    found = re.search(r"NodeAddr=(\S+)", _scontrol("--oneliner", "show", "node", node))
    return found.group(1) if found else node


def _scontrol(*arguments: str) -> str:
    answer = _call("scontrol", *arguments)
    if answer.returncode != 0:
        raise SlurmUnreachable(f"scontrol {' '.join(arguments)}: {answer.stderr.strip()}")
    return answer.stdout


def _call(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_SECONDS)
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        raise SlurmUnreachable(str(error)) from error


# --------------------------------------------------------------------------------------------------
# The Slurm job around this process, if there is one: its nodes, and how a command gets onto them.

FIRST_PORT, PORTS, PORT_STRIDE = 20000, 12000, 1009  # below what the kernel gives to outgoing connections
PORT_ATTEMPTS = 5


@dataclass(frozen=True)
class Allocation:
    """What Slurm gave to this process's job."""

    job: int
    nodes: tuple[str, ...]
    cpus: int  # a node
    outside: bool  # this process runs on none of the nodes, but in a terminal of salloc's on a login node

    @property
    def needs_srun(self) -> bool:
        """Whether workers cannot simply be started as children of this process."""
        return self.outside or len(self.nodes) > 1

    def srun(self, nodes: int, *options: str) -> list[str]:
        """The command before a command that runs it once on each of the first ``nodes`` nodes.

        --overlap: this process may sit in a step of its own. --export: a job submitted with --export=NONE would pass
        that on. --cpus-per-task: since Slurm 22.05 a step does not inherit it and would get one core.
        """
        size = [f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", f"--cpus-per-task={self.cpus}"]
        return ["srun", *size, "--overlap", "--export=ALL", "--kill-on-bad-exit=1", *options]

    def ports(self) -> list[int]:
        """Where the ranks may meet, the first to be tried first: jobs that share a node seldom try the same."""
        return [
            FIRST_PORT + (self.job + attempt * PORT_STRIDE) % PORTS for attempt in range(PORT_ATTEMPTS)
        ]  # fmt: skip


@cache
def current_allocation() -> Allocation | None:
    """Looks at this process's environment.

    Raises:
        UserError: Slurm started this process several times.
    """
    return read_allocation(os.environ)


def read_allocation(environment: Mapping[str, str]) -> Allocation | None:
    """The allocation that Slurm's variables describe; None outside a job."""
    if "SLURM_JOB_ID" not in environment or "SLURM_JOB_NODELIST" not in environment:
        return None
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks > 1 and "SLURM_STEP_ID" in environment:
        raise UserError(
            setting="srun",
            value=f"{tasks} tasks",
            rule="one process drives a run, and starts its workers on every node of the job itself",
            remedy="Leave srun out: run the command in a job of salloc's or sbatch's, or by scripts/submit.",
        )
    return Allocation(
        job=int(environment["SLURM_JOB_ID"]),
        nodes=tuple(host_names(environment["SLURM_JOB_NODELIST"])),
        cpus=min(map(int, re.findall(r"(\d+)(?:\(x\d+\))?", environment.get("SLURM_JOB_CPUS_PER_NODE", "1")))),
        outside="SLURMD_NODENAME" not in environment,
    )


def escape_percent(path: Path) -> str:
    """A path as Slurm's ``--output`` takes it, without meaning anything by a percent sign."""
    return str(path).replace("%", "%%")
