"""A lock that lets one process build an artifact, on one machine or on several that share a directory.

The lock is a directory with exactly one file, whose name identifies the holder, or is ``free``. Acquiring, taking over
and releasing are each one ``rename`` of that file, which only one process can win. A rename is atomic on local disks,
NFS, Lustre and BeeGFS, whereas ``flock`` may be visible to a single host only.

A holder that died is recognized by the information in its name:

- on this machine, its process no longer exists (compared by id and start time);
- elsewhere, inside a Slurm job, the Slurm of its own cluster reports that the job has ended or was requeued, and the
  modification time of its file, which a living holder renews, has not changed for ``QUIET_SECONDS``;
- otherwise, that time has not changed for ``SILENCE_SECONDS``.

Slurm alone is not believed because it also reports jobs as ended whose node it merely cannot reach.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pipeline.errors import UserError, WorkersFailed
from pipeline.files import temporary_path
from pipeline.launch import slurm

FREE = "free"
UNKNOWN_START = 0
LOCK_POLL_SECONDS = 1.0
HANDOVER_SECONDS = 0.05  # polling interval while the lock is handed over
HEARTBEAT_SECONDS = 20.0
QUIET_SECONDS = 60.0  # without a heartbeat, after which Slurm's report that the holder's job has ended is accepted
SILENCE_SECONDS = 300.0  # without a heartbeat, after which a holder on another host counts as dead
ASK_SLURM_SECONDS = 15.0
FOREIGN_LOOKS = 20  # listings without a lock file, after which other files in its directory are reported

_NAME = re.compile(r"(.*),process=(\d+),started=(\d+),job=(\d+),restarts=(\d+)(?:,cluster=(.*))?", re.DOTALL)


class LockLost(WorkersFailed):
    """Another process considered this one dead and took over its lock. The artifact is not committed."""


@dataclass(frozen=True)
class Holder:
    """A process that holds a lock or waits for it. ``name`` and ``parse`` are inverses."""

    host: str  # with the boot id and the process namespace, in which the process id is unique
    process: int
    started: int  # clock ticks after boot, to distinguish processes with the same id
    job: int  # Slurm's job id; 0 outside a job
    restarts: int  # how many times the job was requeued
    cluster: str = ""  # whose Slurm knows the job; empty outside a job, or if it could not be determined

    @classmethod
    def current(cls, environment: Mapping[str, str]) -> Holder:
        """Returns this process."""
        job, restarts = slurm.job_of(environment) or 0, environment.get("SLURM_RESTART_COUNT", "0")
        cluster = environment.get("SLURM_CLUSTER_NAME", "") if job else ""
        if job and not cluster:
            with suppress(slurm.SlurmUnreachable):
                cluster = slurm.cluster_name()
        started = _start_time(os.getpid()) or 0
        return cls(_this_host(), os.getpid(), started, job, int(restarts), cluster.replace("/", "_"))

    @classmethod
    def parse(cls, name: str) -> Holder | None:
        """Parses the name of a lock's file. Returns None for any other name."""
        found = _NAME.fullmatch(name)
        if found is None:
            return None
        process, started, job, restarts = (int(number) for number in found.groups()[1:5])
        return cls(found[1], process, started, job, restarts, found[6] or "")

    @property
    def name(self) -> str:
        """The name of the lock's file while this process holds it."""
        numbers = {"process": self.process, "started": self.started, "job": self.job, "restarts": self.restarts}
        cluster = [f"cluster={self.cluster}"] if self.cluster else []
        return ",".join([self.host, *(f"{key}={value}" for key, value in numbers.items()), *cluster])

    def __str__(self) -> str:
        job = f" in Slurm job {self.job}" if self.job else ""
        return f"process {self.process} on {self.host.partition('+')[0]}{job}"

    def is_dead(self, me: Holder) -> bool:
        """Whether the process no longer exists, or Slurm reports that its job ended. False if neither is known."""
        if self.host == me.host:
            started = _start_time(self.process)
            return started is None or (UNKNOWN_START not in (started, self.started) and started != self.started)
        if not self.job or not self.cluster:
            return False
        if (self.job, self.cluster) == (me.job, me.cluster):  # a job's earlier run ends before Slurm starts it again
            return self.restarts < me.restarts
        try:
            # Another cluster's Slurm does not know the job, or knows another job by its id.
            if slurm.cluster_name() != self.cluster:
                return False
            info = slurm.job_info(self.job)
        except slurm.SlurmUnreachable:
            return False
        return info is None or not info.active or info.restarts > self.restarts

    def is_running_here(self, me: Holder) -> bool:
        """Whether the process is known to exist on this machine."""
        return self.host == me.host and _start_time(self.process) == self.started


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
    def held(self, on_wait: Callable[[str], None], before_look: Callable[[], None] = lambda: None) -> Iterator[bool]:
        """Acquires the lock, waiting if another process holds it, and releases it at the end.

        Args:
            on_wait: called once for each other holder, with a message that says who it is and whether it is alive, and
                once more if the lock is taken over from it later.
            before_look: called before every further look at the lock. It ends the wait by raising an exception.

        Yields:
            Whether the lock was taken over from a process on another machine. It is considered dead, but if it was only
            suspended or cut off, it may still write to files that it has opened.

        Raises:
            UserError: the directory contains files that no lock creates.
        """
        self._create()
        taken_over = self._acquire(on_wait, before_look)
        ended = threading.Event()
        heartbeat = threading.Thread(target=self._send_heartbeats, args=(ended,), name="lock-heartbeat", daemon=True)
        heartbeat.start()
        try:
            yield taken_over
        finally:
            ended.set()
            heartbeat.join()
            with suppress(OSError):  # the work is done, and the next process recognizes that this one has ended
                self._remove_leftovers()
            with suppress(OSError):
                self._rename(self.me.name, FREE)

    def confirm(self) -> None:
        """Raises ``LockLost`` if this process no longer holds the lock."""
        # Listed rather than looked up: NFS may answer a look-up of the name from its cache after a takeover.
        if self.me.name not in self._entries():
            raise LockLost(f"{self.directory} was taken over by {self.holder() or 'another process'}")

    def remove(self) -> None:
        """Removes the lock's directory. Only its holder may do that. The next process creates it again."""
        for name in (self.me.name, FREE):
            (self.directory / name).unlink(missing_ok=True)
        with suppress(OSError):  # another process has created it again
            self.directory.rmdir()

    def holder(self) -> Holder | None:
        """Returns the current holder, or None if the lock is free or just changing hands."""
        return next((holder for name in self._entries() if (holder := Holder.parse(name)) is not None), None)

    def _entries(self) -> list[str]:
        try:
            return sorted(os.listdir(self.directory))
        except FileNotFoundError:
            return []

    @cached_property
    def _my_file(self) -> Path:
        return self.directory / self.me.name

    def _create(self) -> None:
        """Creates the directory together with its file, unless it exists. Repairs one that is empty."""
        if self.directory.exists() and not self.directory.is_dir():
            raise self._foreign("it must be a directory")
        if self._entries():
            return
        new = temporary_path(self.directory)
        try:
            new.mkdir(parents=True)
            (new / FREE).touch()
            # This replaces an empty directory, and fails if another process has created or repaired it meanwhile.
            os.rename(new, self.directory)
        except OSError as error:
            shutil.rmtree(new, ignore_errors=True)
            # ENOENT: the holder has removed it, see ``_remove_leftovers``.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
                raise

    def _remove_leftovers(self) -> None:
        """Removes what processes that were killed while creating the lock left. Only its holder may do that.

        A living process may be creating the lock too. It no longer needs its directory: its rename would fail, because
        the lock exists.
        """
        if self.me.name in self._entries():
            for leftover in self.directory.parent.glob(f".{self.directory.name}.*"):
                shutil.rmtree(leftover, ignore_errors=True)

    def _foreign(self, rule: str) -> UserError:
        return UserError(
            setting="output_dir",
            value=self.directory,
            rule=f"{rule}, since it is the lock of an artifact",
            remedy="Remove it if no other command is building the artifact.",
        )

    def _rename(self, old: str, new: str) -> bool:
        try:
            os.rename(self.directory / old, self.directory / new)
        except FileNotFoundError:
            return False
        return True

    def _acquire(self, on_wait: Callable[[str], None], before_look: Callable[[], None]) -> bool:
        watch: _Watch | None = None
        looks = 0
        # If NFS loses the reply to a successful rename, it repeats the rename, which then fails. So also check whether
        # the file already has our name.
        while not (self._rename(FREE, self.me.name) or self._my_file.exists()):
            holder = self.holder()
            if holder is None:
                looks += 1
                self._repair(looks, on_wait)
                continue
            looks = 0
            if watch is None or watch.holder != holder:
                watch = _Watch(holder, self.directory / holder.name, self.me)
                if not watch.is_dead():
                    on_wait(f"{holder} is building it")
            if watch.is_dead():
                if self._rename(holder.name, self.me.name):
                    on_wait(f"{holder} died while building it, taking over")
                    os.utime(self._my_file)  # the first heartbeat: the file still has the dead holder's time
                    return holder.host != self.me.host
                continue
            time.sleep(LOCK_POLL_SECONDS)
            before_look()
        return False

    def _repair(self, looks: int, on_wait: Callable[[str], None]) -> None:
        """Deals with a directory in which ``looks`` listings in a row showed no holder, and ``free`` was not there."""
        entries = self._entries()
        if not entries:
            # File systems for temporary data purge old files, and ``free`` may be old.
            on_wait("its lock lacked its file, as after a purge of old files, and is repaired")
            self._create()
        elif FREE not in entries and looks >= FOREIGN_LOOKS:
            raise self._foreign(f"it must not contain {', '.join(entries)}")
        else:  # it may be changing hands, which a listing can miss
            time.sleep(HANDOVER_SECONDS)

    def _send_heartbeats(self, ended: threading.Event) -> None:
        while not ended.wait(HEARTBEAT_SECONDS):
            # If the lock was lost, confirm() reports it. Other errors, such as ESTALE on NFS, may be temporary, and
            # without further heartbeats another process would take over.
            with suppress(OSError):
                os.utime(self._my_file)


