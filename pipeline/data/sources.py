"""Checks sources of documents and conversations, identifies their content, and streams their examples.

To add a source kind, add its name to ``Source.kind`` in ``pipeline/config/data.py``, and a subclass of
:class:`SourceReader` to ``SOURCE_READERS`` below. This module does not import torch, since the driver uses it too.
"""

from __future__ import annotations

import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Protocol

from pipeline.artifacts.fingerprints import Fingerprints
from pipeline.config import Source, Split
from pipeline.config.data import Purpose
from pipeline.data import hub_datasets, python_docs
from pipeline.data.files import BadFile, FileStream, Position, Reading, Record
from pipeline.data.paths import find_files
from pipeline.data.records import (
    CONVERSATION_COLUMNS,
    BadRecord,
    Conversation,
    Example,
    conversation_from,
    document_from,
)  # fmt: skip
from pipeline.errors import UserError
from pipeline.files import sha256_text

PROBED_RECORDS = 100  # a source whose first records are all malformed is refused
PROBED_CONVERSATIONS = 20  # of a source, that are rendered before a run
ZERO_BLOCK = "\0" * 16  # never part of a text
COMMIT = re.compile(r"[0-9a-f]{40}")  # of a Hub repository; a branch or tag may move


class SourceStream(Protocol):
    """Records or examples in a fixed order."""

    def __iter__(self) -> Iterator[Record | Example]: ...

    def position(self) -> Position:
        """Returns the position after the last record that was returned, as JSON values."""


class SourceReader(ABC):
    """Base class of the source kinds. An instance reads one configured source.

    Args:
        source: the settings of the source.
        purpose: what its examples are: documents (corpus, forgetting) or conversations (instructions).
        setting: dotted name of the source for messages, for example ``data.corpus``.
        max_record_bytes: the largest record that may be read.

    Attributes:
        has_splits: whether its examples come with a split; otherwise a hash of their content decides.
    """

    has_splits = False

    def __init__(self, source: Source, purpose: Purpose, setting: str, max_record_bytes: int) -> None:
        self.source, self.purpose, self.setting = source, purpose, setting
        self.max_record_bytes = max_record_bytes

    def check(self) -> None:  # noqa: B027 (not every kind needs a check)
        """Raises UserError if the source is missing, unreachable or unusable. Reads no further than one example."""

    def pin(self) -> Source:
        """Returns the settings with everything that may change, such as a branch, resolved to a fixed version."""
        return self.source

    @abstractmethod
    def fingerprint(self, fingerprints: Fingerprints) -> str:
        """Identifies the content of the pinned source, as part of artifact keys."""

    @abstractmethod
    def open(self, position: Position | None) -> SourceStream:
        """Opens the pinned source, at the given position if there is one. The caller converts records to examples."""

    def expected_bytes(self) -> int:
        """Returns the approximate size of all text in bytes, for progress bars and estimates, or 0 if unknown."""
        return 0

    def examples(self) -> ExampleStream:
        """Returns all examples of the pinned source."""
        return ExampleStream(self.source, self.purpose, self.setting, self.max_record_bytes)


class _PythonDocs(SourceReader):
    """The documentation that is part of every CPython installation."""

    has_splits = True

    def fingerprint(self, fingerprints: Fingerprints) -> str:
        return python_docs.interpreter_fingerprint()

    def open(self, position: Position | None) -> SourceStream:
        # Building the examples takes seconds, and all of them fit in memory.
        read = python_docs.grouped_pairs if self.purpose == "instructions" else python_docs.grouped_documents
        own: tuple[Split, ...] = ("train", "held_out")
        examples = [
            Example(content, split, group=group)
            for split in own
            for content, group in read(held_out=split == "held_out")
        ]
        return _ListStream(examples, position)

    def expected_bytes(self) -> int:
        return sum(example.size for example in self.examples())


class _Files(SourceReader):
    """Local files."""

    def check(self) -> None:
        # `all` stops at the first example that is not blank.
        if all(example.is_blank for example in self.examples()):
            content = "conversation" if self.purpose == "instructions" else "document"
            raise UserError(
                setting=f"{self.setting}.path",
                value=self.source.path,
                rule=f"it is empty: it does not contain a single {content}",
                remedy=f"Set {self.setting}.path to files with content.",
            )

    def fingerprint(self, fingerprints: Fingerprints) -> str:
        return f"files {fingerprints.of_files(self._files())}"

    def open(self, position: Position | None) -> SourceStream:
        columns = CONVERSATION_COLUMNS if self.purpose == "instructions" else (str(self.source.text_field),)
        return FileStream(self._files(), Reading(columns, self.max_record_bytes), position)

    def expected_bytes(self) -> int:
        return sum(path.stat().st_size for path in self._files())

    def _files(self) -> list[Path]:
        return find_files(str(self.source.path), self.source.split, f"{self.setting}.path")


class _HubDataset(SourceReader):
    """A dataset of the Hugging Face Hub, streamed."""

    def check(self) -> None:
        hub_datasets.dataset_commit(self.source, f"{self.setting}.path")

    def pin(self) -> Source:
        if COMMIT.fullmatch(self.source.revision or ""):
            return self.source  # needs no network
        commit = hub_datasets.dataset_commit(self.source, f"{self.setting}.path")
        return self.source.model_copy(update={"revision": commit})

    def fingerprint(self, fingerprints: Fingerprints) -> str:
        return f"hub {self.source.path} {self.source.revision}"

    def open(self, position: Position | None) -> SourceStream:
        return hub_datasets.HubStream(self.source, self.setting, position)


