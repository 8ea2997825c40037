"""What each document of a task contributes to its score: the numbers by document, and the errors that follow from them.

Needs no library, so that a report can take errors over pairs of documents from what an evaluation kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, TypedDict

from pipeline.artifact import sha256_json

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
