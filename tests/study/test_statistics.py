"""Paired differences against scipy's own test, and Holm's procedure against its definition."""

from __future__ import annotations

import math
import random

import pytest

from pipeline.report.study_plots import pareto_front
from pipeline.study.statistics import differences, holm, mean_of, paired_p


@pytest.mark.parametrize("seeds", [2, 3, 7])
def test_paired_p_is_that_of_scipy(seeds: int) -> None:
    from scipy.stats import ttest_rel  # takes a second, which the other worker of pytest need not spend

    draw = random.Random(seeds)
    for shift in (0.0, 0.1, 2.0):
        ours = [draw.gauss(shift, 1) for _ in range(seeds)]
        theirs = [draw.gauss(0, 1) for _ in range(seeds)]
        expected = ttest_rel(ours, theirs)
        assert paired_p([a - b for a, b in zip(ours, theirs, strict=True)]) == pytest.approx(expected.pvalue)
    assert paired_p([0.5] * seeds) == 0.0 and paired_p([0.0] * seeds) == 1.0


def _rejected_by_definition(p_values: list[float], level: float) -> set[int]:
    """Holm: while the smallest of the k remaining p values is at most level / k, reject it."""
    remaining, rejected = set(range(len(p_values))), set()
    while remaining and p_values[smallest := min(remaining, key=lambda i: p_values[i])] <= level / len(remaining):
        remaining.discard(smallest)
        rejected.add(smallest)
    return rejected


def test_holm_rejects_what_its_definition_rejects() -> None:
    draw = random.Random(0)
    for _ in range(300):
        p_values = [draw.random() ** draw.choice([1, 4, 8]) for _ in range(draw.randrange(1, 12))]
        for level in (0.01, 0.05, 0.2):
            adjusted = holm(p_values)
            assert {i for i, p in enumerate(adjusted) if p <= level} == _rejected_by_definition(p_values, level)


def test_equal_contenders_differ_in_at_most_one_of_twenty_studies() -> None:
    """Twelve contenders that are all as good as the reference, whose seeds have effects of their own."""
    draw, wrong = random.Random(1), 0
    for _ in range(400):
        effects = [draw.gauss(0, 1) for _ in range(3)]
        losses = {str(name): [3 + effect + draw.gauss(0, 0.1) for effect in effects] for name in range(12)}
        wrong += any(found.counts(0.05) for found in differences(losses, "0").values())
    assert wrong / 400 < 0.08


def test_pairing_removes_what_a_seed_does_to_all_contenders() -> None:
    seeds = [0.0, 0.7, -0.5, 0.2]
    losses = {
        "reference": [3 + s for s in seeds],
        "other": [2.9 + s + e for s, e in zip(seeds, (0, 0.01, 0, -0.01), strict=True)],
    }
    found = differences(losses, "reference")["other"]
    assert found.mean.value == pytest.approx(-0.1) and found.counts(0.05)
    assert mean_of(losses["other"]).stderr > 0.2


def test_diverged_contenders_are_not_compared() -> None:
    losses = {"reference": [3.0, 3.1], "fine": [2.9, 3.2], "diverged": [math.inf, 3.0]}
    assert set(differences(losses, "reference")) == {"fine"}
    assert mean_of(losses["diverged"]).value == math.inf


def test_pareto_front_has_all_points_that_no_other_dominates() -> None:
    draw = random.Random(2)
    points = [(draw.randrange(12), draw.randrange(12)) for _ in range(40)]
    front = {points[index] for index in pareto_front(points)}
    for point in points:
        dominated = any(o != point and o[0] <= point[0] and o[1] <= point[1] for o in points)
        assert (point in front) != dominated
