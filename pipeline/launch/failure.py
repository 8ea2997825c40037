"""Explains why a stage or its workers died: the cause, the last lines of output and the path of the log."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.launch.child import ORPHANED

LAUNCHER_LOG, LAUNCHER_LOGS = "launcher.log", "launcher*.log"  # of srun, and of what it starts on each node
DEATHS_FILES = "deaths-*.jsonl"  # one per node: the ranks that failed
ALIVE_FILES = "alive-*.json"  # one per rank: where it is; see pipeline.training.watchdog
SHOWN_LOG_LINES = 15
OUT_OF_MEMORY = "out of memory"  # part of every message about insufficient memory
MEMORY_HINT = f"the system may have run {OUT_OF_MEMORY}"


def explain_workers(
    log_dir: Path, outcome: Mapping[str, Any], exit_status: int, processes: int, nodes: Sequence[str]
) -> str:
    """Describes the rank that failed first: its number, its node, the cause, its last output and its log.

    Args:
        log_dir: where the ranks and the launchers write their logs.
        outcome: the content of the outcome file, or ``{"status": "lost"}`` if no rank wrote one.
        exit_status: the launcher's exit status.
        processes: number of ranks per node.
        nodes: names of the nodes, in the order of their ranks. Empty on a single machine.
    """
    if outcome.get("explained"):
        # The cause is known, even if the launcher killed other ranks that were waiting for this one.
        where, log = _where(outcome["rank"], processes, nodes), rank_log(log_dir, outcome["rank"])
        return f"rank {outcome['rank']}{where}: {outcome['cause']}\nlog: {log}"
    # After one rank dies, the launcher ends the others with SIGTERM and then SIGKILL, and some report a lost connection
    # even before that. The first rank that was killed by anything other than SIGTERM is therefore the cause.
    deaths = [death for death in worker_deaths(log_dir) if death.code != ORPHANED]
    killed = next((death for death in deaths if death.code < 0 and death.code != -signal.SIGTERM), None)
    if killed is not None:
        rank, cause = killed.rank, describe_exit(killed.code)
    elif outcome["status"] == "failed":
        rank, cause = outcome["rank"], outcome["cause"]
    elif deaths:
        rank, cause = deaths[0].rank, describe_exit(deaths[0].code)
    else:
        ending = f"the launcher {describe_exit(exit_status)}" if exit_status else "the workers ended without an outcome"
        return failure_message(ending, _longest_launcher_log(log_dir))
    where, log = _where(rank, processes, nodes), rank_log(log_dir, rank)
    return failure_message(f"rank {rank}{where}: {cause}", log if log.exists() else _longest_launcher_log(log_dir))


def failure_message(cause: str, log: Path) -> str:
    """Returns the cause, the last lines of the log and the log's path."""
    last = log.read_text(errors="replace").splitlines()[-SHOWN_LOG_LINES:] if log.exists() else []
    return "\n".join([cause, *(f"  | {line}" for line in last), f"log: {log}"])


def describe_exit(status: int) -> str:
    """Describes a process's exit status. Negative values are signals."""
    if status >= 0:
        return f"ended with exit status {status}"
    hint = f"; {MEMORY_HINT}" if status == -signal.SIGKILL else ""
    return f"killed by {signal.Signals(-status).name}{hint}"


@dataclass(frozen=True)
class Death:
    """A worker that failed."""

    time: float  # of the node's clock, in seconds
    rank: int
    code: int  # exit status; negative for a signal


def deaths_file(log_dir: Path, node: int) -> Path:
    """Returns the file to which a node's launcher appends the ranks that failed there."""
    return log_dir / DEATHS_FILES.replace("*", str(node))


def alive_file(log_dir: Path, rank: int) -> Path:
    """Returns the file in which a rank shows that it is alive."""
    return log_dir / ALIVE_FILES.replace("*", str(rank))


def worker_deaths(log_dir: Path) -> list[Death]:
    """Returns the failed workers of all nodes in order of time."""
    texts = [file.read_text() for file in sorted(log_dir.glob(DEATHS_FILES))]
    # What follows the last newline is a line that is still being written.
    lines = [line for text in texts for line in text.split("\n")[:-1]]
    return sorted((Death(**json.loads(line)) for line in lines), key=lambda death: death.time)


def rank_log(log_dir: Path, rank: int) -> Path:
    """Returns the file with a rank's standard output and error."""
    return log_dir / f"rank-{rank}.log"


def _where(rank: int, processes: int, nodes: Sequence[str]) -> str:
    node = f" on node {nodes[rank // processes]}" if nodes else ""
    return f" of {processes * max(1, len(nodes))}{node}"


def _longest_launcher_log(log_dir: Path) -> Path:
    # srun's errors are in the driver's log and those of a node in the node's. The other log is empty. On a single
    # machine there is neither, since the driver starts the ranks.
    return max(log_dir.glob(LAUNCHER_LOGS), key=lambda log: log.stat().st_size, default=rank_log(log_dir, 0))
