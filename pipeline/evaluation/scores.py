"""lm-eval's answer for one task as rows with standard errors, also for perplexities, which lm-eval leaves out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, TypedDict

WEIGHTED = {"word_perplexity": "perplexity", "byte_perplexity": "perplexity", "bits_per_byte": "bits"}


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
        if metric in WEIGHTED:
            stderr = weighted_stderr(metric, [sample[metric] for sample in results["samples"][task]])
        name = metric if filter_name == "none" else f"{metric} ({filter_name})"
        known = float(stderr) if isinstance(stderr, Real) and math.isfinite(stderr) else None
        rows.append(Score(task=task, metric=name, value=float(value), stderr=known, n=_count(task, results)))
    return rows


def _count(task: str, results: Mapping[str, Any]) -> int:
    """Documents scored; a group's are its tasks'."""
    if task in results["n-samples"]:
        return int(results["n-samples"][task]["effective"])
    return sum(_count(child, results) for child in results["group_subtasks"][task])


def scores_by_source(task: str, results: Mapping[str, Any]) -> list[Score]:
    """A text task's perplexities on each source's documents alone, as ``<task>/<source>``, where they have several."""
    samples: dict[str, list[Any]] = {}
    for sample in results["samples"][task]:
        samples.setdefault(sample["doc"]["source"], []).append(sample)
    if len(samples) < 2:
        return []
    return [
        _weighted(f"{task}/{source}", metric, [sample[metric] for sample in samples[source]])
        for source in sorted(samples)
        for metric in WEIGHTED
    ]


def _weighted(task: str, metric: str, items: Sequence[tuple[float, int]]) -> Score:
    value, stderr = weighted_value(metric, items), weighted_stderr(metric, items)
    return Score(task=task, metric=metric, value=value, stderr=stderr, n=len(items))


def weighted_value(metric: str, items: Sequence[tuple[float, int]]) -> float:
    """A perplexity or bits per byte, as lm-eval takes them: from the rate r of all documents together.

    Args:
        items: (log likelihood in nats, length in words or bytes) of each document.
    """
    rate = _rate(items)
    return rate / math.log(2) if WEIGHTED[metric] == "bits" else math.exp(rate)


def _rate(items: Sequence[tuple[float, int]]) -> float:
    return -sum(loglikelihood for loglikelihood, _ in items) / sum(length for _, length in items)


def weighted_stderr(metric: str, items: Sequence[tuple[float, int]]) -> float | None:
    """Standard error of a perplexity or of bits per byte over documents of unequal length.

    The rate r = -Σ log p / Σ length is a ratio of two sums over documents, so its variance is, to first order,
    n/(n-1) Σ (-log pᵢ - r·lengthᵢ)² / (Σ length)²; a perplexity is exp(r), with standard error exp(r)·se(r).

    Args:
        items: (log likelihood in nats, length in words or bytes) of each document.
    """
    if len(items) < 2:
        return None
    total, rate = sum(length for _, length in items), _rate(items)
    residuals = sum((-loglikelihood - rate * length) ** 2 for loglikelihood, length in items)
    error = math.sqrt(len(items) / (len(items) - 1) * residuals) / total
    return error / math.log(2) if WEIGHTED[metric] == "bits" else math.exp(rate) * error


def samples_of(results: Mapping[str, Any]) -> dict[str, dict[str, list[Any]]]:
    """Each task's numbers by document, in the order of its documents, so that two models can be compared in pairs."""
    found: dict[str, dict[str, list[Any]]] = {}
    for task, rows in results["samples"].items():
        metrics = rows[0]["metrics"] if rows else []
        found[task] = {metric: [_plain(row.get(metric)) for row in rows] for metric in metrics}
    return found


def _plain(value: Any) -> Any:
    """A number, or a pair of numbers such as (log likelihood, length), as JSON has them; None for anything else."""
    if isinstance(value, (tuple, list)):
        return [_plain(part) for part in value]
    return float(value) if isinstance(value, Real) else None
