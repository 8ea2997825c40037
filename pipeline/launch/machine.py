"""Detects the available hardware and decides which part of it the workers use, without importing torch."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import takewhile
from pathlib import Path, PurePath
from typing import Literal

from pipeline.config import Evaluate, Launch
from pipeline.errors import UserError
from pipeline.launch.slurm import current_allocation

BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})
DEVICE_NAME = re.compile(r"\s*(\d+|GPU-[\w-]+|MIG-[\w/-]+)\s*")  # in CUDA_VISIBLE_DEVICES


@dataclass(frozen=True)
class Machine:
    """The available hardware."""

    cores: int  # per node
    gpus: int  # per node: visible to this process and supported by the installed torch
    nodes: int = 1
    unusable_gpus: int = 0  # per node: that Slurm has allocated, but the installed torch or the driver cannot use


@dataclass(frozen=True)
class Placement:
    """The hardware that the workers use."""

    device: Literal["cpu", "cuda"]
    processes: int  # per node
    threads: int  # per process
    nodes: int = 1

    @property
    def ranks(self) -> int:
        """Total number of worker processes."""
        return self.nodes * self.processes


def place(launch: Launch, machine: Machine) -> Placement:
    """Resolves the settings for device, processes and threads, detecting those that are ``auto``.

    Raises:
        UserError: the settings ask for more GPUs than the machine has, or ``auto`` would leave allocated GPUs idle.
    """
    placement = requested_placement(launch, machine)
    if launch.kind == "auto" and machine.unusable_gpus:
        raise UserError(
            setting="launch.device",
            value=launch.device,
            rule=f"Slurm gave this job {machine.unusable_gpus} GPUs per node, which torch cannot use here",
            remedy="Run scripts/setup --check in such a job, which tells what is missing, or set launch.device=cpu.",
        )
    if placement.device == "cuda" and placement.processes > machine.gpus:
        if machine.gpus:
            setting, value = "launch.processes", str(placement.processes)
            remedy = f"Set launch.processes={machine.gpus}."
        else:
            setting, value = "launch.device", launch.device
            remedy = "Run on a machine with GPUs, or set launch.device=cpu."
        rule = f"each process uses one GPU, and {machine.gpus} are available"
        raise UserError(setting=setting, value=value, rule=rule, remedy=remedy)
    return placement


def place_one_process(launch: Launch) -> Placement:
    """Resolves the settings for a single process on this machine, whatever ``launch.processes`` says.

    Raises:
        UserError: the settings ask for a GPU, and the machine has none.
    """
    return place(launch.model_copy(update={"processes": 1}), detect_machine())


def requested_placement(launch: Launch, machine: Machine) -> Placement:
    """Returns the placement that the settings ask for, even if the machine does not have that many GPUs."""
    device = launch.kind if launch.kind != "auto" else "cuda" if machine.gpus else "cpu"
    default_processes = max(1, machine.gpus) if device == "cuda" else 1
    processes = launch.processes if launch.processes != "auto" else default_processes
    threads = launch.threads if launch.threads != "auto" else max(1, machine.cores // processes)
    return Placement(device, processes, threads, machine.nodes)


def evaluation_processes(evaluate: Evaluate, launch: Launch, machine: Machine) -> int:
    """Returns how many processes score models at the same time: one per GPU, and by default one on CPUs.

    Raises:
        UserError: more than the machine has GPUs.
    """
    placement = requested_placement(launch, machine)
    if evaluate.processes == "auto":
        return placement.processes if placement.device == "cuda" else 1
    if placement.device == "cuda" and evaluate.processes > max(1, machine.gpus):
        raise UserError(
            setting="evaluate.processes",
            value=evaluate.processes,
            rule=f"each process uses one GPU, and {machine.gpus} are available",
            remedy="Set evaluate.processes=auto.",
        )
    return evaluate.processes


@cache
def detect_machine() -> Machine:
    """Detects the hardware of this machine or, inside a Slurm job, of the job's nodes."""
    allocation = current_allocation()
    gpus = _count_visible_gpus(first_node_prefix()) if _torch_has_cuda() else 0
    if allocation is None:
        return Machine(cores=usable_cores(), gpus=gpus)
    # Where srun starts the workers, they do not inherit the limits of this process.
    cores = allocation.cpus if allocation.needs_srun else min(allocation.cpus, usable_cores())
    return Machine(cores=cores, gpus=gpus, nodes=len(allocation.nodes), unusable_gpus=_unusable_gpus(gpus))


