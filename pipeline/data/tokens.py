"""The model's tokenizer: its ids, its ends of text, and exactly one beginning-of-sequence token where it has one.

A document is ``[BOS] text EOS``: BOS if the tokenizer puts one before a text itself, EOS always, so that the model
learns where a text ends.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.artifact import read_json
from pipeline.data.encoders import Encoders
from pipeline.errors import UserError


class TextTokenizer:
    """The tokenizer of a Hugging Face directory.

    Raises:
        UserError: it has ids that the model has no embedding for, no end-of-sequence token, or no fast form.
    """

    def __init__(self, directory: Path) -> None:
        from transformers import AutoTokenizer

        self.inner: Any = AutoTokenizer.from_pretrained(str(directory))
        self.vocab_size = int(_text_config(read_json(directory / "config.json"))["vocab_size"])
        if not self.inner.is_fast:
            raise _misfit(directory, "its tokenizer is none of the tokenizers library's (there is no tokenizer.json)")
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

    def encoders(self) -> Encoders:
        """Processes that turn texts into documents, ``[BOS] text EOS``."""
        before = [] if self.bos is None else [self.bos]
        return Encoders(self.inner.backend_tokenizer.to_str(), before=before, after=[self.eos])


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    """Multimodal models keep the language model's numbers one level down."""
    return config if "vocab_size" in config else config["text_config"]


def _misfit(directory: Path, rule: str) -> UserError:
    return UserError(setting="model.path", value=directory, rule=rule, remedy="Use the tokenizer the model came with.")
