"""Last words: one message about a process that died, with its last lines and where the rest of its log is."""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.launch.child import ORPHANED

LAUNCHER_LOGS = "torchrun*.log"  # one a node, and one of the driver's side where there are several
LAUNCHER_LOG = "torchrun.log"
SHOWN_LOG_LINES = 15
OUT_OF_MEMORY = "out of memory"  # in whatever is said of it
MEMORY_HINT = f"the system may have run {OUT_OF_MEMORY}"


@dataclass(frozen=True)
class Death:
    """A worker's failure as torchrun reports it."""

    time: str  # of the node, to the second; sorts
    rank: int
    code: int  # exit status; negative: a signal


def failure_message(what: str, log: Path) -> str:
    """``what`` happened, the last lines of the log, and where it is."""
    last = log.read_text(errors="replace").splitlines()[-SHOWN_LOG_LINES:] if log.exists() else []
    return "\n".join([what, *(f"  | {line}" for line in last), f"the whole log: {log}"])


def describe_exit(status: int) -> str:
    """A process's exit status in words; negative ones are signals."""
    if status >= 0:
        return f"ended with exit status {status}"
    hint = f"; {MEMORY_HINT}" if status == -signal.SIGKILL else ""
    return f"killed by {signal.Signals(-status).name}{hint}"


def rank_log(log_dir: Path, rank: int) -> Path:
    """Where a rank's standard output and error go."""
    return log_dir / f"rank-{rank}.log"


def worker_deaths(log_dir: Path) -> list[Death]:
    """What torchrun said of failed workers on all nodes, the first to die first."""
    logs = sorted(log_dir.glob(LAUNCHER_LOGS))
    return sorted((death for log in logs for death in _deaths(log)), key=lambda death: death.time)


def _deaths(launcher_log: Path) -> list[Death]:
    text = launcher_log.read_text(errors="replace")
    found = re.findall(r"time\s*: (\S+)\n\s*host[^\n]*\n\s*rank\s*: (\d+)[^\n]*\n\s*exitcode\s*: (-?\d+)", text)
    # torchrun ends its report with the root cause.
    return [Death(time, int(rank), int(code)) for time, rank, code in reversed(found)]


def explain_workers(
    log_dir: Path, outcome: Mapping[str, Any], exit_status: int, processes: int, nodes: Sequence[str]
) -> str:
    """One message about the rank that failed first: which, where, how, its last lines, its log.

    Args:
        processes: a node.
        nodes: names of the nodes, in the order of their ranks; empty on a single machine.
    """
    if outcome.get("explained"):  # the launcher may have had to kill the others, who waited for this rank
        where, log = _where(outcome["rank"], processes, nodes), rank_log(log_dir, outcome["rank"])
        return f"rank {outcome['rank']}{where}: {outcome['cause']}\nits log: {log}"
    # The launcher ends the others with SIGTERM, then SIGKILL, and they may report a lost connection before that; the
    # first that a signal other than SIGTERM took is the cause.
    deaths = [death for death in worker_deaths(log_dir) if death.code != ORPHANED]
    killed = next((death for death in deaths if death.code < 0 and death.code != -signal.SIGTERM), None)
    if killed is not None:
        rank, cause = killed.rank, describe_exit(killed.code)
    elif outcome["status"] == "failed":
        rank, cause = outcome["rank"], outcome["cause"]
    elif deaths:
        rank, cause = deaths[0].rank, describe_exit(deaths[0].code)
    else:
        return failure_message(f"the launcher {describe_exit(exit_status)}", _talkative(log_dir))
    where, log = _where(rank, processes, nodes), rank_log(log_dir, rank)
    return failure_message(f"rank {rank}{where}: {cause}", log if log.exists() else _talkative(log_dir))


def _where(rank: int, processes: int, nodes: Sequence[str]) -> str:
    node = f" on node {nodes[rank // processes]}" if nodes else ""
    return f" of {processes * max(1, len(nodes))}{node}"


def _talkative(log_dir: Path) -> Path:
    """The launcher's log with most in it."""
    return max(log_dir.glob(LAUNCHER_LOGS), key=lambda log: log.stat().st_size, default=log_dir / LAUNCHER_LOG)
