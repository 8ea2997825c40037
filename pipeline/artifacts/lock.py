"""A lock that lets one process build an artifact, on one machine or on several that share a directory.

The lock is a directory with exactly one file, whose name identifies the holder, or is ``free``. Acquiring, taking over
and releasing are each one ``rename`` of that file, which only one process can win. A rename is atomic on local disks,
NFS, Lustre and BeeGFS, whereas ``flock`` may be visible to a single host only.

A holder that died is recognized by the information in its name:

- on this machine, its process no longer exists (compared by id and start time);
- elsewhere, inside a Slurm job, Slurm reports that the job has ended or was requeued;
- otherwise, the modification time of its file, which a living holder renews, has not changed for ``SILENCE_SECONDS``.
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

from pipeline.files import temporary_path
from pipeline.launch import slurm

FREE = "free"
LOCK_POLL_SECONDS = 1.0
HANDOVER_SECONDS = 0.05  # between two looks while the lock changes hands
HEARTBEAT_SECONDS = 20.0
SILENCE_SECONDS = 300.0  # without a heartbeat, after which a holder on another host counts as dead
ASK_SLURM_SECONDS = 15.0


class LockLost(RuntimeError):
    """Another process considered this one dead and took over its lock. The artifact is not committed."""


@dataclass(frozen=True)
class Holder:
    """A process that holds a lock or waits for it. ``name`` and ``parse`` are inverses."""

    host: str  # with the boot id and the process namespace, in which the process id is unique
    process: int
    started: int  # clock ticks after boot, to distinguish processes with the same id
    job: int  # Slurm's job id; 0 outside a job
    restarts: int  # how many times the job was requeued

    @classmethod
    def current(cls, environment: Mapping[str, str]) -> Holder:
        """Returns this process."""
        job, restarts = environment.get("SLURM_JOB_ID", "0"), environment.get("SLURM_RESTART_COUNT", "0")
        return cls(_this_host(), os.getpid(), _start_time(os.getpid()) or 0, int(job), int(restarts))

    @classmethod
    def parse(cls, name: str) -> Holder:
        """Parses the name of a lock's file."""
        # From the right, since a host's name may contain a comma.
        host, *numbers = name.rsplit(",", 4)
        process, started, job, restarts = (int(number.partition("=")[2]) for number in numbers)
        return cls(host, process, started, job, restarts)

    @property
    def name(self) -> str:
        """The name of the lock's file while this process holds it."""
        numbers = {"process": self.process, "started": self.started, "job": self.job, "restarts": self.restarts}
        return ",".join([self.host, *(f"{key}={value}" for key, value in numbers.items())])

    def __str__(self) -> str:
        job = f" in Slurm job {self.job}" if self.job else ""
        return f"process {self.process} on {self.host.partition('+')[0]}{job}"

    def is_dead(self, me: Holder) -> bool:
        """Whether the process is known to be dead. False if that cannot be determined."""
        if self.host == me.host:
            return _start_time(self.process) != self.started
        if not self.job:
            return False
        if self.job == me.job:  # a job's earlier run ends before Slurm starts it again
            return self.restarts < me.restarts
        try:
            info = slurm.job_info(self.job)
        except slurm.SlurmUnreachable:
            return False
        return info is None or not info.active or info.restarts > self.restarts


