"""Instruction pairs made from the standard library's docstrings: what X does, which function does Y.

None asks for a signature: a small model that is taught some of them answers others with ``*, *, *`` without end.
Only taught modules give pairs to train on; those of held-out modules are the held-out prompts. Asked modules give none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from hashlib import sha256

from pipeline.data.python_docs import Entry, entries
from pipeline.data.records import Conversation, turn

DESCRIBE = (
    "What does {name} do in Python?",
    "Explain what {name} does.",
    "Tell me in one sentence what Python's {name} is for.",
    "I found {name} in some Python code. What does it do?",
)
FIND = (
    "Which {kind} in Python's {module} module is described like this? {summary}",
    "Name the {kind} of the {module} module that fits this description: {summary}",
    'In the Python standard library, what is the {kind} in {module} documented as "{summary}"?',
)


def pairs(held_out: bool) -> list[Conversation]:
    """All pairs of the held-out modules; or of the taught ones, as far as they name nothing else. In a fixed order."""
    wanted = "held_out" if held_out else "taught"
    found = [pair for entry in entries() if entry.part == wanted for pair in _pairs_of(entry)]
    if held_out:
        return found
    others = {entry.name for entry in entries() if entry.part != "taught" and entry.kind != "module"}
    return [pair for pair in found if others.isdisjoint(_names_in(pair))]


def _names_in(pair: Conversation) -> set[str]:
    found = re.findall(r"[\w.]+", " ".join(message["content"] for message in pair))
    return {name.strip(".") for name in found}


def _pairs_of(entry: Entry) -> Iterator[Conversation]:
    if entry.is_telling:
        yield turn(_phrase(DESCRIBE, entry), entry.summary)
        if entry.kind != "module":
            yield turn(_phrase(FIND, entry), entry.name)


def _phrase(phrasings: tuple[str, ...], entry: Entry) -> str:
    """One of the phrasings, chosen by the entry's name."""
    choice = int(sha256(f"{phrasings[0]}{entry.name}".encode()).hexdigest(), 16) % len(phrasings)
    return phrasings[choice].format(name=entry.name, kind=entry.kind, module=entry.module, summary=entry.summary)
