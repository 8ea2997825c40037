"""What srun starts on every node of a job, ``python -m pipeline.launch.node COMMAND...``: the node's torchrun."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

HELD_BACK = (signal.SIGUSR1,)  # not SIGTERM, which is how torchrun is ended


@contextmanager
def held_back_from_children() -> Iterator[None]:
    """A process started meanwhile, and those that it starts, get these signals once they unblock them.

    Ranks do when they can answer. torchrun never does: a signal to all of a job's processes would end it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def main(command: list[str]) -> None:
    """Takes the command's place. Only here is the node's number known; PET_*: torchrun's variables for its options."""
    os.environ["PET_NODE_RANK"] = os.environ["SLURM_NODEID"]
    with held_back_from_children():  # Slurm's tasks inherit nothing from srun
        os.execv(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
