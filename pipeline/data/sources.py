"""Where documents and conversations come from, whatever they are stored as. No torch.

``check``, ``pin`` and ``fingerprint`` are for the driver: cheap, before anything starts. ``ExampleStream`` is all of
one source.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Literal, Protocol

from pipeline.artifacts.store import Fingerprints
from pipeline.config import Source
from pipeline.data import hub_datasets, instruction_pairs, python_docs
from pipeline.data.files import BadFile, FileStream, Position, Record, find_files
from pipeline.data.records import Conversation, conversation_of, text_of
from pipeline.errors import UserError

Purpose = Literal["corpus", "instructions"]
Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "held_out")
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Example:
    """One document (corpus) or conversation (instructions)."""

    content: str | Conversation
    split: Split | None  # where the source has a split of its own

    @property
    def is_blank(self) -> bool:
        """Whether there is nothing but white space in it."""
        texts = [self.content] if isinstance(self.content, str) else [message["content"] for message in self.content]
        return not any(text.strip() for text in texts)


def setting_of(sources: Sequence[Source], number: int, purpose: Purpose) -> str:
    """The dotted name of a source: ``data.corpus`` where it is the only one, ``data.corpus.1`` where it is not."""
    return f"data.{purpose}" if len(sources) == 1 else f"data.{purpose}.{number}"


# ---------------------------------------------------------------------------------- for the driver


def check(sources: Sequence[Source], purpose: Purpose) -> None:
    """Every source is there and its first record is what it should be; no more than that is read.

    Raises:
        UserError: missing, unreachable, empty, not text, not JSON, or without the column named.
    """
    for number, source in enumerate(sources):
        setting = setting_of(sources, number, purpose)
        if source.kind == "hub":
            hub_datasets.dataset_commit(source, f"{setting}.path")
        elif source.kind == "files" and all(example.is_blank for example in ExampleStream(source, purpose, setting)):
            raise UserError(
                setting=f"{setting}.path",
                value=source.path,
                rule=f"it is empty: it holds not one {'document' if purpose == 'corpus' else 'conversation'}",
                remedy=f"Set {setting}.path to something with content.",
            )


def fingerprint(sources: Sequence[Source], purpose: Purpose, fingerprints: Fingerprints) -> str:
    """The content identity of pinned sources: what they enter an artifact's key by.

    Raises:
        UserError: one is not there.
    """
    found = []
    for number, source in enumerate(sources):
        if source.kind == "python_docs":
            found.append(python_docs.fingerprint())
        elif source.kind == "hub":
            found.append(f"hub {source.path} {source.revision}")
        else:
            files = find_files(str(source.path), f"{setting_of(sources, number, purpose)}.path")
            found.append(f"files {fingerprints.of_files(files)}")
    return found[0] if len(found) == 1 else sha256("\n".join(found).encode()).hexdigest()


def pin(sources: Sequence[Source], purpose: Purpose) -> list[Source]:
    """The sources with hub revisions resolved to commits; one that names a commit already needs no network.

    Raises:
        UserError: the hub cannot be reached, or has no such data set or revision.
    """
    return [_pin(source, setting_of(sources, number, purpose)) for number, source in enumerate(sources)]


def _pin(source: Source, setting: str) -> Source:
    if source.kind != "hub" or COMMIT.fullmatch(source.revision or ""):
        return source
    return source.model_copy(update={"revision": hub_datasets.dataset_commit(source, f"{setting}.path")})


def interpreter_fingerprint() -> str:
    """The identity of this CPython's own documentation, from which the bundled questions are made."""
    return python_docs.fingerprint()


# ------------------------------------------------------------------------------------- for tokenize


class _Stream(Protocol):
    """Records or examples in a fixed order, and where it stands between two of them."""

    def __iter__(self) -> Iterator[Record | Example]: ...

    def position(self) -> Position: ...


class ExampleStream:
    """Every document or conversation of one pinned source, in a fixed order, blank ones too.

    Args:
        setting: the source's dotted name, ``data.corpus``.
        position: what ``position()`` said of an earlier stream of the same source: it goes on there.
    """

    def __init__(self, source: Source, purpose: Purpose, setting: str, position: Position | None = None) -> None:
        self._source, self._purpose, self._setting = source, purpose, setting
        self._records = self._open(position)

    def _open(self, position: Position | None) -> _Stream:
        if self._source.kind == "python_docs":
            return _EmbeddedStream(self._purpose, position)
        if self._source.kind == "hub":
            return hub_datasets.HubStream(self._source, self._setting, position)
        return FileStream(find_files(str(self._source.path), f"{self._setting}.path"), position)

    def position(self) -> Position:
        """Behind the example that was given last."""
        return self._records.position()

    def __iter__(self) -> Iterator[Example]:
        """Raises UserError where a file is not text, a line not JSON, or a column or role is not there."""
        try:
            for record in self._records:
                yield record if isinstance(record, Example) else self._example_of(record)
        except BadFile as error:
            raise UserError(
                setting=f"{self._setting}.path",
                value=self._source.path,
                rule=f"{error.where}: {error.rule}",
                remedy="Correct that file, or name others.",
            ) from error

    def _example_of(self, record: Record) -> Example:
        if self._purpose == "instructions":
            return Example(conversation_of(record, self._setting), None)
        return Example(text_of(record, self._source.text_field, self._setting), None)


class _EmbeddedStream:
    """What ``python_docs`` has for a purpose, training part first."""

    def __init__(self, purpose: Purpose, position: Position | None) -> None:
        self._contents = python_docs.documents if purpose == "corpus" else instruction_pairs.pairs
        self._given: int = position["examples"] if position else 0

    def __iter__(self) -> Iterator[Example]:
        found = [
            Example(content, split) for split in SPLITS for content in self._contents(held_out=split == "held_out")
        ]
        for example in found[self._given :]:
            self._given += 1
            yield example

    def position(self) -> Position:
        return {"examples": self._given}


def expected_bytes(source: Source, purpose: Purpose, setting: str) -> int:
    """About how many bytes a source will bring, for a progress bar; 0 where nobody knows."""
    if source.kind == "files":
        return sum(path.stat().st_size for path in find_files(str(source.path), f"{setting}.path"))
    if source.kind == "python_docs":
        return sum(content_bytes(example.content) for example in ExampleStream(source, purpose, setting))
    return 0


def content_bytes(content: str | Conversation) -> int:
    """UTF-8 bytes of a document or of a conversation's messages."""
    texts = [content] if isinstance(content, str) else [message["content"] for message in content]
    return sum(len(text.encode("utf-8", "replace")) for text in texts)
