"""All of tokenize but the glue: sources to token blocks, resumable, with counts of everything.

Memory is bounded by the batches that are read ahead, the open blocks, and the hashes of what was seen (``HashSet``).
The result is the same to the byte however many processes encode and however often the work was killed: what is kept,
and on which side, is decided one example after the other in an order that follows from the sources alone.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

from pipeline.config import Tokenize
from pipeline.data.blocks import Ids
from pipeline.data.chat import ChatRenderer, chat_template, end_of_turn
from pipeline.data.dataset import Checkpoint, DatasetWriter
from pipeline.data.mixture import COUNTS, Items, Lookahead, Mixture, Part, Unencoded
from pipeline.data.records import Conversation
from pipeline.data.sources import SPLITS, Example, ExampleStream, Split, content_bytes, expected_bytes, setting_of
from pipeline.data.splits import Sieve
from pipeline.data.tokenizer import TextTokenizer
from pipeline.errors import UserError
from pipeline.progress import Bar

TEMPLATE_FILE = "chat_template.jinja"  # under the name that a Hugging Face directory has for it
SAVE_EVERY_SECONDS = 20.0


class DatasetBuilder:
    """One data set in the making.

    Args:
        directory: where the files go; an earlier attempt at the same data set that was killed there is gone on with,
            for as long as ``forget_checkpoint`` was not called.
        settings: with pinned sources.

    Raises:
        UserError: there is no chat template to render conversations with.
    """

    def __init__(self, directory: Path, settings: Tokenize, tokenizer: TextTokenizer) -> None:
        self._settings, self._tokenizer = settings, tokenizer
        self._names = [
            setting_of(settings.sources, number, settings.purpose) for number in range(len(settings.sources))
        ]
        self._open = ExitStack()
        self._checkpoint = Checkpoint(directory)
        state = self._checkpoint.state
        self._sieve = Sieve(settings.held_out_fraction, self._checkpoint.hashes)
        self._writer = self._open.enter_context(DatasetWriter(directory, settings, tokenizer.eos, state))
        self._encoders = self._open.enter_context(tokenizer.encoders())
        self._mixture = Mixture(self._parts(state["parts"] if state else None), settings.max_tokens)
        self._end_of_turn: int | None = None
        self._renderers = self._make_renderers(directory) if settings.purpose == "instructions" else []

    def __enter__(self) -> DatasetBuilder:
        return self

    def __exit__(self, *details: Any) -> None:
        self._open.__exit__(*details)

    def _parts(self, states: Sequence[dict[str, Any]] | None) -> list[Part]:
        parts = []
        for number, source in enumerate(self._settings.sources):
            state = states[number] if states else None
            items = self._items(number, state["position"] if state else None)
            part = Part(items, source.weight, has_split=source.kind == "python_docs")
            if state:
                part.restore(state)
            parts.append(part)
        return parts

    def _items(self, number: int, position: dict[str, Any] | None) -> Items:
        source, purpose = self._settings.sources[number], self._settings.purpose
        stream = ExampleStream(source, purpose, self._names[number], position["stream"] if position else None)
        return Lookahead(stream, self._encoders, position) if purpose == "corpus" else Unencoded(stream)

    def _make_renderers(self, directory: Path) -> list[ChatRenderer]:
        """One a part, since each counts what it drops."""
        assert self._settings.chat_template is not None, "instructions have one"
        template = chat_template(self._tokenizer, self._settings.chat_template)
        (directory / TEMPLATE_FILE).write_text(template)
        self._end_of_turn = end_of_turn(self._tokenizer, template)
        longest = self._settings.sequence_length
        return [ChatRenderer(self._tokenizer, template, longest, part.dropped) for part in self._mixture.parts]

    def build(self, bar: Bar) -> dict[str, Any]:
        """Reads the sources to their end or to the token budget, writes everything, and counts it.

        Raises:
            UserError: a source cannot be read, or a split is empty.
        """
        saved = time.monotonic()
        for number, example, ids in self._mixture:
            split = self._sieve.place(example, self._mixture.parts[number].dropped)
            if split is not None:
                self._add(number, split, example, ids)
            bar.advance(content_bytes(example.content), training_tokens=self._mixture.training_tokens)
            if time.monotonic() - saved > SAVE_EVERY_SECONDS:
                self._save()
                saved = time.monotonic()
        self._writer.finish()
        return self._summary()

    def _add(self, number: int, split: Split, example: Example, ids: Ids | None) -> None:
        part, source = self._mixture.parts[number], self._names[number]
        if ids is not None:
            self._writer.add_document(split, source, cast("str", example.content), ids)
            part.count(split, len(ids))
            return
        conversation = cast("Conversation", example.content)
        rendered = self._renderers[number].render(conversation)
        if rendered:
            self._writer.add_conversation(split, source, conversation, rendered)
            part.count(split, sum(len(each.input_ids) for each in rendered))

    def _save(self) -> None:
        state = {**self._writer.save(), "parts": [part.state() for part in self._mixture.parts]}
        self._checkpoint.save(state, self._sieve.news)

    # --------------------------------------------------------------------------------- what came of it

    def _summary(self) -> dict[str, Any]:
        """``dataset.json``: counts of blocks, documents, tokens (padding left out) and drops, in all and by source."""
        settings, blocks = self._settings, self._writer.blocks
        supervised = {split: blocks[split].supervised_tokens for split in SPLITS}
        self._refuse_empty(supervised)
        totals = {name: self._mixture.total(name) for name in COUNTS}
        return {
            "purpose": settings.purpose,
            "sources": [  # a hub revision is a commit here
                {**source.model_dump(mode="json"), **part.counts(), "ran_out": part.ran_out}
                for source, part in zip(settings.sources, self._mixture.parts, strict=True)
            ],
            "sequence_length": settings.sequence_length,
            "vocab_size": self._tokenizer.vocab_size,
            "end_of_turn": self._end_of_turn,  # the id at which a model tuned on it stops; null for a corpus
            "blocks": {split: blocks[split].blocks for split in SPLITS},
            "documents": {split: totals["documents"][split] for split in SPLITS},
            "tokens": {split: totals["tokens"][split] for split in SPLITS},
            "supervised_tokens": supervised,
            "dropped": dict(sorted(totals["dropped"].items())),
            "warnings": self._warnings(),
        }

    def _warnings(self) -> list[str]:
        """Where less was there than was asked for or is needed."""
        tokens, budget = self._mixture.training_tokens, self._settings.max_tokens
        ended = [name for name, part in zip(self._names, self._mixture.parts, strict=True) if part.ran_out]
        found = []
        if ended and len(self._names) > 1:
            found.append(
                f"{ended[0]} ran out after {tokens:,} training tokens of all sources; the others were not read on, "
                "so that the shares hold: give it more text or less weight"
            )
        if budget is not None and tokens < budget:
            found.append(f"data.max_corpus_tokens = {budget:,} was not reached: {tokens:,} training tokens are there")
        found += [
            f"{name} has no held-out document, so that nothing will say what was learnt or forgotten of it: give it "
            "more documents, or raise data.held_out_fraction"
            for name, part in zip(self._names, self._mixture.parts, strict=True)
            if len(self._names) > 1 and not part.documents["held_out"]
        ]
        return found

    def _refuse_empty(self, supervised: dict[Split, int]) -> None:
        purpose = self._settings.purpose
        for name, source, part in zip(self._names, self._settings.sources, self._mixture.parts, strict=True):
            if not supervised["train"] or (part.ran_out and not part.tokens["train"]):
                raise UserError(
                    setting=f"{name}.path",
                    value=source.path,
                    rule=f"it gives not one token to train on ({_found(part.documents, part.dropped)})",
                    remedy="Give it content, or raise the sequence length if everything was too long.",
                )
        if not supervised["held_out"]:
            found = _found(self._mixture.total("documents"), self._mixture.total("dropped"))
            raise UserError(
                setting="data.held_out_fraction",
                value=self._settings.held_out_fraction,
                rule=f"not one token of data.{purpose} fell into the held-out part, which is drawn by hash ({found})",
                remedy="Raise data.held_out_fraction, or give more documents.",
            )


def _found(documents: Counter[str], dropped: Counter[str]) -> str:
    return f"{documents.total()} documents were kept; dropped: {dict(dropped) or 'none'}"


def forget_checkpoint(directory: Path) -> None:
    """The data set is whole: what an interrupted attempt would go on from is not part of it."""
    Checkpoint(directory).remove()


def expected_total(settings: Tokenize) -> int:
    """About how many bytes there are to read, for a progress bar; 0 where nobody knows."""
    sizes = [
        expected_bytes(source, settings.purpose, setting_of(settings.sources, number, settings.purpose))
        for number, source in enumerate(settings.sources)
    ]
    return 0 if 0 in sizes else sum(sizes)
