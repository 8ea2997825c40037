"""The embedded corpus ``python_docs``: what every CPython carries about itself, split so that nothing leaks.

Documents are rendered as pydoc prints them: qualified name, signature, docstring; one document a module with its
functions, one a class with its methods, one a topic of ``pydoc_data``. The text depends on the CPython build alone.

One split by top-level module, fixed by hash, governs corpus, instruction pairs and questions:

    taught    in the corpus and in the instruction pairs
    asked     in the corpus, never in the pairs: the multiple-choice questions are about these
    held_out  in neither: held-out perplexity and held-out prompts

The doors by which text could pass from one part to another are closed here: a re-exported object belongs to the module
that defines it (``stdlib_harvest``); a docstring that occurs twice stays where it comes first in the order above; a
held-out docstring that shares 13 words in a row with the corpus is dropped (the overlap that the GPT-3 paper uses,
arXiv 2005.14165, appendix C); so are a topic's paragraphs that name a held-out module.
"""

from __future__ import annotations

import functools
import json
import platform
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Literal

from pipeline.data import stdlib_harvest

VERSION = 2  # raise it when the same CPython would give other documents, pairs or questions
SPLIT_SALT = "4"
TAUGHT_PERCENT, ASKED_PERCENT = 60, 25  # of the top-level modules; the rest is held out

Part = Literal["taught", "asked", "held_out"]
PARTS: tuple[Part, ...] = ("taught", "asked", "held_out")

MEMBER_KINDS = ("method", "attribute")

# Written by type machinery, not by a person.
GENERATED_DOC = re.compile(r"Initialize self\.|Alias for field number|structure/union member|An enumeration\.?$")
SIGNATURE_LINE = re.compile(r"[\w.]+\([^\n]*\)(\s*->[^\n]*)?$")
SHORTEST_DOC_WORDS = 3
SHORTEST_SUMMARY_WORDS, LONGEST_SUMMARY = 4, 300  # words, characters
SHORTEST_TOPIC_WORDS = 15
SHORTEST_UNIQUE_PARAGRAPH = 60  # characters; below it a topic's paragraphs may repeat, most are lines of code


@dataclass(frozen=True)
class Entry:
    """One documented thing of the standard library."""

    name: str  # qualified: "json.dumps", "json.JSONDecoder.decode", "json"
    kind: Literal["module", "class", "function", "method", "attribute"]
    module: str
    signature: str | None  # "(obj, *, skipkeys=False)"
    doc: str

    @property
    def part(self) -> Part:
        """The part of the split that its top-level module is in."""
        return part_of(self.module)

    @functools.cached_property
    def summary(self) -> str:
        """The docstring's first sentence on one line, without the signature that C functions put before it."""
        paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", self.doc)]
        if len(paragraphs) > 1 and SIGNATURE_LINE.match(paragraphs[0]):
            paragraphs = paragraphs[1:]
        else:
            paragraphs[0] = re.sub(r"^[\w.]+\([^)]*\)\s*(->\s*\S.*?|--|:)\s+(?=[A-Z])", "", paragraphs[0])
        return re.split(r"(?<=[.!?])\s+(?=[A-Z`*:])", paragraphs[0])[0]

    @property
    def is_telling(self) -> bool:
        """Whether the summary is a sentence about the thing, and neither long nor a mere signature."""
        long_enough = len(words(self.summary)) >= SHORTEST_SUMMARY_WORDS
        return long_enough and len(self.summary) <= LONGEST_SUMMARY and not SIGNATURE_LINE.match(self.summary)


def fingerprint() -> str:
    """Content identity, found without importing anything: generator, exact CPython, the modules it was built with."""
    present = [name for name in sorted(sys.stdlib_module_names) if name in sys.modules or find_spec(name) is not None]
    modules = sha256(" ".join(present).encode()).hexdigest()[:16]
    interpreter = f"{platform.python_implementation()} {platform.python_version()} {sys.platform}"
    return f"python_docs/{VERSION} {interpreter} {modules}"


def part_of(module: str) -> Part:
    """The part of a module's family; the same for every Python version."""
    family = stdlib_harvest.family_of(module)
    percent = int(sha256(f"{SPLIT_SALT}{family}".encode()).hexdigest(), 16) % 100
    if percent < TAUGHT_PERCENT:
        return "taught"
    return "asked" if percent < TAUGHT_PERCENT + ASKED_PERCENT else "held_out"


@functools.cache
def entries() -> tuple[Entry, ...]:
    """Every documented thing, each docstring once, held-out ones free of overlap with the corpus. In a fixed order."""
    unique = list(_without_repeats(_harvest()))
    seen_in_training = Text([*(entry.doc for entry in unique if entry.part != "held_out"), *topics().values()])
    return tuple(entry for entry in unique if entry.part != "held_out" or not seen_in_training.shares(entry.doc))


def _harvest() -> list[Entry]:
    script = str(Path(stdlib_harvest.__file__))
    answer = subprocess.run([sys.executable, "-I", "-S", "-B", script], stdout=subprocess.PIPE, check=True)
    return [Entry(**fields) for fields in json.loads(answer.stdout)]


