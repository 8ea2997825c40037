"""The documents of the bundled tasks, written as JSON lines beside the scores, where they can be inspected."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.data.dataset import HELD_OUT_FILE
from pipeline.data.python_docs import words
from pipeline.evaluation.minimal_pairs import build_pairs
from pipeline.evaluation.questions import build_questions
from pipeline.files import sha256_text

LONGEST_PASSAGE = 1_000  # characters; many short passages have a smaller standard error than a few long ones


def write_documents(task: str, corpus: Path, folder: Path, held_out_characters: int) -> Path:
    """Writes ``<folder>/<task>.jsonl`` for a bundled task.

    Args:
        corpus: the tokenize/corpus artifact, which holds the held-out text.
        held_out_characters: the amount of each source's held-out text. The last passage is not truncated.
    """
    builders: Mapping[str, Callable[[], Iterable[Mapping[str, Any]]]] = {
        "held_out_text": lambda: _held_out_text(corpus, held_out_characters),
        "python_docs_mcq": _python_docs_mcq,
        "minimal_pairs": _minimal_pairs,
    }
    path = folder / f"{task}.jsonl"
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in builders[task]())
    os.replace(temporary, path)
    return path


def _held_out_text(corpus: Path, characters: int) -> list[dict[str, str]]:
    """Beginnings of held-out documents, ``characters`` of each source, ordered by their hashes.

    Sources get the same amount whatever their share of the tokens, so that their scores have similar standard errors.
    """
    passages: dict[str, set[str]] = {}
    with open(corpus / HELD_OUT_FILE, encoding="utf-8") as stream:
        for line in stream:
            document = json.loads(line)
            passages.setdefault(document["source"], set()).add(_passage(document["text"]))
    drawn = [
        {"text": passage, "source": source} for source in passages for passage in _draw(passages[source], characters)
    ]
    return sorted(drawn, key=lambda row: (sha256_text(row["text"]), row["source"]))


def _draw(passages: Iterable[str], characters: int) -> Iterator[str]:
    """Yields passages until they have ``characters`` characters together. The last one is not truncated."""
    for passage in sorted(passages, key=sha256_text):
        if characters <= 0:
            return
        if words(passage):  # word perplexity divides by the number of words
            yield passage
            characters -= len(passage)


def _passage(text: str) -> str:
    """Returns the beginning of a document, truncated at the end of a line if possible."""
    if len(text) <= LONGEST_PASSAGE:
        return text
    head, newline, _ = text[:LONGEST_PASSAGE].rpartition("\n")
    return head + newline if newline else text[:LONGEST_PASSAGE]


def _python_docs_mcq() -> Iterable[dict[str, Any]]:
    """Yields one document per question: each name as the corpus lays it out, and the summary to score after it."""
    for question in build_questions():
        contexts = [f"{name}\n   " for name in question.names]
        yield {
            "contexts": contexts,
            "continuation": f" {question.summary}",
            "gold": question.gold,
            "module": question.module,
        }


def _minimal_pairs() -> Iterable[dict[str, Any]]:
    for pair in build_pairs():
        yield {"choices": pair.choices, "gold": pair.gold, "phenomenon": pair.phenomenon}
