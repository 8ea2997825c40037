"""Scores with standard errors from lm-eval's results, and what each document contributes to them.

lm-eval gives no standard errors for perplexities that weight documents by their length, and for others the bootstrap's,
which is far larger than the error of the logarithm where that is large. They are computed here from the values per
document (samples), which are also kept, so that a report can take errors over pairs of documents. Nothing beyond the
standard library is needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, NotRequired, TypedDict

from pipeline.files import sha256_json
from pipeline.standard_errors import ratio_influences, standard_error

# A sample is the value of one document: a number, or (log likelihood in nats, length in words or bytes).
Sample = Any
# The metrics that are a rate over all documents together, -Σ log p / Σ length, as exp(rate) or in bits.
LENGTH_WEIGHTED = {"word_perplexity": "perplexity", "byte_perplexity": "perplexity", "bits_per_byte": "bits"}
LARGEST_RATE = 300.0  # nats per word; above, as for text without spaces, exp or the square of an error may overflow
EQUALLY_WEIGHTED = "perplexity"  # the same with a length of 1 for every document (LAMBADA); samples are log likelihoods


class Score(TypedDict):
    """One number. ``stderr`` is one standard error over the task's ``n`` documents, null if unknown."""

    task: str
    metric: str
    value: float
    stderr: float | None
    n: int
    higher_is_better: bool | None  # as the task declares; null if it does not, or if the tasks of a group disagree
    backend: NotRequired[str]  # the program that generated the answers or computed the likelihoods, with its version


class Samples(TypedDict):
    """One task's values per document, in the order of its documents, so that two models can be compared in pairs."""

    documents: str  # a hash of all documents, equal for two models that were given the same documents
    metrics: dict[str, list[Any]]  # by the names of metrics in scores
    clusters: NotRequired[list[str]]  # of documents that are not independent; see ``clusters_of``


def scores_of(task: str, results: Mapping[str, Any]) -> list[Score]:
    """Returns the scores of a task or group. A group without its own scores has those of its tasks.

    Args:
        results: what ``lm_eval.evaluator.evaluate`` returned.

    Raises:
        ValueError: a score is not finite.
    """
    own = _own_scores(task, results)
    if own or task not in results.get("group_subtasks", {}):
        return own
    return [score for child in results["group_subtasks"][task] for score in scores_of(child, results)]


def _own_scores(task: str, results: Mapping[str, Any]) -> list[Score]:
    numbers: Mapping[str, Any] = results["results"].get(task, {})
    scores = []
    for key, value in numbers.items():
        metric, _, filter_name = key.partition(",")
        if not filter_name or metric.endswith("_stderr") or not isinstance(value, Real):
            continue
        if LENGTH_WEIGHTED.get(metric) == "perplexity" and float(value) > math.exp(LARGEST_RATE):
            continue  # bits per byte of the same text are finite unless the model's output is not
        if not math.isfinite(value):
            raise ValueError(f"{task}: {metric} is {value}; the model's output is not finite")
        stderr: Any = _own_stderr(task, metric, filter_name, float(value), results)
        if stderr is None:
            stderr = numbers.get(f"{metric}_stderr,{filter_name}")
        score = Score(
            task=task, metric=metric_name(metric, filter_name), value=float(value),
            # lm-eval writes "N/A" for an unknown standard error.
            stderr=float(stderr) if isinstance(stderr, Real) and math.isfinite(stderr) else None,
            n=_count(task, results),
            higher_is_better=results["higher_is_better"].get(task, {}).get(metric),
        )  # fmt: skip
        scores.append(score)
    return scores


def _own_stderr(task: str, metric: str, filter_name: str, value: float, results: Mapping[str, Any]) -> float | None:
    """Returns the standard error where lm-eval has none or assumes independent documents, and None elsewhere."""
    rows = [row for row in results["samples"].get(task, ()) if row["filter"] == filter_name and metric in row]
    clusters = clusters_of(task, rows, results)
    if not rows or (clusters is None and not _is_rate(metric)):
        return None
    samples = [row[metric] for row in rows]
    if not all(is_sample(metric, _json_value(sample)) for sample in samples):
        return None
    if not math.isclose(value_of(metric, samples), value, rel_tol=1e-6):
        return None
    return standard_error(influences(metric, samples), clusters)


def clusters_of(task: str, rows: Sequence[Mapping[str, Any]], results: Mapping[str, Any]) -> list[str] | None:
    """Returns the cluster of each of a task's samples: the value of the document's field that the task's YAML names.

    Items of one template or about one text are not independent, which ``metadata: {cluster: <field>}`` declares. Errors
    that ignore it are too small (Miller 2024, Adding Error Bars to Evals, section 2.2).
    """
    metadata = results["configs"].get(task, {}).get("metadata") or {}
    field = metadata.get("cluster")
    return None if field is None else [str(row["doc"][field]) for row in rows]


def _count(task: str, results: Mapping[str, Any]) -> int:
    """Returns the number of documents scored, for a group over all its tasks."""
    if task in results["n-samples"]:
        return int(results["n-samples"][task]["effective"])
    return sum(_count(child, results) for child in results["group_subtasks"][task])


def metric_name(metric: str, filter_name: str) -> str:
    """Returns the name of a metric in scores and samples; ``none`` is lm-eval's name for no filter."""
    return metric if filter_name == "none" else f"{metric} ({filter_name})"


