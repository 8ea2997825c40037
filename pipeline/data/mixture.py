"""Several sources as one, in the shares of their weights.

A source's share of the training tokens is its weight over the sum of all weights. The next document comes from the
source that is furthest behind its share, so that the shares hold to within a document at every point. Reading ends at
the token budget, or where the first source runs out: the shares would no longer hold if the others were read on, and
none is read twice. A source with a split of its own is then read on for its held-out part alone.

Replay of general text against forgetting is such a source, with a small weight.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

from pipeline.data.blocks import Ids
from pipeline.data.files import Position
from pipeline.data.sources import Example, ExampleStream
from pipeline.data.tokenizer import Encoders


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


# --------------------------------------------------------------------------------------------------
# One source's examples with their token ids: read and tokenized some batches ahead of whoever takes them.

BATCH_DOCUMENTS = 256
BATCH_CHARACTERS = 2**20


@dataclass(frozen=True)
class Batch:
    """Examples on their way through the encoders."""

    before: Position  # the stream's, before the first of them
    examples: list[Example]
    ids: Future[list[Ids]]


class Lookahead:
    """Documents with their ids, in the order of the stream.

    Args:
        position: what ``position()`` said of an earlier one: it goes on there.
    """

    def __init__(self, stream: ExampleStream, encoders: Encoders, position: Position | None = None) -> None:
        self._stream, self._encoders = stream, encoders
        self._skip: int = position["taken"] if position else 0
        self._before: Position | None = None
        self._taken = 0

    def __iter__(self) -> Iterator[tuple[Example, Ids]]:
        for batch in self._ahead():
            self._before, self._taken = batch.before, 0
            for example, ids in zip(batch.examples, batch.ids.result(), strict=True):
                self._taken += 1
                yield example, ids

    def position(self) -> Position:
        """Behind the example that was given last, however much was read ahead."""
        before = self._before
        return {"stream": before or self._stream.position(), "taken": self._taken if before else self._skip}

    def _ahead(self) -> Iterator[Batch]:
        """Batches, each when more than enough to keep all processes busy wait behind it."""
        waiting: deque[Batch] = deque()
        for batch in self._batches():
            waiting.append(batch)
            if len(waiting) > 2 * self._encoders.processes:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()

    def _batches(self) -> Iterator[Batch]:
        examples = iter(self._stream)
        deque(islice(examples, self._skip), maxlen=0)
        before, batch, characters = self._stream.position(), list[Example](), 0
        for example in examples:
            batch.append(example)
            characters += len(example.content)
            if len(batch) == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
                yield self._submitted(before, batch)
                before, batch, characters = self._stream.position(), [], 0
        if batch:
            yield self._submitted(before, batch)

    def _submitted(self, before: Position, batch: list[Example]) -> Batch:
        return Batch(before, batch, self._encoders.submit([str(example.content) for example in batch]))
