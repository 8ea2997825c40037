"""Which documents are kept, and on which side: training or held out, never both.

A side follows from content alone: where the source has no split of its own, the 64-bit hash of a document, white space
around it aside, is below ``held_out_fraction`` of all hashes or not. For a conversation it is the hash of its prompt
(the first message that is not the system's), so that one prompt with several answers stands on one side. What was
placed is remembered by hash over all sources, so nothing comes twice, be it on one side or on both.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter

from pipeline.data.records import Conversation
from pipeline.data.sources import Example, Split

FIRST_SLOTS = 1024
HASHES = 2**64


class HashSet:
    """64-bit hashes in one flat table: 12 to 24 bytes each, 36 while it grows; Python's own set takes about 80.

    Two different documents fall together with a chance of 2^-65 times the square of their number, 3e-4 for 10^8; the
    second would be dropped as a repeat.
    """

    def __init__(self) -> None:
        self._slots = array("Q", bytes(8 * FIRST_SLOTS))  # 0 is an empty one
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, value: int) -> bool:
        return self._slots[self._slot_of(value or 1)] != 0

    def add(self, value: int) -> None:
        """Adds a hash, whether it is there or not."""
        value = value or 1
        slot = self._slot_of(value)
        if self._slots[slot]:
            return
        self._slots[slot] = value
        self._count += 1
        if 3 * self._count > 2 * len(self._slots):
            self._grow()

    def _slot_of(self, value: int) -> int:
        """Where the value is or would go: the first free slot from its lowest bits on."""
        slots, last = self._slots, len(self._slots) - 1
        slot = value & last
        while slots[slot] and slots[slot] != value:
            slot = (slot + 1) & last
        return slot

    def _grow(self) -> None:
        old, self._slots = self._slots, array("Q", bytes(16 * len(self._slots)))
        for value in old:
            if value:
                self._slots[self._slot_of(value)] = value


class Sieve:
    """Drops blanks, repeats and what the other side has, and gives every other example its side.

    Args:
        held_out_fraction: of the documents, where their source has no split of its own.
        remembered: the hashes of what an earlier sieve let through, to go on from there.
    """

    def __init__(self, held_out_fraction: float, remembered: array[int] | None = None) -> None:
        self._fraction = held_out_fraction
        self._seen = HashSet()
        for value in remembered or ():
            self._seen.add(value)
        self.news = array("Q")  # hashes remembered since somebody last emptied this

    def place(self, example: Example, dropped: Counter[str]) -> Split | None:
        """The example's side, or None where it is dropped; why is counted."""
        try:
            return self._place(example, dropped)
        except UnicodeEncodeError:  # half of a surrogate pair, as JSON can spell it
            return _drop(dropped, "invalid_unicode")

    def _place(self, example: Example, dropped: Counter[str]) -> Split | None:
        content = example.content
        if example.is_blank:
            return _drop(dropped, "blank")
        whole = _hash(content.strip() if isinstance(content, str) else json.dumps(content, ensure_ascii=False))
        if whole in self._seen:
            return _drop(dropped, "duplicate")
        decisive = whole if isinstance(content, str) else _hash(_prompt(content))
        split = example.split or ("held_out" if decisive < self._fraction * HASHES else "train")
        if isinstance(content, list):
            other = "train" if split == "held_out" else "held_out"
            if _hash(f"{other} {_prompt(content)}") in self._seen:
                return _drop(dropped, "prompt_on_the_other_side")
            self._remember(_hash(f"{split} {_prompt(content)}"))
        self._remember(whole)
        return split

    def _remember(self, value: int) -> None:
        if value not in self._seen:
            self._seen.add(value)
            self.news.append(value)


def _prompt(conversation: Conversation) -> str:
    return next((message["content"] for message in conversation if message["role"] != "system"), "").strip()


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest()[:8], "big")


def _drop(dropped: Counter[str], reason: str) -> Split | None:
    dropped[reason] += 1
    return None
