"""Prints what this machine has and what is missing for training on it:   scripts/setup --check

This program changes nothing, but ``scripts/setup`` first creates ``.venv`` if it is missing or outdated. The exit code
is 1 if something that every run needs is missing. What a particular run needs, such as memory, data and disk space, is
what ``action=plan`` checks.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import get_session

from pipeline.driver.run import package_versions
from pipeline.errors import UserError
from pipeline.launch.environment import code_cache_faults, missing_for_compilation
from pipeline.launch.machine import bfloat16_flags, detect_machine
from pipeline.trackers import login_fault

HUB_SECONDS = 3.0
SHARED_MEMORY = Path("/dev/shm")
SHARED_MEMORY_NEEDED = 2**30  # bytes per GPU, for NCCL's and the data loader's buffers


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, what was found, and what to do about it.

    Attributes:
        remedy: None if nothing is missing.
        required: whether every run needs it.
    """

    what: str
    found: str
    remedy: str | None = None
    required: bool = False


def findings() -> Iterator[Finding]:
    """Looks at everything in turn."""
    yield Finding("Python", f"{platform.python_version()} ({sys.executable})")
    yield _packages()
    yield from _hardware()
    yield from _compilation("cuda" if detect_machine().gpus else "cpu")
    yield _slurm()
    yield _hub()
    yield _wandb()


def _packages() -> Finding:
    try:
        versions = package_versions()
    except UserError as error:
        return Finding("packages", f"{error.value}: {error.rule}", error.remedy, required=True)
    return Finding("packages", ", ".join(f"{name} {version}" for name, version in versions.items()))


def _hardware() -> Iterator[Finding]:
    machine = detect_machine()
    native = bfloat16_flags()
    kind = f"bfloat16 with {', '.join(native)}" if native else "no bfloat16 instructions: precision=auto is float32"
    yield Finding("CPU", f"{machine.cores} cores, {kind}")
    driver = _nvidia("name,memory.total,driver_version")
    if not driver:
        yield Finding("GPUs", "none" if shutil.which("nvidia-smi") is None else "nvidia-smi lists none")
        return
    yield Finding("GPUs", "; ".join(driver), None if machine.gpus else _without_cuda())
    if machine.gpus > 1 and SHARED_MEMORY.is_dir():
        size, needed = shutil.disk_usage(SHARED_MEMORY).total, machine.gpus * SHARED_MEMORY_NEEDED
        remedy = None if size >= needed else "in a container, start it with --shm-size or --ipc=host"
        yield Finding("/dev/shm", f"{size / 2**30:.1f} GiB", remedy)


def _nvidia(fields: str) -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return [line.strip() for line in answer.stdout.splitlines()] if answer.returncode == 0 else []


def _without_cuda() -> str:
    if os.environ.get("CUDA_VISIBLE_DEVICES") is not None:
        return "CUDA_VISIBLE_DEVICES hides them"
    return "torch is a build for CPUs: remove .venv, configure pip for a CUDA build of torch, and run scripts/setup"


def _compilation(device: str) -> Iterator[Finding]:
    missing = missing_for_compilation(device, os.environ)
    found, remedy = ("has what it needs", None) if missing is None else (missing[0], f"{missing[1]}, or compile=false")
    yield Finding("torch.compile", found, remedy)
    for fault in code_cache_faults(os.environ, needed=True):
        yield Finding(fault.setting, f"{fault.value}: {fault.rule}", fault.remedy)


def _slurm() -> Finding:
    present = [name for name in ("sbatch", "srun") if shutil.which(name)]
    if len(present) == 2:
        return Finding("Slurm", "sbatch and srun")
    return Finding("Slurm", "none: training runs on one machine" if not present else f"only {present[0]}")


def _hub() -> Finding:
    if constants.HF_HUB_OFFLINE:
        return Finding(
            "Hugging Face Hub", "offline (HF_HUB_OFFLINE): models and data come from its cache or from files"
        )
    with suppress(OSError, HTTPError):
        get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
        return Finding("Hugging Face Hub", "reachable")
    remedy = "use local directories, or fill its cache elsewhere and set HF_HUB_OFFLINE=1 (docs/cluster.md)"
    return Finding("Hugging Face Hub", "not reachable", remedy)


def _wandb() -> Finding:
    fault = login_fault(os.environ)
    return Finding("W&B", "logged in" if fault is None else f"offline (the default), since {fault.rule}")


def main() -> int:
    """Prints all findings and returns the exit code."""
    found = list(findings())
    width = max(len(finding.what) for finding in found)
    for finding in found:
        print(f"{finding.what:<{width}}  {finding.found}")
        if finding.remedy is not None:
            print(f"{'':<{width}}  -> {finding.remedy}")
    return 1 if any(finding.required and finding.remedy for finding in found) else 0


if __name__ == "__main__":
    sys.exit(main())
