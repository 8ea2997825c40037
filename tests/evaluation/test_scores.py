"""Scores and their standard errors, compared with resampling."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest

from pipeline.evaluation.scores import influences, kept_samples, scores_of, text_scores, value_of, word_perplexity
from pipeline.standard_errors import standard_error


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
            "one": [
                {"metrics": ["acc"], "acc": 1.0, "filter": "none"},
                {"metrics": ["acc"], "acc": np.int64(0), "filter": "none"},
            ],
            "two": [{"metrics": ["exact_match"], "exact_match": np.float64(1.0), "filter": "strict"}],
        },
        "configs": {"one": {"metadata": {"version": 1}}, "two": {}},
        "higher_is_better": {"one": {"acc": True}, "two": {"exact_match": True}},
    }


def test_scores_of_tasks_and_groups() -> None:
    assert scores_of("one", _results()) == [
        {"task": "one", "metric": "acc", "value": 0.25, "stderr": 0.2, "n": 4, "higher_is_better": True}
    ]
    assert scores_of("suite", _results()) == [
        {"task": "suite", "metric": "acc", "value": 0.5, "stderr": 0.1, "n": 12, "higher_is_better": None}
    ]


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


@pytest.mark.parametrize("words, has_perplexity", [(1, False), (4, False), (400, True)])
def test_text_without_spaces_has_no_perplexity_per_word(words: int, has_perplexity: bool) -> None:
    """A paragraph of 1,000 Chinese characters has about 1,755 nats in 3,000 bytes, and one word by white space."""
    nats = [1755.0, 1700.0, 1810.0]
    rows = [
        {"filter": "none", "word_perplexity": (-each, words), "byte_perplexity": (-each, 3000),
         "bits_per_byte": (-each, 3000)}
        for each in nats
    ]  # fmt: skip
    bits = sum(nats) / 9000 / math.log(2)
    numbers = {
        "word_perplexity,none": word_perplexity([row["word_perplexity"] for row in rows]),
        "byte_perplexity,none": 2**bits,
        "bits_per_byte,none": bits,
    }
    results = _results() | {"results": {"text": numbers}, "n-samples": {"text": {"effective": 3}}}
    results |= {"samples": {"text": rows}, "configs": {}, "group_subtasks": {}}
    expected = [*(["word_perplexity"] if has_perplexity else []), "byte_perplexity", "bits_per_byte"]
    for scores in (scores_of("text", results), text_scores({"text": rows})):
        assert [row["metric"] for row in scores] == expected
        assert all(math.isfinite(row["value"]) and row["stderr"] is not None for row in scores)
        assert scores[-1]["value"] == pytest.approx(bits)
    if has_perplexity:
        assert numbers["word_perplexity,none"] == pytest.approx(math.exp(sum(nats) / (3 * words)))


def test_samples_keep_the_values_per_document_under_the_names_of_scores() -> None:
    def sample(document: str, filter_name: str, value: Any) -> dict[str, Any]:
        return {"metrics": ["em"], "em": value, "filter": filter_name, "doc_hash": document}

    strict = [sample("a", "strict", 1.0), sample("b", "strict", np.int64(0))]
    both = [*strict, sample("a", "none", 1), sample("b", "none", 1)]
    kept = kept_samples({"one": both, "other": both[:1]}, {"configs": {}})
    assert kept["one"]["metrics"] == {"em (strict)": [1.0, 0.0], "em": [1.0, 1.0]}
    assert kept["one"]["documents"] == kept_samples({"two": both[2:]}, {"configs": {}})["two"]["documents"]
    assert kept["one"]["documents"] != kept["other"]["documents"]


def test_values_of_some_of_the_documents_are_not_kept() -> None:
    """The documents that have one may differ between models, so that pairs of values would not be of one document."""
    rows = [{"metrics": ["acc"], "acc": 1.0, "filter": "none", "doc_hash": name} for name in "ab"]
    rows[0] |= {"metrics": ["acc", "refused"], "refused": 1.0}
    assert kept_samples({"one": rows}, {"configs": {}})["one"]["metrics"] == {"acc": [1.0, 1.0]}


def test_the_error_of_a_perplexity_is_that_of_its_logarithm_times_the_perplexity() -> None:
    """Resampling ten documents of a damaged model gives perplexities that differ by several orders of magnitude."""
    numbers = [-2.0, -30.0, -11.0, -25.0, -4.0, -9.0, -17.0, -21.0, -6.0, -14.0]
    value = math.exp(-np.mean(numbers))
    results = _results()
    results["results"]["one"] = {"perplexity,none": value, "perplexity_stderr,none": 30 * value}
    results["samples"]["one"] = [{"metrics": ["perplexity"], "perplexity": x, "filter": "none"} for x in numbers]
    (row,) = scores_of("one", results)
    assert row["stderr"] == pytest.approx(value * np.std(numbers, ddof=1) / math.sqrt(10))


def test_the_standard_error_of_a_mean_is_the_sample_deviation_over_the_root_of_n() -> None:
    numbers = [0.0, 1.0, 1.0, 3.0]
    assert standard_error(influences("acc", numbers)) == pytest.approx(np.std(numbers, ddof=1) / 2)


def test_the_error_of_clustered_documents_matches_the_bootstrap_over_clusters() -> None:
    draw = np.random.default_rng(0)
    clusters = np.repeat(np.arange(60), 10)
    values = (draw.normal(0, 0.3, 60)[clusters] + draw.normal(0, 0.3, 600) > 0).astype(float)
    means = values.reshape(60, 10).mean(axis=1)
    drawn = [means[draw.integers(0, 60, 60)].mean() for _ in range(4000)]
    found = standard_error(influences("acc", list(values)), [str(cluster) for cluster in clusters])
    independent = standard_error(influences("acc", list(values)))
    assert found == pytest.approx(np.std(drawn), rel=0.06)
    assert found is not None and independent is not None and found > 1.5 * independent


def test_a_task_can_name_the_clusters_of_its_documents() -> None:
    results = _results()
    results["results"]["one"] |= {"acc,none": 0.5}
    results["configs"]["one"]["metadata"]["cluster"] = "template"
    rows = [{"metrics": ["acc"], "acc": float(i < 4), "filter": "none", "doc": {"template": i // 2}} for i in range(8)]
    results["samples"]["one"] = rows
    (row,) = scores_of("one", results)
    assert row["stderr"] == pytest.approx(np.std([1, 1, 0, 0], ddof=1) / 2)  # of four clusters, not of eight documents
    kept = kept_samples({"one": [row | {"doc_hash": str(i)} for i, row in enumerate(rows)]}, results)
    assert kept["one"]["clusters"] == ["0", "0", "1", "1", "2", "2", "3", "3"]
