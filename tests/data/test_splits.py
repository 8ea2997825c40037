"""No text on both sides, no text twice, whatever the order and wherever it comes from."""

from __future__ import annotations

import json
import random
from array import array
from collections import Counter
from typing import Any

from pipeline.data.sources import Example
from pipeline.data.splits import HashSet, Sieve


def _sides(examples: list[Example], fraction: float) -> tuple[dict[str, list[Any]], Counter[str]]:
    dropped: Counter[str] = Counter()
    sieve = Sieve(fraction)
    sides: dict[str, list[Any]] = {"train": [], "held_out": []}
    for example in examples:
        split = sieve.place(example, dropped)
        if split is not None:
            sides[split].append(example.content)
    return sides, dropped


def _split(contents: list[Any], fraction: float) -> tuple[dict[str, list[Any]], Counter[str]]:
    return _sides([Example(content, None) for content in contents], fraction)


def test_held_out_documents_are_drawn_by_hash_and_never_in_training() -> None:
    documents = [f"document {number}" for number in range(2000)]
    sides, dropped = _split(documents * 2, 0.1)
    assert not set(sides["train"]) & set(sides["held_out"])
    assert 140 < len(sides["held_out"]) < 260
    assert dropped == {"duplicate": 2000}
    shuffled, _ = _split(documents[::-1], 0.1)
    assert set(shuffled["held_out"]) == set(sides["held_out"])  # whatever the order


def test_white_space_around_a_document_makes_no_other_document() -> None:
    sides, dropped = _split([text for number in range(200) for text in (f"text {number}", f"text {number}\n")], 0.5)
    assert not {text.strip() for text in sides["train"]} & {text.strip() for text in sides["held_out"]}
    assert dropped == {"duplicate": 200}


def test_a_source_with_a_split_of_its_own_agrees_with_one_without() -> None:
    """Half of the documents come from both: once as held out, once as anything."""
    documents = [f"document {number}" for number in range(400)]
    own = [Example(text, "held_out" if number % 4 else "train") for number, text in enumerate(documents[:300])]
    other = [Example(f" {text}\n", None) for text in documents[100:]]
    for seed in range(5):
        examples = [*own, *other]
        random.Random(seed).shuffle(examples)
        sides, _ = _sides(examples, 0.3)
        texts = {split: [text.strip() for text in sides[split]] for split in sides}
        assert sorted(texts["train"] + texts["held_out"]) == sorted(documents)


def _chat(prompt: str, answer: str, system: str = "s") -> list[dict[str, str]]:
    turns = (("system", system), ("user", prompt), ("assistant", answer))
    return [{"role": role, "content": content} for role, content in turns]


def test_one_prompt_with_several_answers_stays_on_one_side() -> None:
    chats = [_chat(f"prompt {number}", f"{answer}", f"{answer}") for number in range(200) for answer in range(3)]
    sides, _ = _split(chats, 0.5)
    prompts = [{chat[1]["content"] for chat in sides[split]} for split in ("train", "held_out")]
    assert not prompts[0] & prompts[1] and all(prompts)


def test_a_prompt_that_a_source_holds_out_itself_is_not_trained_on_from_another() -> None:
    held_out = [Example(_chat(f"prompt {number}", "theirs"), "held_out") for number in range(100)]
    sides, dropped = _sides([*held_out, *(Example(_chat(f" prompt {n}", "ours"), None) for n in range(150))], 0.0)
    assert {chat[1]["content"] for chat in sides["train"]} == {f" prompt {number}" for number in range(100, 150)}
    assert dropped == {"prompt_on_the_other_side": 100}


def test_what_is_no_text_is_dropped_and_counted() -> None:
    sides, dropped = _split(["good", json.loads('"\\ud800"'), " \n"], 0.0)
    assert sides["train"] == ["good"] and dropped == {"invalid_unicode": 1, "blank": 1}


def test_a_sieve_goes_on_from_what_another_remembered() -> None:
    first, dropped = Sieve(0.1), Counter[str]()
    examples = [Example(f"document {number}", None) for number in range(50)]
    for example in examples:
        first.place(example, dropped)
    second = Sieve(0.1, array("Q", first.news))
    assert all(second.place(example, dropped) is None for example in examples)
    assert dropped == {"duplicate": 50} and not second.news


def test_the_flat_table_is_a_set() -> None:
    draw = random.Random(0)
    values = [
        draw.choice([draw.randrange(3000), draw.randrange(2**64), draw.randrange(2**20) << 44]) for _ in range(9000)
    ]
    flat, plain = HashSet(), set[int]()
    for value in values:
        assert (value in flat) == (value in plain)
        flat.add(value)
        plain.add(value)
    assert len(flat) == len(plain - {0} | ({1} if 0 in plain else set()))
    assert 8 * len(flat._slots) <= 24 * len(flat)
