"""Helpers for observing other processes, which may exit at any time."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

from scripts.benchmarks.processes import descendants
from tests.warm import fork_of


def children(pid: int) -> list[int]:
    """Returns all living descendants of a process. A warm client is followed to its fork."""
    return list(_tree(pid))[1:]


def _tree(pid: int) -> Iterator[int]:
    for each in descendants(pid):
        yield each
        for fork in fork_of(each):
            yield from _tree(fork)


def is_gone(pid: int) -> bool:
    """Returns whether a process has exited. A zombie counts as exited."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def seconds_of_children() -> float:
    """Returns the CPU time of this process's children that have exited, which does not depend on the machine's load."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
