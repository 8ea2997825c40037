"""Answers to a few questions of held-out conversations, for readers of the report. They are not scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from pipeline.chat.model import ChatModel, ContextFull
from pipeline.config.actions import Chat
from pipeline.data.dataset import HELD_OUT_FILE
from pipeline.errors import UserError
from pipeline.files import read_json, sha256_text
from pipeline.launch.machine import Placement
from pipeline.models.source import CHAT_TEMPLATE

LONGEST_QUESTION = 400  # characters, since the report shows it
GREEDY = Chat(max_new_tokens=64, temperature=0.0, seed=0)


def answer_questions(model: Path, conversations: Path, count: int, placement: Placement) -> list[dict[str, Any]]:
    """Lets a model answer the first questions of some held-out conversations.

    All models answer with the chat template of the conversations, and stop at their end of a turn.

    Args:
        model: a Hugging Face model directory.
        conversations: the tokenize/instructions artifact.
        count: the number of questions; fewer if there are not as many.
        placement: the device and the number of threads. Only one process is used.

    Returns:
        For each question ``{"question", "reference", "answer", "ended"}``.

    Raises:
        UserError: a question does not fit into the model's context.
    """
    chosen = _questions(conversations / HELD_OUT_FILE, count)
    if not chosen:
        return []
    torch.set_num_threads(placement.threads)
    template = conversations / CHAT_TEMPLATE
    end = read_json(conversations / "dataset.json")["end_of_turn"]
    chat = ChatModel.load(model.name, model, placement.device, GREEDY, template.read_text(), stop=[end])
    try:
        answers = chat.answer_all([[{"role": "user", "content": question}] for question, _ in chosen])
    except ContextFull as error:
        raise UserError(
            setting="evaluate.sample_answers",
            value=count,
            rule=f"with the chat template, {error}",
            remedy="Set evaluate.sample_answers=0.",
        ) from error
    return [
        {"question": question, "reference": reference, "answer": answer.text, "ended": answer.ended}
        for (question, reference), answer in zip(chosen, answers, strict=True)
    ]


def _questions(held_out: Path, count: int) -> list[tuple[str, str]]:
    """Returns questions with the answers of the conversations, those with the smallest hashes."""
    found: dict[str, str] = {}
    with open(held_out, encoding="utf-8") as stream:
        for line in stream:
            turns = [turn for turn in json.loads(line)["messages"] if turn["role"] in ("user", "assistant")]
            if [turn["role"] for turn in turns[:2]] == ["user", "assistant"] and all(
                turn["content"] for turn in turns[:2]
            ):
                found.setdefault(turns[0]["content"], turns[1]["content"])
    short = [question for question in found if len(question) <= LONGEST_QUESTION]
    return [(question, found[question]) for question in sorted(short, key=sha256_text)[:count]]