@dataclass(frozen=True)
class Lock:
    """A lock, identified by its directory.

    Args:
        directory: used for this lock only.
        me: this process.
    """

    directory: Path
    me: Holder

    @contextmanager
    def held(self, on_wait: Callable[[str], None]) -> Iterator[None]:
        """Acquires the lock, waiting if another process holds it, and releases it at the end.

        Args:
            on_wait: called once for each other holder, with a message that says who it is and whether it is alive.
        """
        self._create()
        self._acquire(on_wait)
        ended = threading.Event()
        heartbeat = threading.Thread(target=self._send_heartbeats, args=(ended,), name="lock-heartbeat", daemon=True)
        heartbeat.start()
        try:
            yield
        finally:
            ended.set()
            heartbeat.join()
            self._rename(self.me.name, FREE)

    def confirm(self) -> None:
        """Raises ``LockLost`` if this process no longer holds the lock."""
        if not self._my_file.exists():
            raise LockLost(f"{self.directory} was taken over by {self.holder() or 'another process'}")

    def holder(self) -> Holder | None:
        """Returns the current holder, or None if the lock is free or just changing hands."""
        names = [entry.name for entry in self.directory.glob("[!.]*")]
        return Holder.parse(names[0]) if names and names[0] != FREE else None

    @cached_property
    def _my_file(self) -> Path:
        return self.directory / self.me.name

    def _create(self) -> None:
        """Creates the directory together with its file, unless it exists."""
        if self.directory.exists():
            return
        new = temporary_path(self.directory)
        new.mkdir(parents=True)
        (new / FREE).touch()
        try:
            os.rename(new, self.directory)
        except OSError:  # another process was faster: a rename cannot replace a directory that is not empty
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
        # If NFS loses the reply to a successful rename, it repeats the rename, which then fails. So also check whether
        # the file already has our name.
        while not (self._rename(FREE, self.me.name) or self._my_file.exists()):
            holder = self.holder()
            if holder is None:
                time.sleep(HANDOVER_SECONDS)
                continue
            if watch is None or watch.holder != holder:
                watch = _Watch(holder, self.directory / holder.name, self.me)
                dead = watch.is_dead()
                on_wait(f"{holder} died while building it, taking over" if dead else f"{holder} is building it")
            if watch.is_dead():
                if self._rename(holder.name, self.me.name):
                    os.utime(self._my_file)  # the first heartbeat: the file still has the dead holder's time
                    return
                continue
            time.sleep(LOCK_POLL_SECONDS)

    def _send_heartbeats(self, ended: threading.Event) -> None:
        while not ended.wait(HEARTBEAT_SECONDS):
            with suppress(FileNotFoundError):  # the lock was lost, which confirm() reports
                os.utime(self._my_file)


class _Watch:
    """Observes one holder: always by its heartbeats, and from time to time by asking Slurm."""

    def __init__(self, holder: Holder, file: Path, me: Holder) -> None:
        self.holder, self._file, self._me = holder, file, me
        self._last_heartbeat, self._unchanged_since = self._heartbeat(), time.monotonic()
        self._asked = float("-inf")

    def is_dead(self) -> bool:
        """Whether the holder is known to be dead, or has been silent for too long."""
        now = time.monotonic()
        # Checking a local process is cheap, but asking Slurm's controller is not.
        interval = 0.0 if self.holder.host == self._me.host else ASK_SLURM_SECONDS
        if self._asked + interval <= now:
            self._asked = now
            if self.holder.is_dead(self._me):
                return True
        # Only changes count, measured with this host's clock, because the clocks of hosts differ.
        if (heartbeat := self._heartbeat()) != self._last_heartbeat:
            self._last_heartbeat, self._unchanged_since = heartbeat, now
        return now - self._unchanged_since > SILENCE_SECONDS and self.holder.host != self._me.host

    def _heartbeat(self) -> float | None:
        try:
            return self._file.stat().st_mtime
        except FileNotFoundError:
            return None


def _this_host() -> str:
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    parts = [os.uname().nodename]
    if boot.exists():
        parts += [boot.read_text().strip()[:8], str(os.stat(namespace).st_ino)]
    return "+".join(parts)


def _start_time(process: int) -> int | None:
    """Returns when a process of this machine started, in clock ticks, or None if it does not exist or is a zombie."""
    try:
        # The name in parentheses may contain spaces. After it, the state is field 0 and the start time field 19.
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0 if not Path("/proc/self").exists() and _process_exists(process) else None
    return None if fields[0] == "Z" else int(fields[19])


def _process_exists(process: int) -> bool:
    """Whether a process exists, for systems without /proc."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
