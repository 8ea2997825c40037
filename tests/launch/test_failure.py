"""The message about the rank that died first, derived from torchrun's logs of all nodes."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.launch.child import ORPHANED
from pipeline.launch.failure import Death, describe_exit, explain_workers, worker_deaths

REPORT = """
============================================================
some.module FAILED
------------------------------------------------------------
Failures:
{others}
------------------------------------------------------------
Root Cause (first observed failure):
{root}
============================================================
"""


def _entry(time: str, rank: int, code: int) -> str:
    return (
        f"[{rank}]:\n  time      : 2026-01-01_{time}\n  host      : vm\n  rank      : {rank} (local_rank: 0)\n"
        f"  exitcode  : {code} (pid: 7)\n  error_file: <N/A>\n  traceback : To enable traceback see"
    )


def _report(root: str, *others: str) -> str:
    return REPORT.format(root=root, others="\n".join(others) or "  <NO_OTHER_FAILURES>")


def _explain(log_dir: Path, outcome: dict[str, object], nodes: tuple[str, ...] = ("n1", "n2")) -> str:
    return explain_workers(log_dir, {"status": "lost", **outcome}, 1, processes=2, nodes=nodes).splitlines()[0]


def test_deaths_on_all_nodes_are_sorted_by_time(tmp_path: Path) -> None:
    (tmp_path / "torchrun-0.log").write_text(_report(_entry("10:00:30", 0, -9), _entry("10:00:31", 1, -15)))
    (tmp_path / "torchrun-1.log").write_text(_report(_entry("10:00:01", 3, -9), _entry("10:00:01", 2, -15)))
    assert worker_deaths(tmp_path) == [
        Death("2026-01-01_10:00:01", 3, -9),
        Death("2026-01-01_10:00:01", 2, -15),
        Death("2026-01-01_10:00:30", 0, -9),
        Death("2026-01-01_10:00:31", 1, -15),
    ]


def test_first_killed_rank_is_named_rather_than_hung_ranks_killed_later(tmp_path: Path) -> None:
    (tmp_path / "torchrun-0.log").write_text(_report(_entry("10:00:30", 0, -9)))
    (tmp_path / "torchrun-1.log").write_text(_report(_entry("10:00:01", 3, -9)))
    message = _explain(tmp_path, {"status": "failed", "rank": 1, "cause": "Connection closed by peer"})
    assert message == "rank 3 of 4 on node n2: killed by SIGKILL; the system may have run out of memory"


def test_cause_of_a_rank_that_raised_is_its_exception(tmp_path: Path) -> None:
    (tmp_path / "torchrun-0.log").write_text(_report(_entry("10:00:01", 1, 1), _entry("10:00:02", 0, -15)))
    message = _explain(tmp_path, {"status": "failed", "rank": 1, "cause": "ValueError: no"})
    assert message == "rank 1 of 4 on node n1: ValueError: no"


def test_orphaned_ranks_are_not_the_cause(tmp_path: Path) -> None:
    (tmp_path / "torchrun-0.log").write_text(_report(_entry("10:00:01", 0, ORPHANED)))
    (tmp_path / "torchrun-1.log").write_text(_report(_entry("10:00:05", 2, 3)))
    assert _explain(tmp_path, {}) == "rank 2 of 4 on node n2: ended with exit status 3"


def test_launchers_log_is_shown_if_no_worker_was_started(tmp_path: Path) -> None:
    (tmp_path / "torchrun.log").write_text("srun: error: Unable to create step\n")
    message = explain_workers(tmp_path, {"status": "lost"}, 1, processes=1, nodes=("n1", "n2"))
    assert message.splitlines()[:2] == [
        "the launcher ended with exit status 1", "  | srun: error: Unable to create step",
    ]  # fmt: skip


@pytest.mark.parametrize("status, expected", [(3, "exit status 3"), (-15, "killed by SIGTERM"), (-9, "out of memory")])
def test_exit_status_is_described(status: int, expected: str) -> None:
    assert expected in describe_exit(status)
