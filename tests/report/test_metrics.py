"""Formatting of numbers."""

from __future__ import annotations

import math

import pytest

from pipeline.report.metrics import (
    count,
    duration,
    memory,
    number,
    preferred,
    relative_change,
    scientific,
    signed,
    significant,
    task_name,
    with_error,
)


@pytest.mark.parametrize(
    ("printed", "wanted"),
    [
        (number("acc", 0.8137), "81.4 %"),
        (number("word_perplexity", 35.0), "35.00"),
        (with_error("acc", 0.8137, 0.0151), "81.4 ± 1.5 %"),
        (with_error("word_perplexity", 26.6049, 0.4012), "26.60 ± 0.40"),
        (with_error("word_perplexity", 26.6, 2.66), "26.6 +2.8 −2.5"),
        (with_error("perplexity", 11653.89, 312.0), "11,654 +316 −308"),
        (with_error("perplexity", 12345678912.0, 2.0e9), "1.235e+10 +2.2e+09 −1.8e+09"),
        (with_error("bits_per_byte", 0.7, 0.0), "0.70 ± 0.00"),
        (with_error("acc", 0.5, None), "50.0 %"),
        (signed("acc", -0.005, 0.0212), "−0.5 ± 2.1 points"),
        (signed("bits_per_byte", -0.084, 0.00566), "−0.0840 ± 0.0057"),
        (signed("bits_per_byte", 1.5, None), "+1.500"),
        (relative_change(math.log(0.9), 0.01), "−10.00 ± 0.90 %"),
        (relative_change(math.log(1.5), 0.1), "+50.0 +15.8 −14.3 %"),
        (relative_change(math.log(1.5), None), "+50.0 %"),
        (relative_change(math.log(3e98), 0.1), "+3.000e+100 +3.2e+99 −2.9e+99 %"),
        (relative_change(math.log(3e98), None), "+3.000e+100 %"),
        (number("exact_match (strict-match)", 0.5), "50.0 %"),
        (number("pass@1", 0.25), "25.0 %"),
        (significant(12345.6), "12,346"),
        (task_name("held_out_text"), "held-out corpus text"),
        (task_name("held_out_text/data.corpus.1"), "held-out corpus text of data.corpus.1"),
        (task_name("mmlu"), "mmlu"),
        (duration(4.25), "4.2 s"),
        (duration(185), "3 min 05 s"),
        (duration(59.97), "1 min 00 s"),
        (duration(7800), "2 h 10 min"),
        (count(81920), "81,920"),
        (count(28_300_000), "28.3 M"),
        (count(8_030_261_248), "8.03 B"),
        (memory(3 * 2**29), "1.50 GiB"),
        (memory(200 * 2**20), "200 MiB"),
        (scientific(1.34e14), "1.3×10¹⁴"),
    ],
)
def test_numbers_are_printed_with_units_and_errors(printed: str, wanted: str) -> None:
    assert printed == wanted


def test_the_preferred_metric_is_perplexity_or_plain_accuracy() -> None:
    assert preferred(["bits_per_byte", "byte_perplexity", "word_perplexity"]) == "word_perplexity"
    assert preferred(["acc_norm", "acc"]) == "acc"
    assert preferred(["acc", "acc_norm"], "arc_challenge") == "acc_norm"  # as on the leaderboard
    assert preferred(["other (x)", "exact_match (strict-match)"]) == "exact_match (strict-match)"
    assert preferred(["something_else"]) == "something_else"
