"""Whether a text repeats another one: by words, so that case, markup and line breaks do not hide it."""

from __future__ import annotations

import re
from collections.abc import Iterable

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
