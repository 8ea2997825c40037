"""Sets up every process that the driver starts: its log, its exit with the parent process, and its signal mask.

srun starts ``python -m pipeline.launch.child COMMAND...`` on each node of a job. The process then executes that node's
torchrun.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ORPHANED = 70  # exit status of a process whose parent died
BLOCKED_SIGNALS = (signal.SIGUSR1,)  # not SIGTERM, which is how torchrun itself is terminated


def end_with_parent() -> None:
    """Exits this process as soon as its parent dies, even if the parent is killed with ``kill -9``.

    Standard input must be a pipe that the parent holds open and never writes to. The kernel closes it when the parent
    dies, and the read below returns. Processes started by torchrun inherit the same pipe, so the complete tree exits.
    Call this once, before any slow import.
    """
    threading.Thread(target=_exit_at_end_of_input, name="end-with-parent", daemon=True).start()


def _exit_at_end_of_input() -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass  # nothing is ever sent; only the end of the stream matters
    os._exit(ORPHANED)  # not sys.exit: the main thread may be blocked in a collective that never returns


def redirect_output(log: Path, *, append: bool) -> None:
    """Sends everything this process prints, including output from C++, to a log file.

    Args:
        log: the file. Its directory is created if it does not exist.
        append: keep the output of earlier attempts, rather than truncating the file.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | (os.O_APPEND if append else os.O_TRUNC))
    # Duplicating the descriptors, unlike assigning sys.stdout, also captures native libraries and child processes.
    os.dup2(descriptor, sys.stdout.fileno())
    os.dup2(descriptor, sys.stderr.fileno())
    os.close(descriptor)


@contextmanager
def block_signals_in_children() -> Iterator[None]:
    """Blocks ``BLOCKED_SIGNALS`` in processes that are started inside this context, and in their children.

    A signal sent to all processes of a job while they are starting therefore stays pending. Ranks unblock it once they
    can handle it. torchrun never unblocks it, since the default action would kill it.
    """
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _exec_torchrun(command: list[str]) -> None:
    # The rank of the node is only known on the node itself. torchrun reads its options from variables named PET_*.
    os.environ["PET_NODE_RANK"] = os.environ["SLURM_NODEID"]
    with block_signals_in_children():  # Slurm's tasks do not inherit the signal mask of srun
        os.execv(command[0], command)


if __name__ == "__main__":
    _exec_torchrun(sys.argv[1:])
