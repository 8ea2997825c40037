"""Answers to questions of held-out conversations: the same questions in the same form for every model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pipeline.chat.model import ChatModel
from pipeline.evaluation.answers import GREEDY, answer_questions
from pipeline.launch.machine import Placement

PLACEMENT = Placement("cpu", 1, 1, 1)
LONG = "Why? " * 100


@pytest.fixture
def conversations(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    """What tokenize/instructions writes, with a template of its own, which differs from the model's."""
    directory = tmp_path / "conversations"
    directory.mkdir()
    template = (tiny_llama_dir / "chat_template.jinja").read_text().replace("assistant\n", "assistant: ")
    assert template != (tiny_llama_dir / "chat_template.jinja").read_text()
    (directory / "chat_template.jinja").write_text(template)
    (directory / "dataset.json").write_text(json.dumps({"end_of_turn": 2}))
    turns = [[("user", f"What is item {n}?"), ("assistant", f"Item {n}.")] for n in range(20)]
    turns += [[("system", "Be brief."), *turns[0]], [("user", LONG), ("assistant", "So.")], [("assistant", "Hello.")]]
    rows = [{"messages": [{"role": r, "content": c} for r, c in each], "source": "s"} for each in turns]
    (directory / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def test_questions_are_a_fixed_choice_and_answered_with_the_template_of_the_conversations(
    tiny_llama_dir: Path, conversations: Path
) -> None:
    answers = answer_questions(tiny_llama_dir, conversations, 3, PLACEMENT)
    template = (conversations / "chat_template.jinja").read_text()
    alone = ChatModel.load("sft", tiny_llama_dir, "cpu", GREEDY, template)
    for answer in answers:
        assert answer["reference"] == answer["question"].replace("What is item", "Item").replace("?", ".")
        assert answer["answer"] == alone.answer([{"role": "user", "content": answer["question"]}])
    file = conversations / "held_out.jsonl"
    file.write_text("".join(f"{line}\n" for line in reversed(file.read_text().splitlines())))
    assert answer_questions(tiny_llama_dir, conversations, 3, PLACEMENT) == answers
    everything = answer_questions(tiny_llama_dir, conversations, 100, PLACEMENT)
    assert everything[:3] == answers and len(everything) == 20
    assert LONG not in {answer["question"] for answer in everything}


def test_a_model_without_a_template_answers_too(tiny_llama_dir: Path, conversations: Path, tmp_path: Path) -> None:
    bare = Path(shutil.copytree(tiny_llama_dir, tmp_path / "bare"))
    (bare / "chat_template.jinja").unlink()
    answers = [answer_questions(model, conversations, 2, PLACEMENT) for model in (tiny_llama_dir, bare)]
    assert answers[0] == answers[1]
