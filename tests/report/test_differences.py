"""Verdicts on differences: significance at 5 % and six changed documents, checked by simulations of equal models."""

from __future__ import annotations

import math
import statistics
from random import Random
from typing import Any

import numpy as np
import pytest

from pipeline.evaluation.scores import influences
from pipeline.report.differences import Difference, PairedDifference, Verdict, direction_of, leader
from pipeline.report.results import Result
from pipeline.report.scores import Scores
from pipeline.report.significance import critical_value
from pipeline.standard_errors import standard_error


def _row(value: float, stderr: float | None = 0.01, metric: str = "acc", run: str = "r") -> Result:
    return Result(
        run=run, method="m", target="t", task="task", metric=metric, value=value, stderr=stderr, n=None,
        higher_is_better=None, scores_of=None,
    )  # fmt: skip


def _pair(before: Result, after: Result, stderr: float | None, changed: int = 40, **values: Any) -> PairedDifference:
    """An entry of paired_differences.json about so many documents that the error is known exactly."""
    return PairedDifference(
        run=after["run"], target="t", against_run=before["run"], against_target="t", task="task",
        metric=after["metric"], difference=after["value"] - before["value"], stderr=stderr, changed=changed,
        **{"n": 100_000, "clusters": 100_000, "log_ratio_stderr": None} | values,
    )  # fmt: skip


def test_the_error_of_an_unpaired_difference_matches_sampling() -> None:
    random = Random(0)
    sampled = [random.gauss(0.7, 0.03) - random.gauss(0.6, 0.04) for _ in range(20_000)]
    difference = Difference(_row(0.6, 0.04), _row(0.7, 0.03))
    assert difference.text() == f"+10.0 ± {100 * statistics.stdev(sampled):.1f} points"


@pytest.mark.parametrize(
    ("metric", "before", "after", "verdict"),
    [
        ("acc", 0.50, 0.53, Verdict.BETTER),
        ("acc", 0.50, 0.47, Verdict.WORSE),
        ("acc", 0.50, 0.52, Verdict.NOISE),
        ("acc", 0.50, 0.50, Verdict.SAME),
        ("word_perplexity", 0.50, 0.47, Verdict.BETTER),
        ("word_perplexity", 0.50, 0.53, Verdict.WORSE),
        ("some_unknown_metric", 0.50, 0.53, Verdict.CHANGED),
    ],
)
def test_verdicts_depend_on_the_direction_of_the_metric(
    metric: str, before: float, after: float, verdict: Verdict
) -> None:
    assert Difference(_row(before, 0.01, metric), _row(after, 0.01, metric)).verdict is verdict


@pytest.mark.parametrize(("n", "standard_errors"), [(None, 1.960), (101, 1.984), (21, 2.086), (13, 2.179)])
def test_the_critical_difference_is_that_of_the_t_test(n: int | None, standard_errors: float) -> None:
    bound = standard_errors * math.hypot(0.25, 0.25)
    for factor, verdict in ((0.999, Verdict.NOISE), (1.001, Verdict.BETTER)):
        before, after = _row(0.0, 0.25), _row(factor * bound, 0.25)
        before["n"] = after["n"] = n
        assert Difference(before, after).verdict is verdict


def test_the_paired_error_replaces_the_independent_one() -> None:
    before, after = _row(0.50, 0.05), _row(0.52, 0.05)
    assert Difference(before, after).verdict is Verdict.NOISE
    assert Difference(before, after, _pair(before, after, 0.009)).verdict is Verdict.BETTER
    assert Difference(before, after, _pair(before, after, 0.011)).verdict is Verdict.NOISE


@pytest.mark.parametrize("changed", range(2, 9))
def test_few_changed_documents_count_only_if_a_sign_test_agrees(changed: int) -> None:
    """All documents changed for the better. By the standard error alone, four of them would already count."""
    chance = 2 * 0.5**changed  # two-sided: that all of them have the same sign
    n = 500
    error = math.sqrt(n / (n - 1) * (changed / n**2 - changed**2 / n**3))
    before, after = _row(0.5), _row(0.5 + changed / n)
    verdict = Difference(before, after, _pair(before, after, error, changed, n=n, clusters=n)).verdict
    assert verdict is (Verdict.BETTER if chance < 0.05 else Verdict.NOISE)


def test_rounding_is_not_a_difference() -> None:
    before, after = _row(20.0, 1.0, "word_perplexity"), _row(20.0 * (1 + 2e-7), 1.0, "word_perplexity")
    assert Difference(before, after, _pair(before, after, 1e-7, log_ratio_stderr=1e-9)).verdict is Verdict.SAME


def test_without_a_standard_error_the_verdict_is_unknown() -> None:
    assert Difference(_row(0.1, None), _row(0.9)).verdict is Verdict.UNKNOWN
    assert Scores([]).best([_row(0.1, None), _row(0.9, None)]) is None
    assert Scores([]).mark(_row(0.1, None), _row(0.9)) == ""


def test_the_best_result_beats_every_other_beyond_noise() -> None:
    low, close, high = _row(0.50), _row(0.58), _row(0.60)
    best = Scores([]).best
    assert best([low, close, high]) is None
    assert best([low, high, None]) is high
    assert best([high]) is None
    assert leader([low, close, high]) is high


