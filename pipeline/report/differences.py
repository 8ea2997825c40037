"""Differences between scores, and the rule that decides whether a difference counts.

A difference counts when it is significant at the level of 5 % (``pipeline/report/significance.py``) and at least six
documents changed. Two models are scored on the same documents, so the standard error is taken over the differences per
document or, where documents name their clusters, per cluster (Miller 2024, Adding Error Bars to Evals, sections 2.2 and
4.2). Most documents are easy or hard for both models, and what the models have in common cancels: the paired error is
usually far below sqrt(se1² + se2²), the error for independent scores. The latter is used only if there are no pairs.

Perplexities are compared by the logarithm of their ratio, because the mean of log likelihoods is what is nearly normal.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from itertools import combinations
from typing import Any, NotRequired, TypedDict

from pipeline.evaluation.scores import Samples, influences, is_sample, value_of
from pipeline.report.metrics import direction, is_ratio_scale, relative_change, signed
from pipeline.report.results import Result
from pipeline.report.runs import RunArtifacts
from pipeline.report.significance import critical_value, expected_by_chance
from pipeline.standard_errors import standard_error

PAIRED_FILE = "paired_differences.json"
ROUNDING = 1e-6  # relative; another order of summation makes no difference, however small its standard error
FEWEST_CHANGED = 6  # documents; 6 is the smallest n with 2 · 0.5ⁿ < 0.05, the sign test if all changed in one direction

ScoredModel = tuple[str, str]  # run, target


class Verdict(StrEnum):
    """The conclusion from a difference."""

    BETTER = "better"
    WORSE = "worse"
    CHANGED = "changed"  # in a metric whose direction is not known
    NOISE = "within noise"
    SAME = "the same"  # up to rounding
    UNKNOWN = "no standard error"

    @property
    def could_count(self) -> bool:
        """Whether chance alone could have made the difference count."""
        return self not in (Verdict.SAME, Verdict.UNKNOWN)


MARKS = {Verdict.BETTER: "▲", Verdict.WORSE: "▼", Verdict.NOISE: "≈", Verdict.SAME: "="}


@dataclass(frozen=True)
class Difference:
    """``after`` minus ``before`` for one task and metric.

    Attributes:
        pair: the entry of ``paired_differences.json``; None without pairs.
        contenders: the number of models that the better one is the best of, if it was chosen for that; otherwise 2.
    """

    before: Result
    after: Result
    pair: PairedDifference | None = None
    contenders: int = 2

    @property
    def metric(self) -> str:
        """The metric's name."""
        return self.after["metric"]

    @property
    def value(self) -> float:
        """After minus before, in the metric's unit."""
        return self.after["value"] - self.before["value"]

    @property
    def _judged(self) -> tuple[float, float | None]:
        """The difference that is judged, of logarithms for perplexities, and its standard error.

        The error is over pairs, else sqrt(se1² + se2²), or None if either is unknown.
        """
        before, after, pair = self.before, self.after, self.pair
        if not is_ratio_scale(self.metric):
            return self.value, _hypot([before["stderr"], after["stderr"]]) if pair is None else pair["stderr"]
        log_ratio = math.log(after["value"] / before["value"])
        # Reports by earlier versions, from which a finished run's table is printed, have no errors of log ratios.
        if pair is not None and "log_ratio_stderr" in pair:
            return log_ratio, pair["log_ratio_stderr"]
        relative = [None if r["stderr"] is None else r["stderr"] / r["value"] for r in (before, after)]
        return log_ratio, _hypot(relative)

    @property
    def verdict(self) -> Verdict:
        """The conclusion, by the rule at the top of this module."""
        if math.isclose(self.before["value"], self.after["value"], rel_tol=ROUNDING):
            return Verdict.SAME
        value, stderr = self._judged
        if stderr is None:
            return Verdict.UNKNOWN
        too_few = self.pair is not None and self.pair["changed"] < FEWEST_CHANGED
        # Written with "not" so that a NaN counts as noise.
        if too_few or not abs(value) > critical_value(self.contenders, self._degrees_of_freedom) * stderr:
            return Verdict.NOISE
        improvement = value * direction_of(self.after)
        return Verdict.CHANGED if improvement == 0 else Verdict.BETTER if improvement > 0 else Verdict.WORSE

    @property
    def _degrees_of_freedom(self) -> int | None:
        if self.pair is not None:
            return self.pair.get("clusters", self.pair["n"]) - 1
        numbers = [result["n"] for result in (self.before, self.after) if result["n"] is not None]
        return min(numbers) - 1 if numbers else None

    def text(self, with_error: bool = True) -> str:
        """Formats the difference: ``−0.5 ± 2.1 points``, or ``−12.3 ± 0.4 %`` for a perplexity."""
        value, stderr = self._judged
        format_ = relative_change if is_ratio_scale(self.metric) else partial(signed, self.metric)
        return format_(value, stderr if with_error else None)

    @property
    def mark(self) -> str:
        """▲ better, ▼ worse, ≈ within noise, = the same value; empty if nothing can be said."""
        return MARKS.get(self.verdict, "")


def by_chance(verdicts: Iterable[Verdict]) -> str:
    """Returns, for example, ``9 of 24 are significant, about 1.2 would be by chance``; empty if none could be."""
    judged = [verdict for verdict in verdicts if verdict.could_count]
    counted = sum(verdict is not Verdict.NOISE for verdict in judged)
    if not judged:
        return ""
    return f"{counted} of {len(judged)} are significant, about {expected_by_chance(len(judged))} would be by chance"


