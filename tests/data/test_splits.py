"""No text is in both splits, and none occurs twice, regardless of order and source."""

from __future__ import annotations

import json
import random
from array import array
from typing import Any

from pipeline.data.records import Drops, Example
from pipeline.data.splits import Deduplicator, HashSet


def _assign(examples: list[Example], fraction: float) -> tuple[dict[str, list[Any]], Drops]:
    dropped = Drops()
    deduplicator = Deduplicator(fraction)
    splits: dict[str, list[Any]] = {"train": [], "held_out": []}
    for example in examples:
        split = deduplicator.assign(example, dropped)
        if split is not None:
            splits[split].append(example.content)
    return splits, dropped


def _split(contents: list[Any], fraction: float) -> tuple[dict[str, list[Any]], Drops]:
    return _assign([Example(content, None) for content in contents], fraction)


def test_held_out_documents_are_chosen_by_hash_and_never_in_training() -> None:
    documents = [f"document {number}" for number in range(2000)]
    splits, dropped = _split(documents * 2, 0.1)
    assert not set(splits["train"]) & set(splits["held_out"])
    assert 140 < len(splits["held_out"]) < 260
    assert dropped == {"duplicate": 2000}
    shuffled, _ = _split(documents[::-1], 0.1)
    assert set(shuffled["held_out"]) == set(splits["held_out"])  # regardless of order


def test_validation_documents_are_chosen_by_hash_from_those_that_would_be_trained_on() -> None:
    """The held-out ones stay the same, for any order of documents, and for sources with their own splits."""
    documents = [f"document {number}" for number in range(2000)]
    without, _ = _split(documents, 0.1)
    for own in (None, "train"):
        found: dict[str, set[str]] = {}
        deduplicator = Deduplicator(0.1, validation_fraction=0.2)
        for text in reversed(documents):
            split = deduplicator.assign(Example(text, own), Drops())
            assert split is not None
            found.setdefault(split, set()).add(text)
        assert found.get("held_out", set()) == (set(without["held_out"]) if own is None else set())
        assert 320 < len(found["validation"]) < 480 and not found["validation"] & set(without["held_out"])
        assert sum(map(len, found.values())) == len(documents)
    kept = Deduplicator(0.1, validation_fraction=0.2)
    assert {kept.assign(Example(text, "held_out"), Drops()) for text in documents} == {"held_out"}


def test_all_answers_to_a_prompt_are_in_the_same_of_three_splits() -> None:
    deduplicator, dropped = Deduplicator(0.3, validation_fraction=0.3), Drops()
    splits: dict[int, set[str | None]] = {}
    for number in range(600):
        example = Example(_chat(f"prompt {number % 200}", f"{number}"), None)
        splits.setdefault(number % 200, set()).add(deduplicator.assign(example, dropped))
    assert not dropped and all(len(found) == 1 for found in splits.values())
    assert set().union(*splits.values()) == {"train", "held_out", "validation"}


def test_all_examples_of_a_group_are_for_validation_or_none() -> None:
    splits: dict[str, set[str | None]] = {}
    for content in ("document", "conversation"):
        deduplicator = Deduplicator(0.0, validation_fraction=0.4)
        for number in range(200):
            about = f"group {number % 40}"
            text = f"{content} {number}"
            example = Example(text if content == "document" else _chat(text, "answer"), "train", group=about)
            splits.setdefault(about, set()).add(deduplicator.assign(example, Drops()))
    assert all(len(found) == 1 for found in splits.values())
    assert set().union(*splits.values()) == {"train", "validation"}


def test_documents_that_differ_in_surrounding_whitespace_are_duplicates() -> None:
    splits, dropped = _split([text for number in range(200) for text in (f"text {number}", f"text {number}\n")], 0.5)
    assert not {text.strip() for text in splits["train"]} & {text.strip() for text in splits["held_out"]}
    assert dropped == {"duplicate": 200}


def test_sources_with_and_without_predefined_splits_can_be_mixed() -> None:
    """Half of the documents are in both sources, with a split in one of them only."""
    documents = [f"document {number}" for number in range(400)]
    own = [Example(text, "held_out" if number % 4 else "train") for number, text in enumerate(documents[:300])]
    other = [Example(f" {text}\n", None) for text in documents[100:]]
    for seed in range(5):
        examples = [*own, *other]
        random.Random(seed).shuffle(examples)
        splits, _ = _assign(examples, 0.3)
        texts = {split: [text.strip() for text in splits[split]] for split in splits}
        assert sorted(texts["train"] + texts["held_out"]) == sorted(documents)


def _chat(prompt: str, answer: str, system: str = "s") -> list[dict[str, str]]:
    turns = (("system", system), ("user", prompt), ("assistant", answer))
    return [{"role": role, "content": content} for role, content in turns]


def test_all_answers_to_a_prompt_are_in_the_same_split() -> None:
    chats = [_chat(f"prompt {number}", f"{answer}", f"{answer}") for number in range(200) for answer in range(3)]
    splits, dropped = _split(chats, 0.5)
    assert not dropped
    prompts = [{chat[1]["content"] for chat in splits[split]} for split in ("train", "held_out")]
    assert not prompts[0] & prompts[1] and all(prompts)


def test_a_prompt_that_one_source_holds_out_is_not_trained_on_from_another() -> None:
    held_out = [Example(_chat(f"prompt {number}", "theirs"), "held_out") for number in range(100)]
    splits, dropped = _assign([*held_out, *(Example(_chat(f" prompt {n}", "ours"), None) for n in range(150))], 0.0)
    assert {chat[1]["content"] for chat in splits["train"]} == {f" prompt {number}" for number in range(100, 150)}
    assert dropped == {"prompt_in_other_split": 100}


def test_blank_and_invalid_text_is_dropped_and_counted() -> None:
    splits, dropped = _split(["good", json.loads('"\\ud800"'), " \n"], 0.0)
    assert splits["train"] == ["good"] and dropped == {"invalid_unicode": 1, "blank": 1}


def test_a_deduplicator_resumes_from_remembered_hashes() -> None:
    first, dropped = Deduplicator(0.1), Drops()
    examples = [Example(f"document {number}", None) for number in range(50)]
    for example in examples:
        first.assign(example, dropped)
    second = Deduplicator(0.1, array("Q", first.new_hashes))
    assert all(second.assign(example, dropped) is None for example in examples)
    assert dropped == {"duplicate": 50} and not second.new_hashes


def test_a_hash_set_behaves_like_a_set() -> None:
    draw = random.Random(0)
    values = [
        draw.choice([draw.randrange(1500), draw.randrange(2**64), draw.randrange(2**20) << 44]) for _ in range(4500)
    ]
    flat, plain = HashSet(), set[int]()
    for value in values:
        assert (value in flat) == (value in plain)
        flat.add(value)
        plain.add(value)
    assert len(flat) == len(plain - {0} | ({1} if 0 in plain else set()))
    assert 8 * len(flat._slots) <= 24 * len(flat)
