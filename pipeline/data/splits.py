"""Deduplicates examples and assigns each of them to a split.

The split depends only on the content. Unless the source has predefined splits, an example is held out if its 64-bit
hash is among the lowest ``held_out_fraction`` of all hash values. Of the others, and of those that a source's own
splits would train on, those with the next ``validation_fraction`` of all hash values are for validation. Whitespace
around a document is ignored. For a conversation the hash is that of its prompt (the first message that is not of the
system or the developer), so that all answers to a prompt are in the same split. If the source has groups of examples,
the hash is that of the group. The hashes of all examples that are kept are remembered across sources, so that no
example occurs twice, within a split or across splits.
"""

from __future__ import annotations

import hashlib
import json
from array import array

from pipeline.config.data import SPLITS, Split
from pipeline.data.records import Conversation, Drops, Example

INITIAL_SLOTS = 1024
HASH_VALUES = 2**64


class Deduplicator:
    """Drops blank and repeated examples, and assigns a split to every other one.

    Args:
        held_out_fraction: fraction of examples to hold out, for sources without predefined splits.
        validation_fraction: fraction of examples for validation, in addition.
        hashes: hashes that an earlier deduplicator remembered, to resume from.

    Attributes:
        new_hashes: hashes remembered since this array was last emptied by the caller.
    """

    def __init__(
        self, held_out_fraction: float, hashes: array[int] | None = None, validation_fraction: float = 0.0
    ) -> None:
        self._held_out = held_out_fraction * HASH_VALUES
        self._validation = (held_out_fraction + validation_fraction) * HASH_VALUES
        self._seen = HashSet()
        for value in hashes or ():
            self._seen.add(value)
        self.new_hashes = array("Q")

    def assign(self, example: Example, dropped: Drops) -> Split | None:
        """Returns the split of an example, or None if it is dropped. The reason is then counted in ``dropped``."""
        try:
            return self._assign(example, dropped)
        except UnicodeEncodeError:  # a lone surrogate, which JSON can represent and UTF-8 cannot
            return _drop(dropped, "invalid_unicode", example)

    def _assign(self, example: Example, dropped: Drops) -> Split | None:
        content = example.content
        if example.fault is not None:
            return _drop(dropped, example.fault, example)
        if example.is_blank:
            return _drop(dropped, "blank", example)
        content_hash = _hash(content.strip() if isinstance(content, str) else json.dumps(content, ensure_ascii=False))
        if content_hash in self._seen:
            return _drop(dropped, "duplicate", example)
        split = self._split(example, content_hash)
        if isinstance(content, list):
            # Two sources may disagree on a prompt if one of them has predefined splits. The first one wins.
            others = (other for other in SPLITS if other != split)
            if any(_hash(f"{other} {_prompt(content)}") in self._seen for other in others):
                return _drop(dropped, "prompt_in_other_split", example)
            self._remember(_hash(f"{split} {_prompt(content)}"))
        self._remember(content_hash)
        return split

    def _split(self, example: Example, content_hash: int) -> Split:
        content = example.content
        if example.group is not None:
            split_hash = _hash(example.group)
        else:
            split_hash = content_hash if isinstance(content, str) else _hash(_prompt(content))
        if example.split is None and split_hash < self._held_out:
            return "held_out"
        if example.split in (None, "train"):
            return "validation" if self._held_out <= split_hash < self._validation else "train"
        return example.split

    def _remember(self, value: int) -> None:
        if value not in self._seen:
            self._seen.add(value)
            self.new_hashes.append(value)


class HashSet:
    """A set of 64-bit hashes in a flat table with linear probing.

    It takes 12 to 24 bytes per hash, and 36 while it grows. A Python set takes about 80. The probability that any two
    different examples have the same hash is 2^-65 times the square of their number, which is 3e-4 for 10^8. The second
    one would be dropped as a duplicate.
    """

    def __init__(self) -> None:
        self._slots = array("Q", bytes(8 * INITIAL_SLOTS))  # 0 marks an empty slot
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, value: int) -> bool:
        return self._slots[self._find(value or 1)] != 0

    def add(self, value: int) -> None:
        """Adds a hash if it is not in the set."""
        value = value or 1  # 0 marks an empty slot; treating it as 1 is just another improbable collision
        slot = self._find(value)
        if self._slots[slot]:
            return
        self._slots[slot] = value
        self._count += 1
        if 3 * self._count > 2 * len(self._slots):  # probing slows down quickly above two thirds
            self._grow()

    def _find(self, value: int) -> int:
        """Returns the slot that holds the value, or the empty slot in which it belongs."""
        slots, last = self._slots, len(self._slots) - 1
        slot = value & last  # the number of slots is a power of two
        while slots[slot] and slots[slot] != value:
            slot = (slot + 1) & last
        return slot

    def _grow(self) -> None:
        old, self._slots = self._slots, array("Q", bytes(16 * len(self._slots)))
        for value in old:
            if value:
                self._slots[self._find(value)] = value


def _prompt(conversation: Conversation) -> str:
    prompts = (message["content"] for message in conversation if message["role"] not in ("system", "developer"))
    return next(prompts, "").strip()


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest()[:8], "big")


def _drop(dropped: Drops, reason: str, example: Example) -> Split | None:
    dropped.add(reason, example.location)
    return None
