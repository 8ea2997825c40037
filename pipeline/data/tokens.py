"""Text to token ids, in batches on all cores, with exactly one beginning-of-sequence token where the model has one.

A document is ``[BOS] text EOS``: BOS if the tokenizer puts one before a text itself, EOS always, so that the model
learns where a text ends.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.artifact import read_json
from pipeline.errors import UserError


class TextTokenizer:
    """The tokenizer of a Hugging Face directory.

    Raises:
        UserError: it has ids that the model has no embedding for, or no end-of-sequence token.
    """

    def __init__(self, directory: Path) -> None:
        from transformers import AutoTokenizer

        self.inner: Any = AutoTokenizer.from_pretrained(str(directory))
        self.vocab_size = int(_text_config(read_json(directory / "config.json"))["vocab_size"])
        if self.inner.eos_token_id is None:
            raise _misfit(directory, "its tokenizer has no end-of-sequence token")
        largest = max(self.inner.get_vocab().values())
        if largest >= self.vocab_size:
            raise _misfit(directory, f"its tokenizer has the id {largest}, its embeddings end at {self.vocab_size - 1}")
        self.eos: int = self.inner.eos_token_id
        self.bos: int | None = self._added_bos()

    def _added_bos(self) -> int | None:
        """The token that the tokenizer itself puts before a text, if it does."""
        first: list[int] = self.inner("a").input_ids[:1]
        return first[0] if first == [self.inner.bos_token_id] else None

    def documents(self, texts: list[str]) -> list[list[int]]:
        """Each text as ``[BOS] text EOS``; control tokens spelled out in it stay plain characters."""
        before = [] if self.bos is None else [self.bos]
        encoded = self.inner(texts, add_special_tokens=False, return_attention_mask=False, split_special_tokens=True)
        return [[*before, *ids, self.eos] for ids in encoded["input_ids"]]


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    """Multimodal models keep the language model's numbers one level down."""
    return config if "vocab_size" in config else config["text_config"]


def _misfit(directory: Path, rule: str) -> UserError:
    return UserError(setting="model.path", value=directory, rule=rule, remedy="Use the tokenizer the model came with.")
