"""Starts the ranks of one node and waits for them.

On a single machine the driver does this itself. On several nodes of a Slurm job, srun starts
``python -m pipeline.launch.ranks PROCESSES NODES MODULE JOB_FILE`` once per node.

A rank is identified by the variables that torchrun also sets: ``RANK``, ``LOCAL_RANK``, ``WORLD_SIZE`` and
``LOCAL_WORLD_SIZE``. There is no ``MASTER_PORT``: rank 0 chooses a free port itself and publishes it in the file that
``RENDEZVOUS_VARIABLE`` names (see ``pipeline.training.process_group``). The launcher opens no port.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType

from pipeline.files import temporary_path
from pipeline.launch.child import BLOCKED_SIGNALS, STACK_SIGNAL, block_signals_in_children
from pipeline.launch.failure import deaths_file, rank_log

LOG_DIR_VARIABLE = "PIPELINE_LOG_DIR"  # set in the environment of workers that have a driver
RENDEZVOUS_VARIABLE = "PIPELINE_RENDEZVOUS"  # the file in which rank 0 publishes the port at which the ranks connect
ADDRESS_VARIABLE = "PIPELINE_ADDRESS"  # at which the other ranks reach rank 0
POLL_SECONDS = 0.2
STACK_SECONDS = 0.5  # to write the stacks


class Ranks:
    """The worker processes of one node. Waits, terminates and kills like ``subprocess.Popen``, for all of them."""

    def __init__(
        self, module: str, job_file: Path, environment: Mapping[str, str], processes: int, node: int = 0, nodes: int = 1
    ) -> None:
        """Starts ``python -m module job_file`` for every rank of a node.

        On a single node the standard input of the ranks is a pipe. On several nodes they inherit this process's.
        Their output is appended to one log per rank.

        Args:
            module: the worker's module.
            job_file: its argument.
            environment: of the workers, with ``LOG_DIR_VARIABLE``.
            processes: number of ranks per node.
            node: which of the nodes this is.
            nodes: number of nodes.
        """
        self.returncode: int | None = None
        self._log_dir, self._node, self._first_rank = Path(environment[LOG_DIR_VARIABLE]), node, node * processes
        self._processes: list[subprocess.Popen[bytes]] = []
        self._ended: set[int] = set()  # local ranks
        read_end, write_end = os.pipe() if nodes == 1 else (None, None)
        self.stdin = None if write_end is None else os.fdopen(write_end, "wb")
        command = [sys.executable, "-u", "-m", module, str(job_file.absolute())]
        try:
            for local_rank in range(processes):
                rank = self._first_rank + local_rank
                place = {
                    "RANK": str(rank), "WORLD_SIZE": str(nodes * processes),
                    "LOCAL_RANK": str(local_rank), "LOCAL_WORLD_SIZE": str(processes),
                }  # fmt: skip
                # In a new session, so that Ctrl-C in the terminal reaches only the driver, which then stops the ranks,
                # and so that a rank can be killed together with the processes that it has started.
                with open(rank_log(self._log_dir, rank), "ab") as log, block_signals_in_children():
                    process = subprocess.Popen(
                        command, stdin=read_end, stdout=log, stderr=log, env={**environment, **place},
                        start_new_session=True,
                    )  # fmt: skip
                self._processes.append(process)
        except BaseException:
            self.kill()
            raise
        finally:
            if read_end is not None:
                os.close(read_end)

    def wait(self, timeout: float | None = None) -> int:
        """Waits until all ranks have ended. After the first failure, the others get SIGTERM.

        Returns:
            0 if all ranks succeeded, else the exit status of the first one that failed.

        Raises:
            TimeoutExpired: some still run after ``timeout`` seconds.
        """
        deadline = float("inf") if timeout is None else time.monotonic() + timeout
        while running := self._running():
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise subprocess.TimeoutExpired(running[0].args, timeout or 0.0)
            with suppress(subprocess.TimeoutExpired):
                running[0].wait(min(remaining, POLL_SECONDS))
        self.returncode = self.returncode or 0
        return self.returncode

    def _running(self) -> list[subprocess.Popen[bytes]]:
        """Returns the ranks that still run, and records those that have failed since the last call."""
        for local_rank, process in enumerate(self._processes):
            if local_rank in self._ended or process.poll() is None:
                continue
            self._ended.add(local_rank)
            if process.returncode:
                self._record_death(local_rank, process.returncode)
        return [process for process in self._processes if process.returncode is None]

    def _record_death(self, local_rank: int, code: int) -> None:
        death = {"time": time.time(), "rank": self._first_rank + local_rank, "code": code}
        with open(deaths_file(self._log_dir, self._node), "a") as file:
            file.write(json.dumps(death) + "\n")
        if self.returncode is None:
            self.returncode = code
            self.terminate()

    def terminate(self) -> None:
        """Sends SIGTERM to the ranks, which then save and exit."""
        for process in self._processes:
            process.terminate()

    def kill(self) -> None:
        """Kills the ranks and the processes that they have started, after the ranks have logged their stacks."""
        stuck = [process for process in self._processes if process.poll() is None]
        for process in stuck:
            process.send_signal(STACK_SIGNAL)
            process.send_signal(signal.SIGCONT)  # a stopped process handles no other signal
        if stuck:
            time.sleep(STACK_SECONDS)
        for process in stuck:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def refresh_directory(directory: Path) -> None:
    """Makes sure that files which other hosts have created are seen.

    NFS may cache for up to a minute that a file does not exist. Changing the directory from this host prevents that.
    """
    with suppress(OSError):
        probe = temporary_path(directory / "probe")
        probe.touch()
        probe.unlink()


def main(processes: int, nodes: int, module: str, job_file: Path) -> int:
    """Runs the ranks of a node of a Slurm job, and returns the exit status."""
    signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED_SIGNALS)  # Slurm's tasks do not inherit the signal mask of srun
    terminated = False

    def on_sigterm(number: int, frame: FrameType | None) -> None:
        nonlocal terminated
        terminated = True

    signal.signal(signal.SIGTERM, on_sigterm)
    ranks = Ranks(module, job_file, os.environ, processes, int(os.environ["SLURM_NODEID"]), nodes)
    while True:
        try:
            status = ranks.wait(POLL_SECONDS)
        except subprocess.TimeoutExpired:
            if terminated:  # Slurm kills what is left after a while
                ranks.terminate()
                terminated = False
        else:
            return 128 - status if status < 0 else status


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])))