class _Watch:
    """Observes one holder: always by its heartbeats, and from time to time by asking Slurm."""

    def __init__(self, holder: Holder, file: Path, me: Holder) -> None:
        self.holder, self._file, self._me = holder, file, me
        self._last_heartbeat, self._unchanged_since = self._heartbeat(), time.monotonic()
        self._asked, self._job_ended = float("-inf"), False

    def is_dead(self) -> bool:
        """Whether the holder is known to be dead, or has been silent for too long."""
        now = time.monotonic()
        # Only changes count, measured with this host's clock, because the clocks of hosts differ. A file that cannot be
        # read counts as changed.
        heartbeat = self._heartbeat()
        if heartbeat is None or heartbeat != self._last_heartbeat:
            self._last_heartbeat, self._unchanged_since = heartbeat, now
        silence = now - self._unchanged_since
        if self.holder.host == self._me.host:
            silent = silence > SILENCE_SECONDS and not self.holder.is_running_here(self._me)
            return silent or self.holder.is_dead(self._me)
        # Asking Slurm's controller is expensive.
        if self._asked + ASK_SLURM_SECONDS <= now:
            self._asked, self._job_ended = now, self.holder.is_dead(self._me)
        return silence > SILENCE_SECONDS or (self._job_ended and silence > QUIET_SECONDS)

    def _heartbeat(self) -> int | None:
        try:
            # NFS answers stat() from a cache, but asks the server when a file is opened.
            with open(self._file, "rb") as stream:
                return os.fstat(stream.fileno()).st_mtime_ns
        except OSError:
            return None


def _this_host() -> str:
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    parts = [os.uname().nodename]
    if boot.exists():
        parts += [boot.read_text().strip()[:8], str(os.stat(namespace).st_ino)]
    return "+".join(parts)


def _start_time(process: int) -> int | None:
    """Returns when a process of this machine started, in clock ticks, or None if it does not exist or is a zombie.

    ``UNKNOWN_START`` if it exists, but cannot be inspected.
    """
    try:
        # The name in parentheses may contain spaces. After it, the state is field 0 and the start time field 19.
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        # There is no /proc, or it hides the processes of other users (mount option hidepid).
        return UNKNOWN_START if _process_exists(process) else None
    return None if fields[0] == "Z" else int(fields[19])


def _process_exists(process: int) -> bool:
    """Whether a process exists, also where /proc does not show it."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it exists, and belongs to another user
        return True
    return True
