"""The Slurm job around this process, if there is one: its nodes, and how a command gets onto them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pipeline.errors import UserError
from pipeline.slurm import host_names

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


def pattern(path: Path) -> str:
    """A path as Slurm's ``--output`` takes it, without meaning anything by a percent sign."""
    return str(path).replace("%", "%%")
