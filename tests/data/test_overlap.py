"""The overlap index finds repeated text regardless of case, markup and line breaks."""

from __future__ import annotations

import random

from pipeline.data.python_docs import OVERLAP_WORDS, OverlapIndex, words

VOCABULARY = "alpha beta gamma delta".split()


def _overlaps(known: list[str], text: str) -> bool:
    """Compares every run of words with every run of words."""
    found = words(text)
    size = min(len(found), OVERLAP_WORDS)
    runs = [found[start : start + size] for start in range(len(found) - size + 1)]
    return any(words(one)[at : at + size] == run for one in known for at in range(len(words(one))) for run in runs)


def test_the_index_agrees_with_brute_force() -> None:
    draw = random.Random(0)
    known = [" ".join(draw.choices(VOCABULARY, k=25)) for _ in range(5)]
    index = OverlapIndex(known)
    texts = [" ".join(draw.choices(VOCABULARY, k=draw.randrange(3, 30))) for _ in range(60)]
    texts += [" ".join(known[3].split()[5 : 5 + length]) for length in (4, 12, 13, 20)]
    answers = [index.overlaps(text) for text in texts]
    assert answers == [_overlaps(known, text) for text in texts]
    assert True in answers and False in answers


def test_case_markup_and_line_breaks_do_not_hide_a_repeat() -> None:
    assert OverlapIndex(["Return the ``name`` of the\n   file."]).overlaps("return the NAME, of the file")


def test_a_run_of_words_does_not_span_two_known_texts() -> None:
    assert not OverlapIndex(["the quick brown", "fox jumps over"]).overlaps("brown fox")
