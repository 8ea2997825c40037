"""The minimal pairs: their number, that they are minimal, and that they are deterministic."""

from __future__ import annotations

from collections import Counter
from hashlib import sha256

from pipeline.evaluation.minimal_pairs import PHENOMENA, WORDS, build_pairs


def test_there_are_at_least_five_hundred_distinct_pairs_of_at_least_ten_phenomena() -> None:
    pairs = build_pairs()
    assert len({tuple(pair.choices) for pair in pairs}) == len(pairs) >= 500
    assert len(PHENOMENA) >= 10
    assert len(set(Counter(pair.phenomenon for pair in pairs).values())) == 1


def test_the_two_sentences_differ_in_one_place() -> None:
    for pair in build_pairs():
        one, other = (sentence.lower().rstrip(".").split() for sentence in pair.choices)
        assert one != other
        while one and other and one[0] == other[0]:
            one, other = one[1:], other[1:]
        while one and other and one[-1] == other[-1]:
            one, other = one[:-1], other[:-1]
        assert max(len(one), len(other)) <= 2  # "to work" against "working"


def test_every_sentence_is_well_formed() -> None:
    for pair in build_pairs():
        for sentence in pair.choices:
            assert sentence[0].isupper() and sentence.endswith(".") and "  " not in sentence
            assert not set("{}<>|[]") & set(sentence)


def test_the_grammatical_sentence_is_first_about_half_of_the_time() -> None:
    assert 0.4 < sum(pair.gold for pair in build_pairs()) / len(build_pairs()) < 0.6


def test_the_pairs_are_the_same_on_every_machine() -> None:
    text = "\n".join(f"{pair.choices[pair.gold]}|{pair.choices[1 - pair.gold]}" for pair in build_pairs())
    assert sha256(text.encode()).hexdigest().startswith("32a4a61a34b8ffc7"), (
        "a change of the pairs needs a new version of evaluate in driver/graph.py"
    )


def test_every_word_list_is_used() -> None:
    templates = " ".join(template for group in PHENOMENA.values() for template in group)
    assert all("{" + name in templates for name in WORDS)
