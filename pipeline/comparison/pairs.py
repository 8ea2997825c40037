"""``paired_differences.json``: how far two models are apart on the same documents, and how sure that is.

Most documents are easy or hard for both models, and what they share tells nothing of the difference: its standard
error over the documents' own differences is mostly far below sqrt(se1² + se2²).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import isclose
from typing import Any, TypedDict

from pipeline.comparison.run_artifacts import RunArtifacts
from pipeline.evaluation.samples import Samples, influences, standard_error, value_of

PAIRED_FILE = "paired_differences.json"


class PairedDifference(TypedDict):
    """``run``'s score of ``target`` minus that of the model named by ``against``, over ``n`` documents of a task."""

    run: str
    target: str
    against_run: str
    against_target: str
    task: str
    metric: str
    difference: float
    stderr: float | None  # one standard error, over pairs of documents
    n: int
    changed: int  # documents on which the two are not the same


@dataclass(frozen=True)
class _Scored:
    """One score of one model with what it was made of."""

    run: str
    target: str
    value: float
    documents: str
    samples: list[Any]
    influences: list[float]


def paired_differences(runs: Sequence[RunArtifacts]) -> list[PairedDifference]:
    """Of all models of a run, of the runs' models of one target, and of every model and every base.

    A score is left out where its documents' numbers do not give it, as for a mean over tasks of unequal sizes.
    """
    by_measure: dict[tuple[str, str], list[_Scored]] = {}
    for run in runs:
        for target in run.scored_targets():
            for task, metric, scored in _scored(run, target):
                by_measure.setdefault((task, metric), []).append(scored)
    return [
        _difference(task, metric, before, after)
        for (task, metric), scored in by_measure.items()
        for before, after in combinations(scored, 2)
        if before.documents == after.documents and _compared(before, after)
    ]


def _compared(before: _Scored, after: _Scored) -> bool:
    return before.run == after.run or before.target == after.target or "load" in (before.target, after.target)


def _difference(task: str, metric: str, before: _Scored, after: _Scored) -> PairedDifference:
    moved = [y - x for x, y in zip(before.influences, after.influences, strict=True)]
    return PairedDifference(
        run=after.run,
        target=after.target,
        against_run=before.run,
        against_target=before.target,
        task=task,
        metric=metric,
        difference=after.value - before.value,
        stderr=standard_error(moved),
        n=len(moved),
        changed=sum(x != y for x, y in zip(before.samples, after.samples, strict=True)),
    )


def _scored(run: RunArtifacts, target: str) -> Iterator[tuple[str, str, _Scored]]:
    samples, evaluation = run.samples(target), run.evaluation(target)
    assert evaluation is not None
    for row in evaluation["rows"]:
        task, metric = row["task"], row["metric"]
        documents, numbers = _numbers(samples.get(task, {}), metric)
        if numbers and isclose(value_of(metric, numbers), row["value"], rel_tol=1e-6):
            parts = (documents, numbers, influences(metric, numbers))
            yield task, metric, _Scored(run.name, target, row["value"], *parts)


def _numbers(tasks: Mapping[str, Samples], metric: str) -> tuple[str, list[Any]]:
    """The documents' numbers of one task, or of all tasks of a group together, and what tells whose they are."""
    found = [samples["metrics"].get(metric, [None]) for samples in tasks.values()]
    numbers = [number for task in found for number in task]
    return " ".join(samples["documents"] for samples in tasks.values()), [] if None in numbers else numbers
