"""Running a contender in a process of its own, and reading the memory of all it started from outside."""

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
    """The most memory held at once, in bytes."""

    host: int  # anonymous and shared pages (RssAnon + RssShmem) of the process and its descendants
    gpu: int  # what the driver reports beyond what was in use before; 0 without one


def run_module(
    module: str,
    *arguments: str,
    log: Path,
    until: Callable[[int], bool] = lambda peak: False,
    timeout: float = 1800.0,
    variables: Mapping[str, str] = MappingProxyType({}),
) -> Peak:
    """Runs ``python -m module arguments`` to its end, or ends it once ``until`` holds of the host's peak so far.

    Args:
        variables: of its environment, beside those of this process.

    Raises:
        RuntimeError: it failed or took longer than ``timeout`` seconds; the message holds its last lines.
    """
    environment = {
        **os.environ,
        **variables,
        "PYTHONPATH": os.pathsep.join((str(REPOSITORY), os.environ.get("PYTHONPATH", ""))),
    }
    command = [sys.executable, "-m", module, *arguments]
    deadline = time.monotonic() + timeout
    idle, gpu_watch = gpu_memory(), _GpuWatch()
    with open(log, "wb") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=stream, stdin=subprocess.PIPE, env=environment, cwd=REPOSITORY
        )
        host, family, ended = _watch(process, lambda peak: until(peak) or time.monotonic() > deadline)
    gpu = gpu_watch.stop()
    if time.monotonic() > deadline or process.returncode != (-signal.SIGKILL if ended else 0):
        raise RuntimeError(f"{' '.join(command[2:])} failed:\n" + "\n".join(_last_lines(log)))
    _wait_for_end(family, idle)
    return Peak(host, max(0, gpu - idle))


def _watch(process: subprocess.Popen[bytes], enough: Callable[[int], bool]) -> tuple[int, set[int], bool]:
    """Waits for its end or ends it; the peak of host memory, all processes that took part, and whether it was ended."""
    peak, family, ended = 0, set[int](), False
    while process.poll() is None:
        living = list(descendants(process.pid))
        family.update(living)
        peak = max(peak, sum(map(resident_bytes, living)))
        if not ended and enough(peak):
            process.kill()  # its workers end with it
            ended = True
        time.sleep(SAMPLE_SECONDS)
    return peak, family, ended


def _last_lines(log: Path) -> list[str]:
    return log.read_text(errors="replace").splitlines()[-30:]


def descendants(pid: int) -> Iterator[int]:
    """A process and everything below it; those that end meanwhile are left out."""
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
    """Pages that are no file's; 0 for a process that is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return 1024 * sum(int(size) for size in re.findall(r"^Rss(?:Anon|Shmem):\s*(\d+) kB", status, re.MULTILINE))


# --------------------------------------------------------------------------------------------- GPU


def gpu_memory() -> int:
    """Bytes in use on the first GPU as its driver sees it; 0 without one."""
    if shutil.which("nvidia-smi") is None:
        return 0
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(answer.stdout.split()[0]) * 2**20


class _GpuWatch:
    """Polls the driver in a thread, for it answers slowly."""

    def __init__(self) -> None:
        self._peak = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        if shutil.which("nvidia-smi") is not None:
            self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(SAMPLE_SECONDS):
            self._peak = max(self._peak, gpu_memory())

    def stop(self) -> int:
        """Ends the watch and returns the peak in bytes."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
        return self._peak


def _wait_for_end(family: set[int], idle: int) -> None:
    """Workers end, and give their memory back, a moment after the process that started them."""
    deadline = time.monotonic() + 20.0
    while any(map(resident_bytes, family)) or gpu_memory() > idle + 2**28:
        if time.monotonic() > deadline:
            raise RuntimeError("workers of the last run would disturb the next one: they have not ended")
        time.sleep(0.2)