def _without_repeats(found: list[Entry]) -> Iterator[Entry]:
    """The first of every docstring, taught before asked before held out."""
    seen: set[str] = set()
    for entry in sorted(found, key=lambda entry: PARTS.index(entry.part)):
        plain = " ".join(words(entry.doc))
        if plain.count(" ") + 1 < SHORTEST_DOC_WORDS or GENERATED_DOC.match(entry.doc) or plain in seen:
            continue
        seen.add(plain)
        yield entry


def askable() -> list[Entry]:
    """Asked entries whose docstring and summary share no 13 words in a row with a taught one, and stand in none."""
    taught = Text(entry.doc for entry in entries() if entry.part == "taught")
    asked = (entry for entry in entries() if entry.part == "asked")
    return [entry for entry in asked if not taught.shares(entry.doc) and not taught.shares(entry.summary)]


# ---------------------------------------------------------------------------------------- documents


def documents(held_out: bool) -> list[str]:
    """The corpus (taught and asked modules, then topics), or its held-out part."""
    chosen = [entry for entry in entries() if (entry.part == "held_out") == held_out]
    by_module = sorted(chosen, key=lambda entry: entry.module)  # stable: the order within a module stays
    modules = [text for _, group in groupby(by_module, lambda entry: entry.module) for text in _render(list(group))]
    return modules if held_out else [*modules, *topics().values()]


def _render(module: list[Entry]) -> Iterator[str]:
    """A module's own document, with its functions and small classes, then one a class that has documented members."""
    members = [entry for entry in module if entry.kind in MEMBER_KINDS]
    owners = {entry.name.rpartition(".")[0] for entry in members}
    alone = [entry for entry in module if entry.kind not in MEMBER_KINDS and entry.name not in owners]
    if alone:
        yield "\n\n".join(map(_paragraph, alone)) + "\n"
    heads = {entry.name: entry for entry in module}
    for owner, group in groupby(members, lambda entry: entry.name.rpartition(".")[0]):
        head = [heads[owner]] if owner in heads else []
        yield "\n\n".join(map(_paragraph, [*head, *group])) + "\n"


def _paragraph(entry: Entry) -> str:
    word = f"{entry.kind} " if entry.kind in ("module", "class") else ""
    return f"{word}{entry.name}{entry.signature or ''}\n{textwrap.indent(entry.doc, '    ')}"


@functools.cache
def topics() -> dict[str, str]:
    """The language reference by topic, each paragraph once, without paragraphs that name a held-out module.

    The longest topics come first: the chapters, of which most others are sections.
    """
    from pydoc_data.topics import topics as all_topics

    naming_held_out = _held_out_name()
    seen: set[str] = set()
    kept = {}
    for name, text in sorted(all_topics.items(), key=lambda item: (-len(item[1]), item[0])):
        paragraphs = [part for part in text.strip().split("\n\n") if not naming_held_out.search(part)]
        rest = "\n\n".join(_new_paragraphs(paragraphs, seen))
        if len(words(rest)) >= SHORTEST_TOPIC_WORDS:
            kept[name] = rest + "\n"
    return kept


def _new_paragraphs(paragraphs: Iterable[str], seen: set[str]) -> Iterator[str]:
    keep = True
    for paragraph in paragraphs:
        if len(paragraph) >= SHORTEST_UNIQUE_PARAGRAPH:
            plain = " ".join(words(paragraph))
            keep = plain not in seen
            seen.add(plain)
        if keep:
            yield paragraph


def _held_out_name() -> re.Pattern[str]:
    """Matches ``"csv"``, ``"csv.reader()"``, ``csv.reader`` and ``import csv`` for every held-out module."""
    names = "|".join(name for name in stdlib_harvest.public_modules() if part_of(name) == "held_out")
    return re.compile(rf'"({names})["(]|(?<![\w.])({names})\.\w|\b(import|from) ({names})\b')


# --------------------------------------------------------------------------------------------------
# Whether a text repeats another one: by words, so that case, markup and line breaks do not hide it.

OVERLAP_WORDS = 13  # in a row
WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """The text's words in lower case."""
    return WORD.findall(text.lower())


class Text:
    """Texts that others must not repeat.

    Args:
        texts: what is known; kept as words in memory.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        known = [words(text) for text in texts]
        self._runs = {run for text in known for run in _runs(text)}
        self._all = "\n".join(f" {' '.join(text)} " for text in known)

    def shares(self, text: str) -> bool:
        """Whether ``text`` has 13 words in a row in common with one of the texts, or all of its words if fewer."""
        found = words(text)
        if len(found) < OVERLAP_WORDS:
            return f" {' '.join(found)} " in self._all
        return not self._runs.isdisjoint(_runs(found))


def _runs(found: list[str]) -> Iterable[int]:
    """Hashes of all runs of 13 words; good within one process, and a collision only drops a text too many."""
    return (hash(tuple(found[start : start + OVERLAP_WORDS])) for start in range(len(found) - OVERLAP_WORDS + 1))
