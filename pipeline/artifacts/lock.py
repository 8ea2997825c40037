"""One builder at a time, on one machine or on many with a shared directory.

A lock is a directory with exactly one file, whose name says who holds it: ``free``, or a holder's. Taking, taking
over and giving back are each one ``rename`` of that file, which only one process can win; a rename is atomic on local
disks, NFS, Lustre and BeeGFS alike, where ``flock`` may be seen by one host alone.

A holder that died is recognised by what it left in its name:

- on this machine: its process is gone (by id and start time);
- elsewhere, within a Slurm job: Slurm says that the job ended or was requeued since;
- else: its file's time, which a living holder renews, stood still for ``SILENCE_SECONDS`` while we watched.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from uuid import uuid4

from pipeline.launch import slurm

FREE = "free"
LOCK_POLL_SECONDS = 1.0
HANDOVER_SECONDS = 0.05
BEAT_SECONDS = 20.0
SILENCE_SECONDS = 300.0  # of a holder whose process and job cannot be asked about
ASK_SLURM_SECONDS = 15.0


class LockLost(RuntimeError):
    """Others took this process for dead and took its lock over; what it made is not committed."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lock; ``name`` and ``parse`` are inverses."""

    host: str  # with boot and process namespace, so that a process id means something
    process: int
    started: int  # clock ticks after boot, so that a reused id is told apart
    job: int  # Slurm's; 0 outside
    restarts: int  # of the job

    @classmethod
    def current(cls, environment: Mapping[str, str]) -> Holder:
        """This process."""
        job, restarts = environment.get("SLURM_JOB_ID", "0"), environment.get("SLURM_RESTART_COUNT", "0")
        return cls(_this_host(), os.getpid(), _start_time(os.getpid()) or 0, int(job), int(restarts))

    @classmethod
    def parse(cls, name: str) -> Holder:
        """From a file's name."""
        host, *numbers = name.rsplit(",", 4)
        process, started, job, restarts = (int(number.partition("=")[2]) for number in numbers)
        return cls(host, process, started, job, restarts)

    @property
    def name(self) -> str:
        """As a file's name."""
        numbers = {"process": self.process, "started": self.started, "job": self.job, "restarts": self.restarts}
        return ",".join([self.host, *(f"{key}={value}" for key, value in numbers.items())])

    def __str__(self) -> str:
        job = f" in Slurm job {self.job}" if self.job else ""
        return f"process {self.process} on {self.host.partition('+')[0]}{job}"

    def is_dead(self, me: Holder) -> bool:
        """Whether it surely is; False also where that cannot be known."""
        if self.host == me.host:
            return _start_time(self.process) != self.started
        if not self.job:
            return False
        if self.job == me.job:
            return self.restarts < me.restarts
        try:
            info = slurm.job_info(self.job)
        except slurm.SlurmUnreachable:
            return False
        return info is None or not info.active or info.restarts > self.restarts


def _this_host() -> str:
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    parts = [os.uname().nodename]
    if boot.exists():
        parts += [boot.read_text().strip()[:8], str(os.stat(namespace).st_ino)]
    return "+".join(parts)


def _start_time(process: int) -> int | None:
    """When a process of this machine started; None where there is none, or only its corpse."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0 if not Path("/proc/self").exists() and _answers(process) else None
    return None if fields[0] == "Z" else int(fields[19])


def _answers(process: int) -> bool:
    """Whether there is such a process, where there is no /proc to ask."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@dataclass(frozen=True)
class Lock:
    """One lock, in a directory of its own."""

    directory: Path
    me: Holder

    @contextmanager
    def held(self, on_wait: Callable[[str], None]) -> Iterator[None]:
        """Holds the lock; waits while another does, and says so once for each.

        Args:
            on_wait: called with who holds the lock, and with who died holding it.
        """
        self._make()
        self._acquire(on_wait)
        ended = threading.Event()
        beat = threading.Thread(target=self._beat, args=(ended,), name="lock-beat", daemon=True)
        beat.start()
        try:
            yield
        finally:
            ended.set()
            beat.join()
            self._rename(self.me.name, FREE)

    def confirm(self) -> None:
        """Raises ``LockLost`` where this process does not hold the lock any more."""
        if not self._mine.exists():
            raise LockLost(f"{self.directory} was taken over by {self.holder() or 'another process'} meanwhile")

    def holder(self) -> Holder | None:
        """Who holds it now; None where it is free, or just changes hands."""
        names = [entry.name for entry in self.directory.glob("[!.]*")]
        return Holder.parse(names[0]) if names and names[0] != FREE else None

    @cached_property
    def _mine(self) -> Path:
        return self.directory / self.me.name

    def _make(self) -> None:
        """The directory appears with its file in it, or was there: a rename cannot replace what holds a file."""
        if self.directory.exists():
            return
        new = self.directory.with_name(f".{self.directory.name}.{uuid4().hex}")
        new.mkdir(parents=True)
        (new / FREE).touch()
        try:
            os.rename(new, self.directory)
        except OSError:  # another was faster
            (new / FREE).unlink()
            new.rmdir()

    def _rename(self, old: str, new: str) -> bool:
        try:
            os.rename(self.directory / old, self.directory / new)
        except FileNotFoundError:
            return False
        return True

    def _acquire(self, on_wait: Callable[[str], None]) -> None:
        watch: _Watch | None = None
        # Where NFS lost the answer to a rename that was done, its repetition fails; so look whose it is.
        while not (self._rename(FREE, self.me.name) or self._mine.exists()):
            holder = self.holder()
            if holder is None:
                time.sleep(HANDOVER_SECONDS)
                continue
            if watch is None or watch.holder != holder:
                watch = _Watch(holder, self.directory / holder.name, self.me)
                alive = not watch.is_dead()
                on_wait(f"{holder} is building it" if alive else f"{holder} died building it; taken over")
            if watch.is_dead():
                if self._rename(holder.name, self.me.name):
                    os.utime(self._mine)
                    return
                continue
            time.sleep(LOCK_POLL_SECONDS)

    def _beat(self, ended: threading.Event) -> None:
        while not ended.wait(BEAT_SECONDS):
            with suppress(FileNotFoundError):  # lost; confirm() says so
                os.utime(self._mine)


class _Watch:
    """Judges one holder over time, asking Slurm now and then and looking at the file's time always."""

    def __init__(self, holder: Holder, file: Path, me: Holder) -> None:
        self.holder, self._file, self._me = holder, file, me
        self._beat, self._since = self._time(), time.monotonic()
        self._asked = float("-inf")

    def is_dead(self) -> bool:
        """One look."""
        now = time.monotonic()
        if self._asked + (0.0 if self.holder.host == self._me.host else ASK_SLURM_SECONDS) <= now:
            self._asked = now
            if self.holder.is_dead(self._me):
                return True
        if (beat := self._time()) != self._beat:
            self._beat, self._since = beat, now
        return now - self._since > SILENCE_SECONDS and self.holder.host != self._me.host

    def _time(self) -> float | None:
        try:
            return self._file.stat().st_mtime
        except FileNotFoundError:
            return None
