"""What there is to run on, and what of it workers use. Looks from outside: torch is found, not imported."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from pipeline.config import Launch
from pipeline.errors import UserError
from pipeline.launch.slurm import current_allocation


@dataclass(frozen=True)
class Machine:
    """What there is to run on."""

    cores: int  # a node; likewise below
    gpus: int  # that this process may use and the installed torch can
    nodes: int = 1


@dataclass(frozen=True)
class Placement:
    """What will be used."""

    device: Literal["cpu", "cuda"]
    processes: int  # a node
    threads: int  # a process
    nodes: int = 1

    @property
    def ranks(self) -> int:
        """Worker processes altogether."""
        return self.nodes * self.processes


@cache
def detect_machine() -> Machine:
    """Looks at this machine, or at the nodes of the Slurm job around this process, without importing torch."""
    allocation = current_allocation()
    gpus = _visible_gpus(first_node_prefix()) if _torch_knows_cuda() else 0
    if allocation is not None:
        return Machine(cores=allocation.cpus, gpus=gpus, nodes=len(allocation.nodes))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Machine(cores=cores or 1, gpus=gpus)


def first_node_prefix() -> list[str]:
    """What to put before a command that needs the allocated hardware; nothing where this process stands on it."""
    allocation = current_allocation()
    return allocation.srun(1) if allocation is not None and allocation.outside else []


def _torch_knows_cuda() -> bool:
    spec = importlib.util.find_spec("torch")  # finds, does not import
    folders = (spec.submodule_search_locations or []) if spec else []
    return any(Path(folder, "lib").glob("libtorch_cuda*") for folder in folders)


def _visible_gpus(prefix: list[str]) -> int:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and not prefix:
        return len([device for device in visible.split(",") if device.strip() not in ("", "-1")])
    if shutil.which("nvidia-smi") is None and not prefix:
        return 0
    answer = subprocess.run([*prefix, "nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return sum(line.startswith("GPU ") for line in answer.stdout.splitlines())


def device_memory(placement: Placement) -> int:
    """Bytes of one device: the smallest GPU's, or a process's share of a node's memory."""
    if placement.device == "cuda":
        command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]  # in MiB
        return min(int(line) for line in _said_on_first_node(command).split()) * 2**20
    total = next(line for line in _said_on_first_node(["cat", "/proc/meminfo"]).splitlines() if "MemTotal" in line)
    return int(total.split()[1]) * 1024 // placement.processes


def _said_on_first_node(command: list[str]) -> str:
    return subprocess.run([*first_node_prefix(), *command], capture_output=True, text=True, check=True).stdout


def place(launch: Launch, machine: Machine) -> Placement:
    """Device, processes and threads for these settings on this machine.

    Raises:
        UserError: GPUs are asked for that are not there.
    """
    device = launch.kind if launch.kind != "auto" else "cuda" if machine.gpus else "cpu"
    processes = launch.processes if launch.processes != "auto" else machine.gpus if device == "cuda" else 1
    if device == "cuda" and not 1 <= processes <= machine.gpus:
        raise UserError(
            setting="launch.processes" if machine.gpus else "launch.device",
            value=processes if machine.gpus else launch.device,
            rule=f"one process drives one GPU, and {machine.gpus} can be used here",
            remedy=f"Say launch.processes={machine.gpus}."
            if machine.gpus
            else "Go where there are GPUs, or say launch.device=cpu.",
        )
    threads = launch.threads if launch.threads != "auto" else max(1, machine.cores // processes)
    return Placement(device, processes, threads, machine.nodes)
