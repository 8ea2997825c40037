"""Where documents and conversations come from, whatever they are stored as. No torch.

``check_source`` and ``fingerprint`` are for the driver: cheap, before anything starts. ``examples`` streams all of it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from pipeline.artifact import Fingerprints
from pipeline.config import Source
from pipeline.data import hub_datasets, instruction_pairs, python_docs
from pipeline.data.conversations import Conversation, conversation_of
from pipeline.data.documents import text_of
from pipeline.data.files import BadFile, Record, find_files, read_records
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


# ---------------------------------------------------------------------------------- for the driver


def check_source(source: Source, purpose: Purpose) -> None:
    """The source is there and its first record is what it should be; no more than that is read.

    Raises:
        UserError: missing, unreachable, empty, not text, not JSON, or without the column named.
    """
    if source.kind == "hub":
        hub_datasets.dataset_commit(source, f"data.{purpose}.path")
    elif source.kind == "files" and next(examples(source, purpose), None) is None:
        raise _empty(source, purpose)


def fingerprint(source: Source, purpose: Purpose, fingerprints: Fingerprints) -> str:
    """The source's content identity: what it enters an artifact's key by.

    Raises:
        UserError: it is not there or cannot be reached.
    """
    if source.kind == "python_docs":
        return python_docs.fingerprint()
    if source.kind == "hub":
        return f"hub {source.path} {pin(source, purpose).revision}"
    return f"files {fingerprints.of_files(find_files(str(source.path), f'data.{purpose}.path'))}"


def pin(source: Source, purpose: Purpose) -> Source:
    """The source with its hub revision resolved to a commit; one that names a commit already needs no network.

    Raises:
        UserError: the hub cannot be reached, or has no such data set or revision.
    """
    if source.kind != "hub" or COMMIT.fullmatch(source.revision or ""):
        return source
    return source.model_copy(update={"revision": hub_datasets.dataset_commit(source, f"data.{purpose}.path")})


def interpreter_fingerprint() -> str:
    """The identity of this CPython's own documentation, from which the bundled questions are made."""
    return python_docs.fingerprint()


# ------------------------------------------------------------------------------------- for tokenize


def examples(source: Source, purpose: Purpose) -> Iterator[Example]:
    """Streams every non-empty document or conversation of a pinned source, in a fixed order.

    Raises:
        UserError: a file is not text, a line is not JSON, a column or role is not there; with file and line.
    """
    if source.kind == "python_docs":
        yield from _python_docs(purpose)
        return
    setting = f"data.{purpose}"
    try:
        for record in _records(source, setting):
            if purpose == "instructions":
                yield Example(conversation_of(record, setting), None)
            elif (text := text_of(record, source.text_field, setting)).strip():
                yield Example(text, None)
    except BadFile as error:
        raise UserError(
            setting=f"{setting}.path",
            value=source.path,
            rule=f"{error.where}: {error.rule}",
            remedy="Correct that file, or name others.",
        ) from error


def _python_docs(purpose: Purpose) -> Iterator[Example]:
    contents = python_docs.documents if purpose == "corpus" else instruction_pairs.pairs
    for split in SPLITS:
        for content in contents(held_out=split == "held_out"):
            yield Example(content, split)


def _records(source: Source, setting: str) -> Iterator[Record]:
    if source.kind == "hub":
        yield from hub_datasets.stream_dataset(source, f"{setting}.path")
        return
    for path in find_files(str(source.path), f"{setting}.path"):
        yield from read_records(path)


def expected_bytes(source: Source, purpose: Purpose) -> int:
    """About how many bytes ``examples`` will bring, for a progress bar; 0 where nobody knows."""
    if source.kind == "files":
        return sum(path.stat().st_size for path in find_files(str(source.path), f"data.{purpose}.path"))
    if source.kind == "python_docs":
        return sum(content_bytes(example.content) for example in _python_docs(purpose))
    return 0


def content_bytes(content: str | Conversation) -> int:
    """UTF-8 bytes of a document or of a conversation's messages."""
    texts = [content] if isinstance(content, str) else [message["content"] for message in content]
    return sum(len(text.encode()) for text in texts)


def with_split(
    found: Iterable[Example], held_out_fraction: float, dropped: Counter[str]
) -> Iterator[tuple[Split, Example]]:
    """Drops exact repeats and gives every example its split; where the source says none, by hash.

    The hash is of the document, or of a conversation's first message that is not the system's, so that one prompt
    with several answers stands on one side.

    Args:
        held_out_fraction: of the documents.
        dropped: counts what is dropped, by reason.
    """
    seen: set[bytes] = set()
    for example in found:
        try:
            whole = _digest(_canonical(example.content))
        except UnicodeEncodeError:  # half of a surrogate pair, as JSON can spell it
            dropped["invalid_unicode"] += 1
            continue
        if whole in seen:
            dropped["duplicate"] += 1
            continue
        seen.add(whole)
        yield example.split or _split_by_hash(example.content, held_out_fraction), example


def _split_by_hash(content: str | Conversation, held_out_fraction: float) -> Split:
    if isinstance(content, list):
        content = next((message["content"] for message in content if message["role"] != "system"), "")
    share = int.from_bytes(_digest(content.strip())[:8], "big") / 2**64
    return "held_out" if share < held_out_fraction else "train"


def _canonical(content: str | Conversation) -> str:
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _empty(source: Source, purpose: Purpose) -> UserError:
    return UserError(
        setting=f"data.{purpose}.path",
        value=source.path,
        rule=f"it is empty: it holds not one {'document' if purpose == 'corpus' else 'conversation'}",
        remedy=f"Set data.{purpose}.path to something with content.",
    )
