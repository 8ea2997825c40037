"""Scores and their standard errors, compared with resampling."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest

from pipeline.evaluation.scores import influences, kept_samples, scores_of, standard_error, value_of


def _documents(count: int) -> list[tuple[float, int]]:
    draw = random.Random(3)
    lengths = [draw.randrange(20, 400) for _ in range(count)]
    return [(-length * draw.gauss(1.2, 0.25), length) for length in lengths]


@pytest.mark.parametrize("metric", ["word_perplexity", "bits_per_byte"])
def test_the_standard_error_of_a_rate_matches_the_bootstrap(metric: str) -> None:
    items = np.array(_documents(60))
    draw = np.random.default_rng(0)
    rates = []
    for _ in range(4000):
        chosen = items[draw.integers(0, len(items), len(items))]
        rates.append(-chosen[:, 0].sum() / chosen[:, 1].sum())
    expected = np.std(np.exp(rates) if metric == "word_perplexity" else np.array(rates) / math.log(2))
    found = standard_error(influences(metric, [(float(total), int(length)) for total, length in items]))
    assert found == pytest.approx(expected, rel=0.1)


def test_scores_follow_from_the_values_per_document() -> None:
    samples = [(-3.0, 2), (-5.0, 6)]  # one nat per unit of length
    assert value_of("byte_perplexity", samples) == pytest.approx(math.e)
    assert value_of("bits_per_byte", samples) == pytest.approx(1 / math.log(2))
    assert value_of("perplexity", [-1.0, -3.0]) == pytest.approx(math.exp(2.0))
    assert value_of("acc", [1.0, 0.0]) == 0.5


def test_one_document_has_no_standard_error() -> None:
    assert standard_error(influences("word_perplexity", [(-3.0, 5)])) is None


def _results() -> dict[str, Any]:
    """Results in lm-eval's layout: a group of two tasks, one of them with a filter."""
    return {
        "results": {
            "suite": {"alias": "suite", "acc,none": 0.5, "acc_stderr,none": 0.1},
            "one": {"alias": "one", "acc,none": 0.25, "acc_stderr,none": 0.2, "sample_len": 4},
            "two": {"exact_match,strict": 0.75, "exact_match_stderr,strict": "N/A"},
            "bare": {"alias": "bare"},
        },
        "group_subtasks": {"suite": ["one", "two"], "bare": ["one", "two"], "one": []},
        "n-samples": {"one": {"original": 9, "effective": 4}, "two": {"original": 8, "effective": 8}},
        "samples": {
            "one": [{"metrics": ["acc"], "acc": 1.0}, {"metrics": ["acc"], "acc": np.int64(0)}],
            "two": [{"metrics": ["exact_match"], "exact_match": np.float64(1.0)}],
        },
    }


def test_scores_of_tasks_and_groups() -> None:
    assert scores_of("one", _results()) == [{"task": "one", "metric": "acc", "value": 0.25, "stderr": 0.2, "n": 4}]
    assert scores_of("suite", _results()) == [{"task": "suite", "metric": "acc", "value": 0.5, "stderr": 0.1, "n": 12}]


def test_a_group_without_its_own_scores_has_those_of_its_tasks() -> None:
    rows = scores_of("bare", _results())
    assert [(row["task"], row["metric"], row["stderr"]) for row in rows] == [
        ("one", "acc", 0.2),
        ("two", "exact_match (strict)", None),
    ]


def test_a_score_that_is_not_finite_raises() -> None:
    results = _results()
    results["results"]["one"]["acc,none"] = math.nan
    with pytest.raises(ValueError, match="one.*acc.*nan"):
        scores_of("one", results)


def test_samples_keep_the_values_per_document_under_the_names_of_scores() -> None:
    def sample(document: str, filter_name: str, value: Any) -> dict[str, Any]:
        return {"metrics": ["em"], "em": value, "filter": filter_name, "doc_hash": document}

    strict = [sample("a", "strict", 1.0), sample("b", "strict", np.int64(0))]
    both = [*strict, sample("a", "none", 1), sample("b", "none", 1)]
    kept = kept_samples({"one": both, "other": both[:1]})
    assert kept["one"]["metrics"] == {"em (strict)": [1.0, 0.0], "em": [1.0, 1.0]}
    assert kept["one"]["documents"] == kept_samples({"two": both[2:]})["two"]["documents"]
    assert kept["one"]["documents"] != kept["other"]["documents"]


def test_the_standard_error_of_a_mean_is_the_sample_deviation_over_the_root_of_n() -> None:
    numbers = [0.0, 1.0, 1.0, 3.0]
    assert standard_error(influences("acc", numbers)) == pytest.approx(np.std(numbers, ddof=1) / 2)
