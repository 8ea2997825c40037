"""When a difference between two scores counts.

It counts when it is larger than two of its standard errors. Two models are scored on the same documents, so the error
is taken over the documents' differences (``pairs``; Miller 2024, Adding Error Bars to Evals, section 4.2), and at least
six documents must have changed. Where there are no pairs the scores are taken for independent: sqrt(se1² + se2²).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import combinations
from math import isclose
from typing import Any, TypedDict

from pipeline.evaluation.scores import Samples, influences, is_sample, standard_error, value_of
from pipeline.report.metrics import direction
from pipeline.report.results import Row
from pipeline.report.runs import RunArtifacts

ROUNDING = 1e-6  # relative; a sum in another order is no difference, however surely it is one
FEWEST_CHANGED = 6  # documents: six that all changed for the better are the fewest with 2 · 0.5ⁿ < 0.05 (sign test)


class Verdict(StrEnum):
    """What may be said of a difference."""

    BETTER = "better"
    WORSE = "worse"
    CHANGED = "changed"  # by more than two standard errors, of a metric whose better side is not known
    NOISE = "within noise"
    SAME = "the same"  # to rounding
    UNKNOWN = "no standard error"


MARKS = {Verdict.BETTER: "▲", Verdict.WORSE: "▼", Verdict.NOISE: "≈", Verdict.SAME: "="}


@dataclass(frozen=True)
class Difference:
    """``after`` minus ``before`` of one task and metric, in the metric's unit.

    Attributes:
        paired_stderr: one standard error of the difference over pairs of documents; None where there is none.
        changed: the documents on which the two models' numbers are not the same, where that is known.
    """

    before: Row
    after: Row
    paired_stderr: float | None = None
    changed: int | None = None

    @property
    def value(self) -> float:
        """After minus before."""
        return self.after["value"] - self.before["value"]

    @property
    def stderr(self) -> float | None:
        """One standard error of the value: over pairs, else sqrt(se1² + se2²), or None where either is unknown."""
        if self.paired_stderr is not None:
            return self.paired_stderr
        before, after = self.before["stderr"], self.after["stderr"]
        return None if before is None or after is None else math.hypot(before, after)

    @property
    def verdict(self) -> Verdict:
        """What may be said of the value; see above."""
        if math.isclose(self.before["value"], self.after["value"], rel_tol=ROUNDING):
            return Verdict.SAME
        if self.stderr is None:
            return Verdict.UNKNOWN
        too_few = self.changed is not None and self.changed < FEWEST_CHANGED
        if too_few or not abs(self.value) > 2 * self.stderr:
            return Verdict.NOISE
        side = self.value * direction(self.after["metric"])
        return Verdict.CHANGED if side == 0 else Verdict.BETTER if side > 0 else Verdict.WORSE

    @property
    def mark(self) -> str:
        """▲ better, ▼ worse, ≈ within noise, = the same number; nothing where nothing can be said."""
        return MARKS.get(self.verdict, "")


def leader(rows: Sequence[Row | None]) -> Row | None:
    """The row with the best value, by however little; None where the better side is not known or nobody is beaten."""
    present = [row for row in rows if row is not None]
    side = direction(present[0]["metric"]) if present else 0
    return max(present, key=lambda row: side * row["value"]) if side and len(present) > 1 else None


# --------------------------------------------------------------------------------------------------
# ``paired_differences.json``: how far two models are apart on the same documents, and how sure that is.
#
# Most documents are easy or hard for both models, and what they share tells nothing of the difference: its standard
# error over the documents' own differences is mostly far below sqrt(se1² + se2²).

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
