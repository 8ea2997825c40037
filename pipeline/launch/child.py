"""Sets up every process that the driver starts: its log, its exit with the parent process, and its signal mask."""

from __future__ import annotations

import faulthandler
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NoReturn

ORPHANED = 70  # exit status of a process whose parent died
PARENT_POLL_SECONDS = 1.0
BLOCKED_SIGNALS = (signal.SIGUSR1,)  # not SIGTERM, which ends a process that is still starting
STACK_SIGNAL = signal.SIGUSR2  # makes a rank write the stacks of its threads; ends a process that is still starting


@contextmanager
def importing() -> Iterator[None]:
    """Disables garbage collection during imports, which makes them about 20 % faster."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # later collections skip the imported objects
        gc.enable()


def exit_process(status: int) -> NoReturn:
    """Exits without the interpreter's last garbage collections, which take more than a second after large imports."""
    gc.freeze()
    sys.exit(status)


def end_with_parent(has_pipe: bool = True) -> None:
    """Exits this process as soon as its parent dies, even if the parent is killed with ``kill -9``.

    Call this once, before any slow import.

    Args:
        has_pipe: whether standard input is a pipe that the parent holds open and never writes to. The kernel closes it
            when the parent dies, and a read returns at once. All ranks have the same pipe, so all of them exit.
            Without it, this process looks every ``PARENT_POLL_SECONDS`` whether it has the same parent as now.
    """
    watch = _exit_at_end_of_input if has_pipe else partial(_exit_without, os.getppid())
    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


def _exit_at_end_of_input() -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass  # nothing is ever sent; only the end of the stream matters
    os._exit(ORPHANED)  # not sys.exit: the main thread may be blocked in a collective that never returns


def _exit_without(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_POLL_SECONDS)
    os._exit(ORPHANED)


def write_stacks_on_signal() -> None:
    """Makes this process write the stacks of all threads to standard error on ``STACK_SIGNAL``, and when it crashes.

    This works even if the main thread is blocked in a collective.
    """
    faulthandler.enable()
    faulthandler.register(STACK_SIGNAL, all_threads=True)


def redirect_output(log: Path) -> None:
    """Sends everything this process prints, including output from C++, to a new log file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    # Duplicating the descriptors, unlike assigning sys.stdout, also captures native libraries and child processes.
    os.dup2(descriptor, sys.stdout.fileno())
    os.dup2(descriptor, sys.stderr.fileno())
    os.close(descriptor)


@contextmanager
def block_signals_in_children() -> Iterator[None]:
    """Blocks ``BLOCKED_SIGNALS`` in processes that are started inside this context, and in their children.

    A signal sent to all processes of a job while they are starting therefore stays pending. Ranks unblock it once they
    can handle it.
    """
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def wait_or_terminate(process: subprocess.Popen[bytes]) -> int:
    """Waits for a process and returns its exit status. If this process is interrupted, the other one ends first."""
    try:
        return process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise


def close_pipes(process: subprocess.Popen[bytes]) -> None:
    """Ends a process that answers requests until its input ends, and waits for it."""
    assert process.stdin is not None and process.stdout is not None
    process.stdout.close()
    with suppress(BrokenPipeError):  # closing flushes, and a killed process may have left a request half written
        process.stdin.close()
    process.wait()
