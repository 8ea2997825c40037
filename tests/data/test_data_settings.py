"""Validation rules across the data settings."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.config import Data

PYTHON_DOCS = {"kind": "python_docs", "path": None, "config_name": None, "split": None, "revision": None, "weight": 1.0}
FILES = {**PYTHON_DOCS, "kind": "files", "path": "a.txt"}
HUB = {**PYTHON_DOCS, "kind": "hub", "path": "org/data", "split": "train"}


def _data(corpus: Any, fraction: float, column: str | None = None) -> Data:
    several = [{**source, "text_field": "text"} for source in corpus] if isinstance(corpus, list) else None
    return Data.model_validate(
        {
            "corpus": several if several is not None else {**corpus, "text_field": "text"},
            "instructions": {**PYTHON_DOCS, "text_field": column},
            "held_out_fraction": fraction,
            "max_corpus_tokens": None,
            "chat_template": "model",
            "system_messages": "keep",
            "max_dropped": 0.5,
            "max_record_bytes": 2**28,
            "forgetting": None,
            "validation_fraction": 0.0,
            "max_forgetting_tokens": None,
        }
    )


@pytest.mark.parametrize(("corpus", "fraction"), [(PYTHON_DOCS, 0.0), (FILES, 0.1), (HUB, 0.1)])
def test_valid_combinations_are_accepted(corpus: dict[str, Any], fraction: float) -> None:
    assert _data(corpus, fraction).held_out_fraction == fraction


def test_a_single_source_equals_a_list_of_one() -> None:
    assert _data(FILES, 0.1) == _data([FILES], 0.1)
    assert [source.kind for source in _data([FILES, HUB], 0.1).corpus] == ["files", "hub"]


@pytest.mark.parametrize(
    ("corpus", "fraction", "message"),
    [
        (FILES, 0.0, "held_out_fraction must be above 0"),
        ({**FILES, "path": None}, 0.1, "path is required"),
        ({**FILES, "path": " "}, 0.1, "it is empty"),
        ({**PYTHON_DOCS, "path": "a.txt"}, 0.0, "must be null"),
        ({**HUB, "split": None}, 0.1, "split is required"),
        ([PYTHON_DOCS, FILES], 0.0, "held_out_fraction must be above 0"),
        ([], 0.1, "at least 1 item"),
        ([FILES, {**HUB, "weight": 0.0}], 0.1, "corpus.1.weight\n.*greater than 0"),
        ({**FILES, "config_name": "en"}, 0.1, "config_name has no effect on files"),
        ({**FILES, "revision": "main"}, 0.1, "revision has no effect on files"),
        ({**PYTHON_DOCS, "split": "train"}, 0.0, "split has no effect on python_docs"),
        ({**FILES, "weight": -1.0}, 0.1, "corpus.weight\n.*greater than 0"),
        ({**FILES, "weight": float("inf")}, 0.1, "finite"),
    ],
)
def test_invalid_combinations_are_refused(corpus: Any, fraction: float, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        _data(corpus, fraction)


def test_the_column_of_conversations_cannot_be_chosen() -> None:
    with pytest.raises(ValidationError, match="text_field of instructions must be null"):
        _data(FILES, 0.1, column="messages")
