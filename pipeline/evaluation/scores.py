"""lm-eval's answer for one task as rows with standard errors, also for perplexities, which lm-eval leaves out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, TypedDict

from pipeline.evaluation.samples import WEIGHTED, Sample, influences, named, standard_error, value_of


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
