"""Describes the machine that a benchmark ran on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path


def cpu_name() -> str:
    """Returns the processor's name, as reported by the kernel."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return models[0].partition(":")[2].strip() if models else platform.machine()


def machine(*packages: str, gpu: bool = False) -> str:
    """Returns the cores, the processor, and the versions of Python and of the given packages."""
    hardware = f"{len(os.sched_getaffinity(0))} cores of {cpu_name()},{' and a GPU,' if gpu else ''}"
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return f"{hardware} Python {platform.python_version()}, {versions}"
