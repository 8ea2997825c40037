"""Rules between the data settings."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.config import Data

EMBEDDED = {"kind": "python_docs", "path": None, "config_name": None, "split": None, "revision": None}
FILES = {**EMBEDDED, "kind": "files", "path": "a.txt"}
HUB = {**EMBEDDED, "kind": "hub", "path": "org/data", "split": "train"}


def _data(corpus: dict[str, Any], fraction: float) -> Data:
    return Data.model_validate(
        {
            "corpus": {**corpus, "text_field": "text"},
            "instructions": {**EMBEDDED, "text_field": None},
            "held_out_fraction": fraction,
            "max_corpus_tokens": None,
            "chat_template": "model",
        }
    )


@pytest.mark.parametrize(("corpus", "fraction"), [(EMBEDDED, 0.0), (FILES, 0.1), (HUB, 0.1)])
def test_what_fits_together(corpus: dict[str, Any], fraction: float) -> None:
    assert _data(corpus, fraction).held_out_fraction == fraction


@pytest.mark.parametrize(
    ("corpus", "fraction", "words"),
    [
        (FILES, 0.0, "held_out_fraction must be above 0"),
        ({**FILES, "path": None}, 0.1, "path is needed"),
        ({**EMBEDDED, "path": "a.txt"}, 0.0, "must be null"),
        ({**HUB, "split": None}, 0.1, "split is needed"),
    ],
)
def test_what_does_not(corpus: dict[str, Any], fraction: float, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        _data(corpus, fraction)
