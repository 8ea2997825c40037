"""Verdicts on differences: two standard errors and six changed documents."""

from __future__ import annotations

import math
import statistics
from random import Random

import pytest

from pipeline.report.differences import Difference, Verdict, leader
from pipeline.report.results import Result
from pipeline.report.scores import Scores


def _row(value: float, stderr: float | None = 0.01, metric: str = "acc") -> Result:
    return Result(run="r", method="m", target="t", task="task", metric=metric, value=value, stderr=stderr, n=100)


def test_the_error_of_an_unpaired_difference_matches_sampling() -> None:
    random = Random(0)
    sampled = [random.gauss(0.7, 0.03) - random.gauss(0.6, 0.04) for _ in range(20_000)]
    difference = Difference(_row(0.6, 0.04), _row(0.7, 0.03))
    assert difference.stderr == pytest.approx(statistics.stdev(sampled), rel=0.02)
    assert difference.value == pytest.approx(0.1)


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


def test_exactly_two_standard_errors_are_within_noise() -> None:
    bound = 2 * math.hypot(0.25, 0.25)
    assert Difference(_row(0.0, 0.25), _row(bound, 0.25)).verdict is Verdict.NOISE
    assert Difference(_row(0.0, 0.25), _row(bound + 1e-9, 0.25)).verdict is Verdict.BETTER


def test_the_paired_error_replaces_the_independent_one() -> None:
    before, after = _row(0.50, 0.05), _row(0.52, 0.05)
    assert Difference(before, after).verdict is Verdict.NOISE
    assert Difference(before, after, paired_stderr=0.009, changed=40).verdict is Verdict.BETTER
    assert Difference(before, after, paired_stderr=0.011, changed=40).verdict is Verdict.NOISE


@pytest.mark.parametrize("changed", range(2, 9))
def test_few_changed_documents_count_only_if_a_sign_test_agrees(changed: int) -> None:
    """All documents changed for the better. By the standard error alone, four of them would already count."""
    chance = 2 * 0.5**changed  # two-sided: that all of them have the same sign
    n = 500
    error = math.sqrt(n / (n - 1) * (changed / n**2 - changed**2 / n**3))
    verdict = Difference(_row(0.5), _row(0.5 + changed / n), paired_stderr=error, changed=changed).verdict
    assert verdict is (Verdict.BETTER if chance < 0.05 else Verdict.NOISE)


def test_rounding_is_not_a_difference() -> None:
    before, after = _row(20.0, 1.0, "word_perplexity"), _row(20.0 * (1 + 2e-7), 1.0, "word_perplexity")
    assert Difference(before, after, paired_stderr=1e-7, changed=90).verdict is Verdict.SAME


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