def _hypot(errors: Sequence[float | None]) -> float | None:
    known = [error for error in errors if error is not None]
    return math.hypot(*known) if len(known) == len(errors) else None


def direction_of(result: Result) -> int:
    """Returns +1 if higher is better, -1 if lower is better, 0 if that is not known."""
    return direction(result["metric"], result.get("higher_is_better"))  # reports by earlier versions lack it


def leader(results: Sequence[Result | None]) -> Result | None:
    """Returns the best result, however small its lead; None for an unknown direction or fewer than two results."""
    present = [result for result in results if result is not None]
    sign = direction_of(present[0]) if present else 0
    return max(present, key=lambda result: sign * result["value"]) if sign and len(present) > 1 else None


# ------------------------------------------------------------------------------ pairs of documents


class PairedDifference(TypedDict):
    """An entry of ``paired_differences.json``: one score minus another on the same documents.

    The score of ``run``'s ``target`` minus that of ``against_run``'s ``against_target``.
    """

    run: str
    target: str
    against_run: str
    against_target: str
    task: str
    metric: str
    difference: float
    stderr: float | None  # one standard error, over pairs of documents or over clusters of them
    log_ratio_stderr: NotRequired[
        float | None
    ]  # the same of log(score / other score); null unless they are perplexities
    n: int
    clusters: NotRequired[int]  # of the documents; n if the documents name none
    changed: int  # documents on which the two models' values differ


@dataclass(frozen=True)
class _DocumentScores:
    """One score of one model with the values per document that it was computed from."""

    value: float
    documents: str  # identifies the documents
    samples: list[Any]
    influences: list[float]
    clusters: list[str]  # of every document; all different if the documents name none


def compared_models(models: Iterable[ScoredModel]) -> Iterator[tuple[ScoredModel, ScoredModel]]:
    """Yields the pairs that a report compares, in the order of ``models``.

    These are all models of one run, all runs' models of one target, and every model with the first run's base.
    """
    models = list(models)
    for before, after in combinations(models, 2):
        if before[0] == after[0] or before[1] == after[1] != "load" or before == (models[0][0], "load"):
            yield before, after


def paired_differences(runs: Sequence[RunArtifacts]) -> list[PairedDifference]:
    """Returns the differences between all compared models that were scored on the same documents.

    A score that its documents' values do not reproduce is left out, such as a mean over tasks of unequal sizes.
    """
    found: dict[tuple[str, str], dict[ScoredModel, _DocumentScores]] = {}
    for run in runs:
        for target in run.scored_targets():
            for task, metric, scores in _document_scores(run, target):
                found.setdefault((task, metric), {})[run.name, target] = scores
    return [
        _paired_difference(task_metric, before, after, scores[before], scores[after])
        for task_metric, scores in found.items()
        for before, after in compared_models(scores)
        if scores[before].documents == scores[after].documents
    ]


def _paired_difference(
    task_metric: tuple[str, str], before: ScoredModel, after: ScoredModel, first: _DocumentScores,
    second: _DocumentScores,
) -> PairedDifference:  # fmt: skip
    moved = [y - x for x, y in zip(first.influences, second.influences, strict=True)]
    # The influence on a logarithm is the influence over the value.
    log_moved = [y / second.value - x / first.value for x, y in zip(first.influences, second.influences, strict=True)]
    return PairedDifference(
        run=after[0],
        target=after[1],
        against_run=before[0],
        against_target=before[1],
        task=task_metric[0],
        metric=task_metric[1],
        difference=second.value - first.value,
        stderr=standard_error(moved, first.clusters),
        log_ratio_stderr=standard_error(log_moved, first.clusters) if is_ratio_scale(task_metric[1]) else None,
        n=len(moved),
        clusters=len(set(first.clusters)),
        changed=sum(x != y for x, y in zip(first.samples, second.samples, strict=True)),
    )


def _document_scores(run: RunArtifacts, target: str) -> Iterator[tuple[str, str, _DocumentScores]]:
    """Yields the scores of one model that its documents' values reproduce, by task and metric."""
    kept, evaluation = run.samples(target), run.evaluation(target)
    assert evaluation is not None
    for row in evaluation["rows"]:
        task, metric, value = row["task"], row["metric"], row["value"]
        documents, samples = _samples_of(kept.get(task, {}), metric)
        if samples and math.isclose(value_of(metric, samples), value, rel_tol=1e-6):
            clusters = _clusters_of(kept[task], metric)
            yield task, metric, _DocumentScores(value, documents, samples, influences(metric, samples), clusters)


def _samples_of(tasks: Mapping[str, Samples], metric: str) -> tuple[str, list[Any]]:
    """Returns an identifier of the documents of one task, or of all tasks of a group, and the values per document.

    The values are empty if some are missing or of another kind.
    """
    found = [sample for samples in tasks.values() for sample in samples["metrics"].get(metric, [None])]
    documents = " ".join(samples["documents"] for samples in tasks.values())
    return documents, found if all(is_sample(metric, sample) for sample in found) else []


def _clusters_of(tasks: Mapping[str, Samples], metric: str) -> list[str]:
    """Returns the cluster of every document of one task, or of all tasks of a group."""
    return [
        f"{task} {cluster}"
        for task, samples in tasks.items()
        for cluster in samples.get("clusters", range(len(samples["metrics"][metric])))
    ]
