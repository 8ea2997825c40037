"""Runs a module in a separate process, and reads the memory of all its processes from outside."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

REPOSITORY = Path(__file__).resolve().parents[2]
SAMPLE_SECONDS = 0.05


@dataclass(frozen=True)
class Peak:
    """Peak memory in bytes."""

    host: int  # anonymous and shared pages (RssAnon + RssShmem) of the process and its descendants
    gpu: int  # as reported by the driver, without what was in use before; 0 without a GPU


def run_module(
    module: str,
    *arguments: str,
    log: Path,
    until: Callable[[int], bool] = lambda peak: False,
    timeout: float = 1800.0,
    variables: Mapping[str, str] = MappingProxyType({}),
) -> Peak:
    """Runs ``python -m module arguments`` until it ends, or kills it as soon as ``until`` returns True.

    Args:
        module: the module to run.
        arguments: its command-line arguments.
        log: the file for its output.
        until: called regularly with the peak memory of the host so far.
        timeout: in seconds.
        variables: added to the environment.

    Returns:
        The peak memory of the process and its descendants.

    Raises:
        RuntimeError: the process failed or exceeded the timeout. The message contains its last lines of output.
    """
    environment = {
        **os.environ,
        **variables,
        "PYTHONPATH": os.pathsep.join((str(REPOSITORY), os.environ.get("PYTHONPATH", ""))),
    }
    command = [sys.executable, "-m", module, *arguments]
    deadline = time.monotonic() + timeout
    gpu_before, gpu_monitor = gpu_memory(), _GpuMonitor()
    with open(log, "wb") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=stream, stdin=subprocess.PIPE, env=environment, cwd=REPOSITORY
        )
        host, family, killed = _monitor(process, lambda peak: until(peak) or time.monotonic() > deadline)
    gpu = gpu_monitor.stop()
    if time.monotonic() > deadline or process.returncode != (-signal.SIGKILL if killed else 0):
        raise RuntimeError(f"{' '.join(command[2:])} failed:\n" + "\n".join(_last_lines(log)))
    _wait_for_exit(family, gpu_before)
    return Peak(host, max(0, gpu - gpu_before))


def _monitor(process: subprocess.Popen[bytes], until: Callable[[int], bool]) -> tuple[int, set[int], bool]:
    """Returns the peak host memory, the ids of all descendants, and whether the process was killed."""
    peak, family, killed = 0, set[int](), False
    while process.poll() is None:
        living = list(descendants(process.pid))
        family.update(living)
        peak = max(peak, sum(map(resident_bytes, living)))
        if not killed and until(peak):
            process.kill()  # its workers then exit by themselves
            killed = True
        time.sleep(SAMPLE_SECONDS)
    return peak, family, killed


def _last_lines(log: Path) -> list[str]:
    return log.read_text(errors="replace").splitlines()[-30:]


def descendants(pid: int) -> Iterator[int]:
    """Yields a process and all its descendants, except those that exit in the meantime."""
    yield pid
    for child in _children(pid):
        yield from descendants(child)


def _children(pid: int) -> list[int]:
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return []
    found: list[int] = []
    for task in tasks:
        with suppress(OSError):
            found += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
    return found


def resident_bytes(pid: int) -> int:
    """Returns the size of resident pages that are not mapped from files, or 0 if the process has exited."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return 1024 * sum(int(size) for size in re.findall(r"^Rss(?:Anon|Shmem):\s*(\d+) kB", status, re.MULTILINE))


# --------------------------------------------------------------------------------------------- GPU


def gpu_memory() -> int:
    """Returns the bytes in use on the first GPU, as reported by its driver, or 0 without a GPU."""
    if shutil.which("nvidia-smi") is None:
        return 0
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(answer.stdout.split()[0]) * 2**20


class _GpuMonitor:
    """Polls the driver in a thread, because it answers slowly."""

    def __init__(self) -> None:
        self._peak = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)
        if shutil.which("nvidia-smi") is not None:
            self._thread.start()

    def _poll(self) -> None:
        while not self._stopped.wait(SAMPLE_SECONDS):
            self._peak = max(self._peak, gpu_memory())

    def stop(self) -> int:
        """Stops polling and returns the peak in bytes."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()
        return self._peak


def _wait_for_exit(family: set[int], gpu_before: int) -> None:
    """Waits until the descendants have exited and freed their memory, shortly after the process that started them."""
    deadline = time.monotonic() + 20.0
    while any(map(resident_bytes, family)) or gpu_memory() > gpu_before + 2**28:
        if time.monotonic() > deadline:
            raise RuntimeError("workers of the last run have not exited and would disturb the next run")
        time.sleep(0.2)
