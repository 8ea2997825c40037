"""Runs the cases of a test in one launch per number of ranks: uninterrupted, interrupted, and on other ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from pipeline.artifacts.task import StageTask, task_to_json
from tests.training.forked import ForkedRanks

CaseT = TypeVar("CaseT", bound=Any)  # a dataclass with ``ranks`` and ``zero``


@dataclass(frozen=True)
class Runs(Generic[CaseT]):
    """The finished tasks by case."""

    straight: dict[CaseT, StageTask]
    resumed: dict[CaseT, StageTask]
    elastic: dict[CaseT, StageTask]


def run_cases(
    make: Callable[[CaseT, Path | None], StageTask],
    straight: Iterable[CaseT],
    interrupted: Iterable[CaseT],
    elastic: Iterable[CaseT],
    stop_after: int,
    forked_ranks: ForkedRanks,
    new_directory: Callable[[str], Path],
) -> Runs[CaseT]:
    """Runs all cases: first on two ranks, which also saves the checkpoints, then on one and on four.

    Args:
        make: (case, directory or None for a new one) -> the task.
        straight: the cases to run without an interruption.
        interrupted: the cases to stop and resume.
        elastic: the cases that resume a checkpoint of two ranks at ZeRO 2.
        stop_after: the step after which tasks are stopped.
        forked_ranks: starts the ranks.
        new_directory: makes a directory for the logs of a launch.
    """
    runs = Runs(*({case: make(case, None) for case in cases} for cases in (straight, interrupted, elastic)))
    plan: list[tuple[StageTask, int | None]] = [(task, stop_after) for task in runs.resumed.values()]
    plan += [(make(replace(case, ranks=2, zero=2), task.out), stop_after) for case, task in runs.elastic.items()]
    plan += [(task, None) for group in (runs.straight, runs.resumed, runs.elastic) for task in group.values()]
    for ranks in (2, 1, 4):
        entries = [
            {
                "task": task_to_json(task),
                "stop_after": stop,
                "backend": "aot_eager",
            }  # compiling C++ takes half a minute
            for task, stop in plan
            if task.launch.processes == ranks
        ]
        if entries:
            forked_ranks.run_plan(ranks, entries, new_directory("launch"))
    return runs
