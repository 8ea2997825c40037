"""The message about the rank that died first, from what the launchers of all nodes have recorded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.launch.child import ORPHANED
from pipeline.launch.failure import Death, deaths_file, describe_exit, explain_workers, worker_deaths


def _record(log_dir: Path, node: int, *deaths: tuple[float, int, int]) -> None:
    lines = [json.dumps({"time": time, "rank": rank, "code": code}) + "\n" for time, rank, code in deaths]
    deaths_file(log_dir, node).write_text("".join(lines))


def _explain(log_dir: Path, outcome: dict[str, object], nodes: tuple[str, ...] = ("n1", "n2")) -> str:
    return explain_workers(log_dir, {"status": "lost", **outcome}, 1, processes=2, nodes=nodes).splitlines()[0]


def test_deaths_on_all_nodes_are_sorted_by_time(tmp_path: Path) -> None:
    _record(tmp_path, 0, (30.0, 0, -9), (31.5, 1, -15))
    _record(tmp_path, 1, (1.2, 3, -9), (1.4, 2, -15))
    assert worker_deaths(tmp_path) == [
        Death(1.2, 3, -9),
        Death(1.4, 2, -15),
        Death(30.0, 0, -9),
        Death(31.5, 1, -15),
    ]


def test_first_killed_rank_is_named_rather_than_hung_ranks_killed_later(tmp_path: Path) -> None:
    _record(tmp_path, 0, (30.0, 0, -9))
    _record(tmp_path, 1, (1.0, 3, -9))
    message = _explain(tmp_path, {"status": "failed", "rank": 1, "cause": "Connection closed by peer"})
    assert message == "rank 3 of 4 on node n2: killed by SIGKILL; the system may have run out of memory"


def test_cause_of_a_rank_that_raised_is_its_exception(tmp_path: Path) -> None:
    _record(tmp_path, 0, (1.0, 1, 1), (2.0, 0, -15))
    message = _explain(tmp_path, {"status": "failed", "rank": 1, "cause": "ValueError: no"})
    assert message == "rank 1 of 4 on node n1: ValueError: no"


def test_orphaned_ranks_are_not_the_cause(tmp_path: Path) -> None:
    _record(tmp_path, 0, (1.0, 0, ORPHANED))
    _record(tmp_path, 1, (5.0, 2, 3))
    assert _explain(tmp_path, {}) == "rank 2 of 4 on node n2: ended with exit status 3"


def test_launchers_log_is_shown_if_no_worker_was_started(tmp_path: Path) -> None:
    (tmp_path / "launcher.log").write_text("srun: error: Unable to create step\n")
    message = explain_workers(tmp_path, {"status": "lost"}, 1, processes=1, nodes=("n1", "n2"))
    assert message.splitlines()[:2] == [
        "the launcher ended with exit status 1", "  | srun: error: Unable to create step",
    ]  # fmt: skip


@pytest.mark.parametrize("status, expected", [(3, "exit status 3"), (-15, "killed by SIGTERM"), (-9, "out of memory")])
def test_exit_status_is_described(status: int, expected: str) -> None:
    assert expected in describe_exit(status)
