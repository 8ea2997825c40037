"""The questions about the standard library: their number, their fairness, and which modules they are about."""

from __future__ import annotations

from collections import Counter
from functools import cache

from pipeline.data.python_docs import documents, entries, instruction_pairs, question_entries, subset_of, words
from pipeline.evaluation.questions import Question, build_questions


@cache
def _questions() -> list[Question]:
    return build_questions()


def test_there_are_at_least_three_hundred_distinct_questions() -> None:
    assert len(_questions()) >= 300
    assert len({question.names[question.gold] for question in _questions()}) == len(_questions())


def test_choosing_by_length_scores_chance() -> None:
    """Always choosing the longest or the shortest name, with ties split evenly, is within 5 points of 25 %."""
    for choose in (max, min):
        points = 0.0
        for question in _questions():
            lengths = [len(name) for name in question.names]
            best = [number for number, length in enumerate(lengths) if length == choose(lengths)]
            points += (question.gold in best) / len(best)
        assert abs(points / len(_questions()) - 0.25) < 0.05


def test_always_choosing_the_same_position_scores_near_chance() -> None:
    places = Counter(question.gold for question in _questions())
    assert all(0.15 < places[place] / len(_questions()) < 0.35 for place in range(4))


def test_distractors_are_from_the_same_module_and_wrong() -> None:
    by_name = {entry.name: entry for entry in entries()}
    for question in _questions():
        assert len(set(question.names)) == 4
        options = [by_name[name] for name in question.names]
        assert {option.module for option in options} == {question.module}
        right = options.pop(question.gold)
        assert question.summary == right.summary
        assert all(words(option.summary) != words(right.summary) for option in options)


def test_questions_are_about_reserved_modules_only() -> None:
    assert {subset_of(question.module) for question in _questions()} == {"asked"}
    asked = {entry.name for entry in question_entries()}
    assert {name for question in _questions() for name in question.names} <= asked


def test_the_answers_are_in_the_corpus_and_in_no_instruction_pair() -> None:
    corpus = " ".join(words("\n".join(documents(held_out=False))))
    spoken = [message["content"] for pair in instruction_pairs(held_out=False) for message in pair]
    taught = {" ".join(words(text)) for text in spoken}
    for question in _questions():
        assert " ".join(words(question.summary)) in corpus
        assert " ".join(words(question.summary)) not in taught


def test_many_modules_take_part_and_none_dominates() -> None:
    modules = Counter(question.module for question in _questions())
    assert len(modules) > 20 and max(modules.values()) < 0.05 * len(_questions())


def test_the_questions_are_deterministic() -> None:
    assert build_questions() == _questions()
