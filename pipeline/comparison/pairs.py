"""``paired_differences.json``: how far two models are apart on the same documents, and how sure that is.

Most documents are easy or hard for both models, and what they share tells nothing of the difference: its standard
error over the documents' own differences is mostly far below sqrt(se1² + se2²).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import isclose
from typing import Any, TypedDict

from pipeline.comparison.run_artifacts import RunArtifacts
from pipeline.evaluation.samples import Samples, influences, is_sample, standard_error, value_of

Model = tuple[str, str]  # run, target
PAIRED_FILE = "paired_differences.json"


class PairedDifference(TypedDict):
    """The score of ``run``'s ``target`` minus that of ``against_run``'s ``against_target``, on the same documents."""

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
class _Score:
    """One score of one model with what it was made of."""

    value: float
    documents: str  # tells them from others
    numbers: list[Any]
    influences: list[float]


def side_by_side(models: Iterable[Model]) -> Iterator[tuple[Model, Model]]:
    """What a report compares, in the models' order: all of a run, all of a target, all with the first run's base."""
    models = list(models)
    for before, after in combinations(models, 2):
        if before[0] == after[0] or before[1] == after[1] != "load" or before == (models[0][0], "load"):
            yield before, after


def paired_differences(runs: Sequence[RunArtifacts]) -> list[PairedDifference]:
    """Of models side by side, where both were scored on the same documents.

    A score is left out where its documents' numbers do not give it, as for a mean over tasks of unequal sizes.
    """
    found: dict[tuple[str, str], dict[Model, _Score]] = {}
    for run in runs:
        for target in run.scored_targets():
            for task, metric, score in _scores(run, target):
                found.setdefault((task, metric), {})[run.name, target] = score
    return [
        _difference(measure, before, after, scores[before], scores[after])
        for measure, scores in found.items()
        for before, after in side_by_side(scores)
        if scores[before].documents == scores[after].documents
    ]


def _difference(
    measure: tuple[str, str], before: Model, after: Model, first: _Score, second: _Score
) -> PairedDifference:
    moved = [y - x for x, y in zip(first.influences, second.influences, strict=True)]
    return PairedDifference(
        run=after[0],
        target=after[1],
        against_run=before[0],
        against_target=before[1],
        task=measure[0],
        metric=measure[1],
        difference=second.value - first.value,
        stderr=standard_error(moved),
        n=len(moved),
        changed=sum(x != y for x, y in zip(first.numbers, second.numbers, strict=True)),
    )


def _scores(run: RunArtifacts, target: str) -> Iterator[tuple[str, str, _Score]]:
    """One model's scores that are those of its documents, by task and metric."""
    kept, evaluation = run.samples(target), run.evaluation(target)
    assert evaluation is not None
    for row in evaluation["rows"]:
        task, metric, value = row["task"], row["metric"], row["value"]
        documents, numbers = _numbers(kept.get(task, {}), metric)
        if numbers and isclose(value_of(metric, numbers), value, rel_tol=1e-6):
            yield task, metric, _Score(value, documents, numbers, influences(metric, numbers))


def _numbers(tasks: Mapping[str, Samples], metric: str) -> tuple[str, list[Any]]:
    """The documents' numbers of one task, or of all tasks of a group together, and what tells whose they are.

    No numbers where some are missing or of another kind.
    """
    numbers = [number for samples in tasks.values() for number in samples["metrics"].get(metric, [None])]
    documents = " ".join(samples["documents"] for samples in tasks.values())
    return documents, numbers if all(is_sample(metric, number) for number in numbers) else []
