"""Builds one dataset: reads sources, deduplicates, splits, tokenizes and packs them into blocks, and can be resumed.

Memory is bounded by the prefetched batches, the open blocks, and the hashes of everything seen (``HashSet``). The
result is byte-identical for any number of tokenizer workers and interruptions, because examples are kept and assigned
to a split one at a time, in an order that depends only on the sources.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Container, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from pipeline.config import Source, Split, Tokenize
from pipeline.config.data import Purpose
from pipeline.data.blocks import Ids
from pipeline.data.chat import ChatTokenizer, chat_template, end_of_turn, template_to_save
from pipeline.data.dataset import DatasetWriter, TokenizeCheckpoint
from pipeline.data.mixture import COUNTS, Mixture, MixtureSource, PrefetchedDocuments, UntokenizedExamples
from pipeline.data.records import Conversation, Example
from pipeline.data.sources import SOURCE_READERS, ExampleStream, setting_name
from pipeline.data.splits import Deduplicator
from pipeline.data.templates import TemplateProcess, fold
from pipeline.data.tokenizer import TextTokenizer
from pipeline.errors import UserError
from pipeline.models.source import CHAT_TEMPLATE
from pipeline.progress import ProgressBar

SAVE_EVERY_SECONDS = 20.0
REPORTED_FRACTION = 0.01  # of the examples of a source; more of them dropped for one reason is a warning
SHOWN_FILES = 4  # of a source, on the terminal
NOT_LOST = ("truncated", "duplicate")  # the beginning, or another copy, is kept


class DatasetBuilder:
    """Builds one dataset. Used as a context manager.

    Args:
        directory: where the files are written. If it contains an interrupted attempt at the same dataset, that attempt
            is resumed.
        settings: the settings, with pinned sources.
        tokenizer: the model's tokenizer.

    Raises:
        UserError: the dataset has conversations, and there is no chat template for them.
    """

    def __init__(self, directory: Path, settings: Tokenize, tokenizer: TextTokenizer) -> None:
        self._settings, self._tokenizer = settings, tokenizer
        forgetting = settings.forgetting or []
        self._names = [*_setting_names(settings.sources, settings.purpose), *_setting_names(forgetting, "forgetting")]
        self._open = ExitStack()
        self._checkpoint = TokenizeCheckpoint(directory, settings.splits)
        state = self._checkpoint.state
        self._deduplicator = Deduplicator(
            settings.held_out_fraction, self._checkpoint.hashes, settings.validation_fraction
        )
        self._writer = self._open.enter_context(DatasetWriter(directory, settings, tokenizer.eos, state))
        self._pool = self._open.enter_context(tokenizer.worker_pool())
        opened = self._open_sources(state["parts"] if state else None)
        mixed, unmixed = opened[: len(settings.sources)], opened[len(settings.sources) :]
        self._mixture = Mixture(mixed, settings.max_tokens, unmixed, settings.max_forgetting_tokens)
        self._end_of_turn: int | None = None
        self._template: TemplateProcess | None = None
        self._folded: frozenset[str] = frozenset()  # roles
        # One per source, since each counts what it drops.
        self._chat_tokenizers: list[ChatTokenizer] = []
        if settings.purpose == "instructions":
            self._open_template(directory)

    def _open_template(self, directory: Path) -> None:
        settings, tokenizer = self._settings, self._tokenizer
        assert settings.chat_template is not None, "set for instructions by the driver"
        text = chat_template(tokenizer, settings.chat_template)
        template = TemplateProcess(text, tokenizer.special_tokens, settings.max_record_bytes)
        self._template = self._open.enter_context(template)
        (directory / CHAT_TEMPLATE).write_text(template_to_save(tokenizer, template))
        self._end_of_turn = end_of_turn(tokenizer, template, template.probe)
        self._folded = template.unsupported if settings.system_messages == "fold" else frozenset()
        self._chat_tokenizers = [
            ChatTokenizer(tokenizer, template, settings.sequence_length, source.dropped)
            for source in self._mixture.sources
        ]

    def _open_sources(self, states: Sequence[dict[str, Any]] | None) -> list[MixtureSource]:
        """Opens every source at the position that an interrupted attempt saved, or at the beginning."""
        opened = []
        several: list[tuple[Purpose, Source]] = [(self._settings.purpose, source) for source in self._settings.sources]
        several += [("forgetting", source) for source in self._settings.forgetting or []]
        for index, (purpose, source) in enumerate(several):
            state = states[index] if states else None
            position = state["position"] if state else None
            limit, start = self._settings.max_record_bytes, position["stream"] if position else None
            stream = ExampleStream(source, purpose, self._names[index], limit, start)
            # Conversations are tokenized in this process, because chat templates need the transformers tokenizer.
            examples = (
                UntokenizedExamples(stream)
                if purpose == "instructions"
                else PrefetchedDocuments(stream, self._pool, position)
            )
            opened.append(MixtureSource(examples, source.weight, SOURCE_READERS[source.kind].has_splits))
            if state:
                opened[-1].restore(state)
        return opened

    def __enter__(self) -> DatasetBuilder:
        return self

    def __exit__(self, *details: Any) -> None:
        self._open.__exit__(*details)

    def build(self, bar: ProgressBar) -> dict[str, Any]:
        """Reads the sources to their end or to the token budget, and writes the dataset.

        Returns:
            The content of ``dataset.json``.

        Raises:
            UserError: a source cannot be read, or a split is empty.
        """
        saved_at = time.monotonic()
        for index, example, ids in self._mixture:
            if index >= len(self._mixture.mixed):
                example = replace(example, split="forgetting")
            self._mixture.sources[index].count_read(example)
            split = self._deduplicator.assign(example, self._mixture.sources[index].dropped)
            if split is not None:
                self._add(index, split, example, ids)
            bar.advance(example.size, training_tokens=self._mixture.training_tokens)
            if time.monotonic() - saved_at > SAVE_EVERY_SECONDS:
                self._save()
                saved_at = time.monotonic()
        self._writer.finish()
        self._check_not_empty()
        self._check_dropped()
        return self._summary()

    def _add(self, index: int, split: Split, example: Example, ids: Ids | None) -> None:
        source, name = self._mixture.sources[index], self._names[index]
        if ids is not None:
            self._writer.add_document(split, name, cast("str", example.content), ids)
            source.count(split, len(ids))
            return
        conversation = fold(cast("Conversation", example.content), self._folded)
        tokenized = self._chat_tokenizers[index].tokenize(replace(example, content=conversation))
        if tokenized:
            self._writer.add_conversation(split, name, conversation, tokenized)
            source.count(split, sum(len(each.input_ids) for each in tokenized))

    def _save(self) -> None:
        # The writer is saved first, because the checkpoint must not be ahead of the data on disk.
        state = {**self._writer.save(), "parts": [source.state() for source in self._mixture.sources]}
        self._checkpoint.save(state, self._deduplicator.new_hashes)

    # -------------------------------------------------------------------------------- dataset.json

    def _check_not_empty(self) -> None:
        settings, mixture = self._settings, self._mixture
        supervised = {split: self._writer.blocks[split].supervised_tokens for split in settings.splits}
        names = self._names[: len(mixture.mixed)]
        for name, source_settings, source in zip(names, settings.sources, mixture.mixed, strict=True):
            if not supervised["train"] or (source.exhausted and not source.tokens["train"]):
                kept = _kept_and_dropped(source.documents, source.dropped)
                raise UserError(
                    setting=f"{name}.path",
                    value=source_settings.path,
                    rule=f"it does not provide a single token to train on ({kept})",
                    remedy=f"{self._advice(source.dropped)}Provide more content, or increase the sequence length if "
                    "everything was too long.",
                )
        kept = _kept_and_dropped(mixture.total("documents"), mixture.total("dropped"))
        for split in ("held_out", "validation"):
            if not supervised.get(split, 1):
                setting = f"data.{split}_fraction"
                raise UserError(
                    setting=setting,
                    value=getattr(settings, f"{split}_fraction"),
                    rule=f"the {split.replace('_', '-')} part of data.{settings.purpose}, which is chosen by hash, is "
                    f"empty ({kept})",
                    remedy=f"Increase {setting}, or provide more documents.",
                )
        if not supervised.get("forgetting", 1):
            unmixed = mixture.sources[len(mixture.mixed)]
            raise UserError(
                setting="data.forgetting",
                value=", ".join(str(source.path) for source in settings.forgetting or []),
                rule=f"it does not provide a single token ({_kept_and_dropped(unmixed.documents, unmixed.dropped)}); "
                "documents that also occur in the corpus are dropped",
                remedy="Set data.forgetting to other documents.",
            )

    def _check_dropped(self) -> None:
        """Refuses a source of which most is lost, which is a mistake more often than not."""
        allowed = self._settings.max_dropped
        for name, source in zip(self._names, self._mixture.sources, strict=True):
            reasons = [reason for reason in source.dropped if reason not in NOT_LOST]
            lost = sum(source.dropped[reason] for reason in reasons)
            if lost > allowed * source.examples_read:
                least = math.ceil(100 * lost / source.examples_read) / 100
                found = ", ".join(_describe_drop(source, reason) for reason in reasons)
                raise UserError(
                    setting="data.max_dropped",
                    value=allowed,
                    rule=f"{lost:,} of {source.examples_read:,} examples of {name} were dropped: {found}",
                    remedy=f"{self._advice(reasons)}Correct the data, or set data.max_dropped={least:g} to accept "
                    "that.",
                )

    def _advice(self, reasons: Container[str]) -> str:
        """Returns what else to do about examples that were dropped or cut for some reasons, followed by a space."""
        advice = self._template.advice(reasons, self._folded) if self._template is not None else ""
        if "too_long" in reasons or "truncated" in reasons:
            advice += "Increase sft.sequence_length. "
        return advice

    def _summary(self) -> dict[str, Any]:
        """Returns the content of ``dataset.json``: counts in total and by source. Tokens do not include padding."""
        settings, mixture, blocks = self._settings, self._mixture, self._writer.blocks
        totals = {name: mixture.total(name) for name in COUNTS}
        by_name = dict(zip(self._names, mixture.sources, strict=True))
        splits, mixed = settings.splits, len(settings.sources)
        described = [
            {
                **source_settings.model_dump(mode="json"),
                **source.counts(),
                "dropped_at": source.dropped.locations,
                "files": dict(source.files),
                "ran_out": source.exhausted,
            }
            for source_settings, source in zip(
                [*settings.sources, *(settings.forgetting or [])], mixture.sources, strict=True
            )
        ]
        return {
            "purpose": settings.purpose,
            "sources": described[:mixed],  # pinned: a hub revision is a commit
            **({"forgetting": described[mixed:]} if described[mixed:] else {}),
            "sequence_length": settings.sequence_length,
            "vocab_size": self._tokenizer.vocab_size,
            "end_of_turn": self._end_of_turn,  # id at which a model tuned on this dataset stops; null for a corpus
            "blocks": {split: blocks[split].blocks for split in splits},
            "documents": {split: totals["documents"][split] for split in splits},
            "tokens": {split: totals["tokens"][split] for split in splits},
            "supervised_tokens": {split: blocks[split].supervised_tokens for split in splits},
            "dropped": dict(sorted(totals["dropped"].items())),
            "read": [_describe_files(name, source) for name, source in by_name.items() if source.files],
            "warnings": self._warnings(),
        }

    def _warnings(self) -> list[str]:
        """Returns messages about sources that provided less than was requested or is needed."""
        tokens, budget = self._mixture.training_tokens, self._settings.max_tokens
        by_name = dict(zip(self._names, self._mixture.sources, strict=True))
        mixed = dict(list(by_name.items())[: len(self._mixture.mixed)])
        exhausted = [name for name, source in mixed.items() if source.exhausted]
        warnings = [
            f"{name}: of {source.examples_read:,} examples, {_describe_drop(source, reason)} were "
            f"{'cut' if reason == 'truncated' else 'dropped'}. {self._advice([reason])}".strip()
            for name, source in by_name.items()
            for reason, count in sorted(source.dropped.items())
            if count > REPORTED_FRACTION * source.examples_read
        ]
        if exhausted and len(mixed) > 1:
            warnings.append(
                f"{exhausted[0]} ran out after {tokens:,} training tokens of all sources. The others were not read "
                "further, to keep their shares. Provide more text for it, or decrease its weight."
            )
        if budget is not None and tokens < budget:
            warnings.append(
                f"data.max_corpus_tokens = {budget:,} was not reached: the sources have {tokens:,} training tokens."
            )
        warnings += [
            f"{name} has no held-out document, so the evaluation cannot show what was learned or forgotten on it. "
            "Provide more documents, or increase data.held_out_fraction."
            for name, source in mixed.items()
            if len(mixed) > 1 and not source.documents["held_out"]
        ]
        return warnings


def _setting_names(sources: Sequence[Source], purpose: Purpose) -> list[str]:
    return [setting_name(sources, index, purpose) for index in range(len(sources))]


def _kept_and_dropped(documents: Counter[str], dropped: Counter[str]) -> str:
    return f"documents kept: {documents.total()}; dropped: {dict(dropped) or 'none'}"


def _describe_drop(source: MixtureSource, reason: str) -> str:
    places = source.dropped.locations.get(reason)
    return f"{source.dropped[reason]:,} {reason}" + (f" (such as {'; '.join(places)})" if places else "")


def _describe_files(name: str, source: MixtureSource) -> str:
    """Returns a line for the terminal. ``dataset.json`` has all files."""
    files = list(source.files.items())
    shown = ", ".join(f"{file} {records:,}" for file, records in files[:SHOWN_FILES])
    more = ", ..." if len(files) > SHOWN_FILES else ""
    return f"{name}: {sum(source.files.values()):,} records in {len(files):,} file(s): {shown}{more}"
