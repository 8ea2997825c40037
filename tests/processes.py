"""Other processes, as a test sees them; they may end while it looks."""

from __future__ import annotations

import resource
from pathlib import Path

from scripts.benchmarks.processes import descendants


def children(pid: int) -> list[int]:
    """All living descendants of a process."""
    return list(descendants(pid))[1:]


def is_gone(pid: int) -> bool:
    """Whether the process has ended; one that waits for its parent to look counts as ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def seconds_of_children() -> float:
    """Of work that this process's ended children did, however long they had to wait for a core."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
