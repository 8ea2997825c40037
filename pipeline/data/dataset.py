"""One data set as a tokenize artifact: token blocks by split, held-out text, and counts of everything.

``dataset.json`` counts documents, tokens (padding left out), supervised tokens and what was dropped, by reason.
Memory is bounded by one batch, the open blocks, and 16 bytes a document to recognise repeats.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

from pipeline.config import Tokenize
from pipeline.data.blocks import BlockWriter, DocumentPacker, ExamplePacker
from pipeline.data.chat import ChatRenderer, chat_template
from pipeline.data.conversations import Conversation
from pipeline.data.sources import SPLITS, Example, Split, content_bytes, examples, with_split
from pipeline.data.tokens import TextTokenizer
from pipeline.errors import UserError
from pipeline.progress import Bar

HELD_OUT_FILE = "held_out.jsonl"
TEMPLATE_FILE = "chat_template.jinja"  # under the name that a Hugging Face directory has for it
BATCH_DOCUMENTS = 256
BATCH_CHARACTERS = 4 * 2**20

Assigned = tuple[Split, Example]


class DatasetWriter:
    """The files of one data set, open for writing, and its counts.

    Args:
        directory: where they go; what lies there under their names is overwritten.
    """

    def __init__(self, directory: Path, settings: Tokenize, tokenizer: TextTokenizer) -> None:
        self._directory, self._settings, self._tokenizer = directory, settings, tokenizer
        self.documents: Counter[str] = Counter()
        self.tokens: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self._files = ExitStack()
        length = settings.sequence_length
        self._blocks = {split: self._files.enter_context(BlockWriter(directory, split, length)) for split in SPLITS}
        self._held_out = self._files.enter_context(open(directory / HELD_OUT_FILE, "w", encoding="utf-8"))

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(self, *details: Any) -> None:
        self._files.__exit__(*details)

    def write(self, bar: Bar) -> None:
        """Reads the source to its end, or up to ``max_tokens`` training tokens, and writes all of it."""
        found = with_split(
            examples(self._settings.source, self._settings.purpose), self._settings.held_out_fraction, self.dropped
        )
        write = self._write_documents if self._settings.purpose == "corpus" else self._write_conversations
        write(self._until_enough(_advancing(bar, found)))

    def _until_enough(self, found: Iterable[Assigned]) -> Iterator[Assigned]:
        """Stops at the token budget; a source with a split of its own is read on for its held-out part."""
        for split, example in found:
            if self._enough() and example.split is None:
                return
            yield split, example

    def _enough(self) -> bool:
        budget = self._settings.max_tokens
        return budget is not None and self.tokens["train"] >= budget

    def _write_documents(self, found: Iterable[Assigned]) -> None:
        packers = {
            split: DocumentPacker(self._blocks[split], self._settings.sequence_length, self._tokenizer.eos)
            for split in SPLITS
        }
        for batch in _batches(found):
            encoded = self._tokenizer.documents([cast("str", example.content) for _, example in batch])
            for (split, example), ids in zip(batch, encoded, strict=True):
                if split == "train" and self._enough():
                    continue
                packers[split].add([ids])
                self._count(split, len(ids))
                if split == "held_out":
                    self._keep_held_out({"text": example.content})
        for packer in packers.values():
            packer.finish()

    def _write_conversations(self, found: Iterable[Assigned]) -> None:
        length = self._settings.sequence_length
        packers = {split: ExamplePacker(self._blocks[split], length, self._tokenizer.eos) for split in SPLITS}
        template = chat_template(self._tokenizer, self._settings.chat_template)
        (self._directory / TEMPLATE_FILE).write_text(template)
        renderer = ChatRenderer(self._tokenizer, template, length, self.dropped)
        for split, example in found:
            conversation = cast("Conversation", example.content)
            rendered = renderer.render(conversation)
            if rendered is not None:
                packers[split].add(rendered.input_ids, rendered.loss_mask)
                self._count(split, len(rendered.input_ids))
                if split == "held_out":
                    self._keep_held_out({"messages": conversation})
        for packer in packers.values():
            packer.finish()

    def _count(self, split: Split, tokens: int) -> None:
        self.documents[split] += 1
        self.tokens[split] += tokens

    def _keep_held_out(self, row: dict[str, Any]) -> None:
        self._held_out.write(json.dumps(row, ensure_ascii=False) + "\n")

    def summary(self) -> dict[str, Any]:
        """The counts, after writing.

        Raises:
            UserError: a split is empty, or nothing in it is supervised.
        """
        by_split: dict[str, dict[str, int]] = {
            "blocks": {split: self._blocks[split].blocks for split in SPLITS},
            "documents": {split: self.documents[split] for split in SPLITS},
            "tokens": {split: self.tokens[split] for split in SPLITS},
            "supervised_tokens": {split: self._blocks[split].supervised_tokens for split in SPLITS},
        }
        self._refuse_empty(by_split["supervised_tokens"])
        settings = self._settings
        return {
            "purpose": settings.purpose,
            "source": settings.source.model_dump(mode="json"),  # a hub revision is a commit here
            "sequence_length": settings.sequence_length,
            "vocab_size": self._tokenizer.vocab_size,
            **by_split,
            "dropped": dict(sorted(self.dropped.items())),
        }

    def _refuse_empty(self, supervised: dict[str, int]) -> None:
        source, purpose = self._settings.source, self._settings.purpose
        found = f"{self.documents.total()} documents were kept; dropped: {dict(self.dropped) or 'none'}"
        if not supervised["train"]:
            raise UserError(
                setting=f"data.{purpose}.path",
                value=source.path,
                rule=f"it gives not one token to train on ({found})",
                remedy="Give it content, or raise the sequence length if everything was too long.",
            )
        if not supervised["held_out"]:
            raise UserError(
                setting="data.held_out_fraction",
                value=self._settings.held_out_fraction,
                rule=f"not one token of data.{purpose} fell into the held-out part, which is drawn by hash ({found})",
                remedy="Raise data.held_out_fraction, or give more documents.",
            )


def _advancing(bar: Bar, found: Iterable[Assigned]) -> Iterator[Assigned]:
    for number, (split, example) in enumerate(found, 1):
        bar.advance(content_bytes(example.content), documents=number)
        yield split, example


def _batches(found: Iterable[Assigned]) -> Iterator[list[Assigned]]:
    """Lists bounded in number and in characters, so that a batch is tokenised on all cores at once."""
    batch: list[Assigned] = []
    characters = 0
    for split, example in found:
        batch.append((split, example))
        characters += len(example.content)
        if len(batch) == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
