"""Helpers for observing other processes, which may exit at any time."""

from __future__ import annotations

import resource
from pathlib import Path

from scripts.benchmarks.processes import descendants


def children(pid: int) -> list[int]:
    """Returns all living descendants of a process."""
    return list(descendants(pid))[1:]


def is_gone(pid: int) -> bool:
    """Whether a process has exited. A zombie counts as exited."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def seconds_of_children() -> float:
    """Returns the CPU time of this process's children that have exited, which does not depend on the machine's load."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