SOURCE_READERS: dict[str, type[SourceReader]] = {
    "python_docs": _PythonDocs,
    "files": _Files,
    "hub": _HubDataset,
}


class ExampleStream:
    """Every document or conversation of one pinned source, in a fixed order, blank and malformed ones included.

    Args:
        source, purpose, setting, max_record_bytes: as for :class:`SourceReader`.
        position: a value returned by ``position()`` for the same source; the stream resumes there.
    """

    def __init__(
        self, source: Source, purpose: Purpose, setting: str, max_record_bytes: int, position: Position | None = None
    ) -> None:
        self._source, self._purpose, self._setting, self._limit = source, purpose, setting, max_record_bytes
        self._stream = SOURCE_READERS[source.kind](source, purpose, setting, max_record_bytes).open(position)
        # Not after resuming in the middle, where a few malformed records say nothing about the source.
        self._unproven = position is None

    def position(self) -> Position:
        """Returns the position after the last example that was returned."""
        return self._stream.position()

    def __iter__(self) -> Iterator[Example]:
        """Raises UserError if a file is malformed or too large a record is found, or if the first records all are."""
        faults: list[UserError] = []
        try:
            for record in self._stream:
                if isinstance(record, Example):
                    yield record
                    continue
                try:
                    content = self._content_of(record)
                except BadRecord as bad:
                    faults += [bad.error] if self._unproven else []
                    if len(faults) == PROBED_RECORDS:
                        break
                    yield Example("", None, record.file, record.place, bad.reason)
                else:
                    self._unproven &= not content
                    yield Example(content, None, record.file, record.place)
        except BadFile as error:
            raise UserError(
                setting=f"{self._setting}.path",
                value=self._source.path,
                rule=f"{error.location}: {error.rule}",
                remedy=error.remedy or f"Correct that file, or set {self._setting}.path to other files.",
            ) from error
        if faults and self._unproven:
            raise faults[0]

    def _content_of(self, record: Record) -> str | Conversation:
        if self._purpose == "instructions":
            conversation = conversation_from(record, self._setting)
            self._check(record, [message["content"] for message in conversation])
            return conversation
        text = document_from(record, self._source.text_field, self._setting)
        self._check(record, [text])
        return text

    def _check(self, record: Record, texts: Sequence[str]) -> None:
        if sum(map(len, texts)) > self._limit:
            raise Reading((), self._limit).too_large(record.location, "the record")
        # Single NUL characters occur in scraped text.
        if any(ZERO_BLOCK in text or (text and not text.strip("\0")) for text in texts):
            raise BadFile(record.location, "it has a block of zero bytes, as in a file that was only partly written")


class _ListStream:
    """Examples that are all in memory."""

    def __init__(self, examples: list[Example], position: Position | None) -> None:
        self._examples = examples
        self._returned: int = position["examples"] if position else 0

    def __iter__(self) -> Iterator[Example]:
        for example in self._examples[self._returned :]:
            self._returned += 1
            yield example

    def position(self) -> Position:
        return {"examples": self._returned}


# -------------------------------------------------------------------------------- several sources


def setting_name(sources: Sequence[Source], index: int, purpose: Purpose) -> str:
    """Returns the dotted name of a source: ``data.corpus`` for a single one, ``data.corpus.1`` for one of several."""
    return f"data.{purpose}" if len(sources) == 1 else f"data.{purpose}.{index}"


def check_sources(sources: Sequence[Source], purpose: Purpose, max_record_bytes: int) -> None:
    """Checks that every source exists and that its first record is usable, without reading further.

    Raises:
        UserError: a source is missing, unreachable, empty or malformed, or has no column of the configured name.
    """
    for reader in _readers(sources, purpose, max_record_bytes):
        reader.check()


def first_conversations(sources: Sequence[Source], max_record_bytes: int) -> dict[str, list[Conversation]]:
    """Returns the first conversations of every local source, by its dotted name; none of a source that is malformed."""
    found: dict[str, list[Conversation]] = {}
    for reader in _readers(sources, "instructions", max_record_bytes):
        if reader.source.kind == "files":
            with suppress(UserError):  # check_sources reports it
                usable = (e.content for e in reader.examples() if isinstance(e.content, list) and not e.is_blank)
                found[reader.setting] = list(islice(usable, PROBED_CONVERSATIONS))
    return found


def pin_sources(sources: Sequence[Source], purpose: Purpose) -> list[Source]:
    """Resolves revisions on the Hub to commits. A source whose revision is a commit needs no network.

    Raises:
        UserError: the Hub cannot be reached, or has no such dataset or revision.
    """
    return [reader.pin() for reader in _readers(sources, purpose)]


def fingerprint_sources(sources: Sequence[Source], purpose: Purpose, fingerprints: Fingerprints) -> str:
    """Identifies the content of pinned sources, for artifact keys.

    Raises:
        UserError: a source is missing.
    """
    # The order matters, because it determines which of two duplicates in different sources is kept.
    found = [reader.fingerprint(fingerprints) for reader in _readers(sources, purpose)]
    return found[0] if len(found) == 1 else sha256_text("\n".join(found))


def expected_bytes(sources: Sequence[Source], purpose: Purpose) -> list[int]:
    """Returns the approximate size of each source in bytes, for progress bars and estimates, or 0 if unknown."""
    return [reader.expected_bytes() for reader in _readers(sources, purpose)]


def _readers(
    sources: Sequence[Source], purpose: Purpose, max_record_bytes: int = sys.maxsize
) -> Iterator[SourceReader]:
    for index, source in enumerate(sources):
        name = setting_name(sources, index, purpose)
        yield SOURCE_READERS[source.kind](source, purpose, name, max_record_bytes)