# ----------------------------------------------------------------------------- scores of each source


def by_source(task: str, results: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Groups a text task's samples by the documents' source, as ``<task>/<source>``; empty for a single source."""
    samples: dict[str, list[dict[str, Any]]] = {}
    for sample in results["samples"][task]:
        samples.setdefault(f"{task}/{sample['doc']['source']}", []).append(sample)
    return dict(sorted(samples.items())) if len(samples) > 1 else {}


def text_scores(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Score]:
    """Perplexities and bits per byte of the samples of several tasks, as ``by_source`` returns them."""
    return [
        _text_score(task, metric, [sample[metric] for sample in found])
        for task, found in samples.items()
        for metric, kind in LENGTH_WEIGHTED.items()
        if kind == "bits" or _rate([sample[metric] for sample in found]) <= LARGEST_RATE
    ]


def _text_score(task: str, metric: str, samples: Sequence[Sample]) -> Score:
    stderr = standard_error(influences(metric, samples))
    value = value_of(metric, samples)
    return Score(task=task, metric=metric, value=value, stderr=stderr, n=len(samples), higher_is_better=False)


# ------------------------------------------------------------------------------ values per document


def kept_samples(samples: Mapping[str, Sequence[Mapping[str, Any]]], results: Mapping[str, Any]) -> dict[str, Samples]:
    """Returns the part of lm-eval's samples that is kept, by task."""
    kept = {}
    for task, rows in samples.items():
        kept[task] = _kept(rows)
        clusters = clusters_of(task, [row for row in rows if row["filter"] == rows[0]["filter"]], results)
        if clusters is not None:
            kept[task]["clusters"] = clusters
    return kept


def _kept(rows: Sequence[Mapping[str, Any]]) -> Samples:
    metrics: dict[str, list[Any]] = {}
    documents: dict[str, list[str]] = {}
    # lm-eval lists all documents once for each filter of the task.
    for row in rows:
        documents.setdefault(row["filter"], []).append(row["doc_hash"])
        for metric in row["metrics"]:
            metrics.setdefault(metric_name(metric, row["filter"]), []).append(_json_value(row[metric]))
    first = next(iter(documents.values()), [])
    # Values of some of the documents only, which a task may choose by the answers, would be paired with others.
    complete = {name: values for name, values in metrics.items() if len(values) == len(first)}
    return Samples(documents=sha256_json(first), metrics=complete)


def _json_value(value: Any) -> Any:
    """Converts a finite number, or several such as (log likelihood, length), to JSON; None for anything else."""
    if isinstance(value, (tuple, list)):
        return [_json_value(part) for part in value]
    return float(value) if isinstance(value, Real) and math.isfinite(value) else None


def is_sample(metric: str, value: Any) -> bool:
    """Returns whether ``value_of`` can use a kept value. F1, BLEU and others keep lists and have their own rules."""
    if metric in LENGTH_WEIGHTED:
        return isinstance(value, list) and len(value) == 2 and all(isinstance(part, Real) for part in value)
    return isinstance(value, Real)


def value_of(metric: str, samples: Sequence[Sample]) -> float:
    """Computes a task's score from its documents as lm-eval does: their mean, or a function of the rate over all.

    Args:
        samples: per document a number, or (log likelihood in nats, length in words or bytes).
    """
    if not _is_rate(metric):
        return sum(samples) / len(samples)
    rate = _rate(_with_lengths(metric, samples))
    return rate / math.log(2) if LENGTH_WEIGHTED.get(metric) == "bits" else math.exp(rate)


def word_perplexity(samples: Sequence[tuple[float, float]]) -> float:
    """Aggregates as lm-eval does, but to infinity above ``LARGEST_RATE``, where lm-eval fails if a float overflows."""
    rate = _rate(samples)
    return math.inf if rate > LARGEST_RATE else math.exp(rate)


def influences(metric: str, samples: Sequence[Sample]) -> list[float]:
    """Returns how much each document moves the score to first order: its empirical influence over n.

    For a mean m they are (xᵢ - m)/n. For a rate -Σ log p / Σ length, see ``ratio_influences``. Those on a perplexity
    exp(r) are exp(r) times those on its rate r.
    """
    if not _is_rate(metric):
        mean = value_of(metric, samples)
        return [(sample - mean) / len(samples) for sample in samples]
    items = _with_lengths(metric, samples)
    scale = 1 / math.log(2) if LENGTH_WEIGHTED.get(metric) == "bits" else math.exp(_rate(items))
    moved = ratio_influences([-loglikelihood for loglikelihood, _ in items], [length for _, length in items])
    return [scale * influence for influence in moved]


def _is_rate(metric: str) -> bool:
    return metric in LENGTH_WEIGHTED or metric == EQUALLY_WEIGHTED


def _with_lengths(metric: str, samples: Sequence[Sample]) -> Sequence[tuple[float, float]]:
    """Returns (log likelihood, length) of each document."""
    return [(sample, 1.0) for sample in samples] if metric == EQUALLY_WEIGHTED else samples


def _rate(items: Sequence[tuple[float, float]]) -> float:
    return -sum(loglikelihood for loglikelihood, _ in items) / sum(length for _, length in items)
