"""Helpers for observing other processes, which may exit at any time."""

from __future__ import annotations

import ipaddress
import os
import resource
import signal
from collections.abc import Iterable, Iterator
from contextlib import suppress
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


def kill_tree(pid: int) -> None:
    """Kills a process and all its descendants."""
    for victim in [pid, *children(pid)]:
        with suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)


def is_gone(pid: int) -> bool:
    """Returns whether a process has exited. A zombie counts as exited."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def listening_addresses(pids: Iterable[int]) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    """Returns the addresses at which processes accept TCP connections."""
    sockets = set()
    for pid in pids:
        with suppress(OSError):  # it has just ended
            sockets |= {os.readlink(descriptor) for descriptor in Path(f"/proc/{pid}/fd").iterdir()}
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and f"socket:[{inode}]" in sockets:
                words = bytes.fromhex(local.partition(":")[0])  # of 4 bytes in the byte order of the machine
                octets = b"".join(words[start : start + 4][::-1] for start in range(0, len(words), 4))
                found.append(ipaddress.ip_address(octets))
    return found


def seconds_of_children() -> float:
    """Returns the CPU time of this process's children that have exited, which does not depend on the machine's load."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