def _unusable_gpus(usable: int) -> int:
    """Returns how many GPUs of this job are not usable, if that is all of them and the user has not hidden them."""
    allocated = os.environ.get("SLURM_GPUS_ON_NODE", "")
    hidden = not DEVICE_NAME.match(os.environ.get("CUDA_VISIBLE_DEVICES", "0"))
    return int(allocated) if allocated.isdecimal() and not usable and not hidden else 0


def usable_cores(process: Path = Path("/proc/self")) -> int:
    """Returns how many threads of a process can run at the same time, without being throttled by a container's quota.

    Args:
        process: its directory in /proc.
    """
    # The affinity includes the limits of cpusets.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min([cores, *_cpu_quotas(process)])))


def _cpu_quotas(process: Path) -> Iterator[float]:
    """Yields the limits on CPU time, in cores, of a process's control group and of those above it (versions 1 and 2).

    https://docs.kernel.org/admin-guide/cgroup-v2.html and https://docs.kernel.org/scheduler/sched-bwc.html
    """
    try:
        groups = [line.split(":", 2) for line in (process / "cgroup").read_text().splitlines()]
        mounts = [line.split() for line in (process / "mountinfo").read_text().splitlines()]
    except OSError:  # not Linux
        return
    paths = {controller: path for _, controllers, path in groups for controller in controllers.split(",")}
    for mount in mounts:
        root, place, kind, options = mount[3], Path(mount[4]), mount[mount.index("-") + 1], mount[-1].split(",")
        controller = {"cgroup2": "", "cgroup": "cpu"}.get(kind)
        if controller not in paths or (kind == "cgroup" and "cpu" not in options):
            continue
        # In a container the path may be one of the host's, and the group itself is mounted.
        path = PurePath(paths[controller])
        inside = path.relative_to(root) if path.is_relative_to(root) else PurePath()
        for group in (inside, *inside.parents):
            yield from _quota_of(place / group)


def _quota_of(group: Path) -> Iterator[float]:
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        with suppress(OSError, ValueError):  # without the file, or without a limit ("max")
            quota, period = map(int, " ".join((group / name).read_text() for name in names).split())
            if quota > 0 and period > 0:
                yield quota / period


def first_node_prefix() -> list[str]:
    """Returns the srun command that runs another command on the first allocated node.

    Empty if this process already runs on the allocated hardware.
    """
    allocation = current_allocation()
    return allocation.srun(1) if allocation is not None and allocation.outside else []


def device_memory(placement: Placement) -> int | None:
    """Returns the memory of one device in bytes: of the smallest GPU, or one process's share of a node's memory.

    None if it cannot be told: nvidia-smi is missing in some containers, and does not know it for GPUs that share the
    CPU's memory.
    """
    if placement.device == "cuda":
        command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]  # in MiB
        sizes = [int(line) for line in _output_on_first_node(command).splitlines() if line.strip().isdecimal()]
        return min(sizes) * 2**20 if sizes else None
    lines = _output_on_first_node(["cat", "/proc/meminfo"]).splitlines()
    total = next((line for line in lines if "MemTotal" in line), None)  # "MemTotal:  16384 kB"
    return None if total is None else int(total.split()[1]) * 1024 // placement.processes


def _torch_has_cuda() -> bool:
    spec = importlib.util.find_spec("torch")  # locates the package without importing it
    folders = (spec.submodule_search_locations or []) if spec else []
    return any(Path(folder, "lib").glob("libtorch_cuda*") for folder in folders)


def visible_gpus(count: int) -> list[str]:
    """Returns the names by which ``CUDA_VISIBLE_DEVICES`` selects each of the visible GPUs of this machine."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(index) for index in range(count)] if visible is None else visible.split(",")[:count]


def _count_visible_gpus(prefix: list[str]) -> int:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    # With a prefix the GPUs are another host's, so this process's environment does not apply.
    if visible is not None and not prefix:
        # CUDA ignores what follows the first name that it does not know. Slurm sets NoDevFiles for jobs without GPUs.
        return len(list(takewhile(DEVICE_NAME.fullmatch, visible.split(","))))
    if shutil.which("nvidia-smi") is None and not prefix:
        return 0
    answer = subprocess.run([*prefix, "nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return sum(line.startswith("GPU ") for line in answer.stdout.splitlines())


def _output_on_first_node(command: list[str]) -> str:
    try:
        return subprocess.run([*first_node_prefix(), *command], capture_output=True, text=True, check=False).stdout
    except FileNotFoundError:
        return ""


def bfloat16_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """Returns the instruction sets for bfloat16 that Linux reports for the processor; none on other systems."""
    if not cpuinfo.is_file():
        return []
    flags = (line for line in cpuinfo.read_text().splitlines() if line.startswith("flags"))
    return sorted(BFLOAT16_FLAGS & set(next(flags, "").partition(":")[2].split()))
