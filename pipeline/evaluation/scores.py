"""lm-eval's answer for one task as rows with standard errors, also for perplexities, which lm-eval leaves out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, TypedDict

from pipeline.files import sha256_json


class Score(TypedDict):
    """One number; ``stderr`` is one standard error over the task's ``n`` documents, null where it is not known."""

    task: str
    metric: str
    value: float
    stderr: float | None
    n: int


def scores_of(task: str, results: Mapping[str, Any]) -> list[Score]:
    """The rows of a task, or of a group: its own numbers where it has some, else those of its tasks.

    Args:
        results: what ``lm_eval.evaluator.evaluate`` returned.
    """
    own = _rows(task, results)
    if own or task not in results.get("group_subtasks", {}):
        return own
    return [row for child in results["group_subtasks"][task] for row in scores_of(child, results)]


def _rows(task: str, results: Mapping[str, Any]) -> list[Score]:
    numbers: Mapping[str, Any] = results["results"].get(task, {})
    rows = []
    for key, value in numbers.items():
        metric, _, filter_name = key.partition(",")
        if not filter_name or metric.endswith("_stderr") or not isinstance(value, Real):
            continue
        if not math.isfinite(value):
            raise ValueError(f"{task}: {metric} is {value}; the model's output is not finite")
        stderr = numbers.get(f"{metric}_stderr,{filter_name}")
        if metric in WEIGHTED and task in results["samples"]:
            stderr = standard_error(influences(metric, [sample[metric] for sample in results["samples"][task]]))
        known = float(stderr) if isinstance(stderr, Real) and math.isfinite(stderr) else None
        name, n = named(metric, filter_name), _count(task, results)
        rows.append(Score(task=task, metric=name, value=float(value), stderr=known, n=n))
    return rows


def _count(task: str, results: Mapping[str, Any]) -> int:
    """Documents scored; a group's are its tasks'."""
    if task in results["n-samples"]:
        return int(results["n-samples"][task]["effective"])
    return sum(_count(child, results) for child in results["group_subtasks"][task])


def text_scores(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Score]:
    """Perplexities and bits per byte of each list of samples, by the task that it stands for."""
    return [
        _text_score(task, metric, [sample[metric] for sample in found])
        for task, found in samples.items()
        for metric in WEIGHTED
    ]


def _text_score(task: str, metric: str, items: Sequence[Sample]) -> Score:
    stderr = standard_error(influences(metric, items))
    return Score(task=task, metric=metric, value=value_of(metric, items), stderr=stderr, n=len(items))


# --------------------------------------------------------------------------------------------------
# What each document of a task contributes to its score: the numbers by document, and the errors that follow from them.
#
# Needs no library, so that a report can take errors over pairs of documents from what an evaluation kept.

Sample = Any  # of one document: a number, or (log likelihood in nats, length in words or bytes)
WEIGHTED = {"word_perplexity": "perplexity", "byte_perplexity": "perplexity", "bits_per_byte": "bits"}
UNWEIGHTED = "perplexity"  # of documents that count alike (LAMBADA); its samples are log likelihoods


class Samples(TypedDict):
    """One task's numbers by document, in the order of its documents, so that two models can be compared in pairs."""

    documents: str  # a hash of all of them: two models were given the same ones where it is the same
    metrics: dict[str, list[Any]]  # by the metrics' names in scores


def kept_samples(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Samples]:
    """What is kept of lm-eval's samples, by task."""
    return {task: _kept(rows) for task, rows in samples.items()}


def _kept(rows: Sequence[Mapping[str, Any]]) -> Samples:
    """lm-eval goes through all documents once for each of a task's filters."""
    metrics: dict[str, list[Any]] = {}
    documents: dict[str, list[str]] = {}
    for row in rows:
        documents.setdefault(row["filter"], []).append(row["doc_hash"])
        for metric in row["metrics"]:
            metrics.setdefault(named(metric, row["filter"]), []).append(_plain(row[metric]))
    return Samples(documents=sha256_json(next(iter(documents.values()), [])), metrics=metrics)


def _plain(value: Any) -> Any:
    """A finite number, or several such as (log likelihood, length), as JSON has them; None for anything else."""
    if isinstance(value, (tuple, list)):
        return [_plain(part) for part in value]
    return float(value) if isinstance(value, Real) and math.isfinite(value) else None


def named(metric: str, filter_name: str) -> str:
    """What a metric is called in scores and samples."""
    return metric if filter_name == "none" else f"{metric} ({filter_name})"


def by_source(task: str, results: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """A text task's samples on each source's documents alone, as ``<task>/<source>``, where they have several."""
    samples: dict[str, list[dict[str, Any]]] = {}
    for sample in results["samples"][task]:
        samples.setdefault(f"{task}/{sample['doc']['source']}", []).append(sample)
    return dict(sorted(samples.items())) if len(samples) > 1 else {}


def value_of(metric: str, samples: Sequence[Sample]) -> float:
    """A task's score as lm-eval takes it from its documents: their mean, or from the rate r of all of them together.

    Args:
        samples: of each document a number, or (log likelihood in nats, length in words or bytes).
    """
    if not _is_rate(metric):
        return sum(samples) / len(samples)
    rate = _rate(_items(metric, samples))
    return rate / math.log(2) if WEIGHTED.get(metric) == "bits" else math.exp(rate)


def influences(metric: str, samples: Sequence[Sample]) -> list[float]:
    """By how much each document moves the score, to first order (its empirical influence over n); they sum to zero.

    For a mean m it is (xᵢ - m)/n. The rate r = -Σ log p / Σ length is a ratio of two sums over documents: there it is
    (-log pᵢ - r·lengthᵢ)/Σ length, and exp(r) times that for a perplexity exp(r).
    """
    if not _is_rate(metric):
        mean = value_of(metric, samples)
        return [(sample - mean) / len(samples) for sample in samples]
    items = _items(metric, samples)
    total, rate = sum(length for _, length in items), _rate(items)
    scale = 1 / math.log(2) if WEIGHTED.get(metric) == "bits" else math.exp(rate)
    return [scale * (-loglikelihood - rate * length) / total for loglikelihood, length in items]


def standard_error(influences: Sequence[float]) -> float | None:
    """Of a score, from its influences, or of the difference of two scores of the same documents, from theirs.

    sqrt(n/(n-1) Σ ψᵢ²); None for less than two documents. For a mean this is the sample deviation over √n.
    """
    n = len(influences)
    return math.sqrt(n / (n - 1) * sum(influence**2 for influence in influences)) if n > 1 else None


def is_sample(metric: str, value: Any) -> bool:
    """Whether a kept value is of the kind above: F1, BLEU and others are made of lists, by rules of their own."""
    if metric in WEIGHTED:
        return isinstance(value, list) and len(value) == 2 and all(isinstance(part, Real) for part in value)
    return isinstance(value, Real)


def _is_rate(metric: str) -> bool:
    return metric in WEIGHTED or metric == UNWEIGHTED


def _items(metric: str, samples: Sequence[Sample]) -> Sequence[tuple[float, float]]:
    """(log likelihood, length) of each document."""
    return [(sample, 1.0) for sample in samples] if metric == UNWEIGHTED else samples


def _rate(items: Sequence[tuple[float, float]]) -> float:
    return -sum(loglikelihood for loglikelihood, _ in items) / sum(length for _, length in items)
