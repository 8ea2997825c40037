"""Several sources as one, in the shares of their weights.

A source's share of the training tokens is its weight over the sum of all weights. The next document comes from the
source that is furthest behind its share, so that the shares hold to within a document at every point. Reading ends at
the token budget, or where the first source runs out: the shares would no longer hold if the others were read on, and
none is read twice. A source with a split of its own is then read on for its held-out part alone.

Replay of general text against forgetting is such a source, with a small weight.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from pipeline.data.blocks import Ids
from pipeline.data.files import Position
from pipeline.data.sources import Example, ExampleStream


class Items(Protocol):
    """One source's examples, with their ids where these are found ahead."""

    def __iter__(self) -> Iterator[tuple[Example, Ids | None]]: ...

    def position(self) -> Position:
        """Behind the example that was given last."""


class Unencoded:
    """Examples as they are, for those whose ids are found when it is their turn."""

    def __init__(self, stream: ExampleStream) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[tuple[Example, None]]:
        return ((example, None) for example in self._stream)

    def position(self) -> Position:
        """Behind the example that was given last."""
        return {"stream": self._stream.position()}


@dataclass
class Part:
    """One source of a mixture, and what came from it so far."""

    items: Items
    weight: float
    has_split: bool  # of its own
    documents: Counter[str] = field(default_factory=Counter)  # by split
    tokens: Counter[str] = field(default_factory=Counter)  # by split
    dropped: Counter[str] = field(default_factory=Counter)  # by reason
    ran_out: bool = False

    def count(self, split: str, tokens: int) -> None:
        """One more document was kept."""
        self.documents[split] += 1
        self.tokens[split] += tokens

    def counts(self) -> dict[str, Any]:
        """What came from it, as JSON values."""
        return {name: dict(sorted(getattr(self, name).items())) for name in COUNTS}

    def state(self) -> dict[str, Any]:
        """Where it stands, as JSON values."""
        return {"position": self.items.position(), "ran_out": self.ran_out, **self.counts()}

    def restore(self, state: dict[str, Any]) -> None:
        """The counts of an earlier part; its items were opened at that state's position."""
        self.ran_out = state["ran_out"]
        for name in COUNTS:
            setattr(self, name, Counter(state[name]))


COUNTS = ("documents", "tokens", "dropped")


class Mixture:
    """The examples of several parts in turn, each with its part's number; whoever takes it counts it there.

    Args:
        budget: training tokens after which reading ends.
    """

    def __init__(self, parts: Sequence[Part], budget: int | None) -> None:
        self.parts, self._budget = parts, budget

    def __iter__(self) -> Iterator[tuple[int, Example, Ids | None]]:
        iterators = [iter(part.items) for part in self.parts]
        while not (self.is_full() or any(part.ran_out for part in self.parts)):
            number = min(range(len(self.parts)), key=self._share_filled)
            item = next(iterators[number], None)
            if item is None:
                self.parts[number].ran_out = True
            else:
                yield (number, *item)
        for number, iterator in enumerate(iterators):
            if self.parts[number].has_split:
                yield from ((number, *item) for item in iterator if item[0].split == "held_out")

    @property
    def training_tokens(self) -> int:
        """Of all parts."""
        return sum(part.tokens["train"] for part in self.parts)

    def is_full(self) -> bool:
        """Whether the budget is met."""
        return self._budget is not None and self.training_tokens >= self._budget

    def total(self, name: str) -> Counter[str]:
        """One of ``COUNTS`` over all parts."""
        return sum((getattr(part, name) for part in self.parts), Counter())

    def _share_filled(self, number: int) -> float:
        part = self.parts[number]
        return part.tokens["train"] / part.weight