def test_the_leader_in_perplexity_is_the_lowest_and_unknown_metrics_have_none() -> None:
    rows = [_row(9.0, 0.1, "perplexity"), _row(8.0, 0.1, "perplexity")]
    assert leader(rows) is rows[1] and Scores([]).best(rows) is rows[1]
    assert leader([_row(1.0, 0.1, "unknown_metric"), _row(2.0, 0.1, "unknown_metric")]) is None
    assert leader([None]) is None


def test_marks_against_the_base() -> None:
    base, mark = _row(0.5), Scores([]).mark
    marks = [mark(base, _row(value)) for value in (0.6, 0.4, 0.51, 0.5)]
    assert marks == ["▲", "▼", "≈", "="]
    assert mark(base, base) == "" and mark(None, base) == ""


def test_the_direction_is_what_the_task_declares_or_that_of_a_known_metric() -> None:
    def verdict(metric: str, **declared: bool) -> Verdict:
        before, after = _row(0.5, metric=metric), _row(0.6, metric=metric)
        return Difference(before, Result(**{**after, **declared})).verdict  # type: ignore[typeddict-item]

    assert verdict("exact_match (strict-match)") is verdict("pass@1") is Verdict.BETTER
    assert verdict("brier_score", higher_is_better=False) is Verdict.WORSE
    assert verdict("bleu", higher_is_better=True) is Verdict.BETTER
    assert verdict("bleu") is Verdict.CHANGED


def test_critical_values_are_those_of_published_tables() -> None:
    """The studentized range's upper 5 % points (Harter 1960, table 3), over the square root of two."""
    for contenders, degrees, quantile in (
        (2, None, 2.772), (3, None, 3.314), (7, None, 4.170), (10, None, 4.474), (3, 60, 3.399), (4, 120, 3.685),
        (7, 10, 5.124), (7, 5, 6.330), (2, 5, 3.635),
    ):  # fmt: skip
        assert critical_value(contenders, degrees) == pytest.approx(quantile / math.sqrt(2), rel=0.0002)


# ---------------------------------------------------------------------- simulations of equal models


EXPERIMENTS = 2_000  # a rate of 5 % is measured to ± 0.5 points


def _draw(kind: str, models: int, draw: np.random.Generator) -> tuple[str, list[list[Any]], list[str]]:
    """Draws metric, samples per model, and clusters of documents on which all models are equally good."""
    if kind == "clusters":
        ability = draw.normal(0, 0.4, (models, 13)).repeat(10, axis=1)
        difficulty, noise = draw.normal(0, 1, 130), draw.normal(0, 0.5, (models, 130))
        return "acc", [*(difficulty + ability + noise > 0).astype(float).tolist()], [str(i // 10) for i in range(130)]
    difficulty = draw.normal(0, 1, 120)
    noise = draw.normal(0, 0.5, (models, 120))
    if kind == "answers":
        return "acc", [*(difficulty + noise > 0).astype(float).tolist()], [str(i) for i in range(120)]
    words = draw.integers(20, 400, 40)
    rates = 3 + difficulty[:40] / 2 + noise[:, :40]
    samples = [[(-rate * n, int(n)) for rate, n in zip(row, words, strict=True)] for row in rates]
    return "word_perplexity", samples, [str(i) for i in range(40)]


def _experiment(kind: str, models: int, draw: np.random.Generator) -> tuple[Scores, list[Result]]:
    metric, samples, clusters = _draw(kind, models, draw)
    rows, moved = [], []
    for run, values in enumerate(samples):
        moved.append(np.array(influences(metric, values)))
        rows.append(_row(_value(metric, values), standard_error(list(moved[-1]), clusters), metric, str(run)))
    first = max(range(models), key=lambda run: direction_of(rows[run]) * rows[run]["value"])
    pairs = []
    for other in {*range(models)} - {first}:
        log_moved = moved[other] / rows[other]["value"] - moved[first] / rows[first]["value"]
        pair = _pair(
            rows[first], rows[other], standard_error([*(moved[other] - moved[first])], clusters), n=len(clusters),
            clusters=len(set(clusters)), log_ratio_stderr=standard_error([*log_moved], clusters),
        )  # fmt: skip
        pairs.append(pair)
    return Scores(rows, pairs), rows


def _value(metric: str, values: list[Any]) -> float:
    if metric == "acc":
        return statistics.fmean(values)
    return math.exp(-sum(log for log, _ in values) / sum(words for _, words in values))


@pytest.mark.parametrize("kind", ["answers", "texts", "clusters"])
def test_one_in_twenty_differences_between_equal_models_counts(kind: str) -> None:
    draw, counted, bold = np.random.default_rng(0), 0, 0
    for _ in range(EXPERIMENTS):
        scores, rows = _experiment(kind, 2, draw)
        counted += scores.difference(*rows).verdict in (Verdict.BETTER, Verdict.WORSE)
        bold += scores.best(rows) is not None
    assert 0.04 <= counted / EXPERIMENTS <= 0.06
    assert bold == counted


@pytest.mark.parametrize("models", [3, 7])
def test_the_best_of_equal_models_differs_from_another_in_one_of_twenty_tasks(models: int) -> None:
    draw, counted = np.random.default_rng(0), 0
    for _ in range(EXPERIMENTS):
        scores, rows = _experiment("answers", models, draw)
        first = leader(rows)
        assert first is not None
        counted += any(scores.difference(row, first, models).verdict is Verdict.BETTER for row in rows)
    assert 0.04 <= counted / EXPERIMENTS <= 0.06
