"""One source's examples with their token ids: read and tokenized some batches ahead of whoever takes them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import islice

from pipeline.data.blocks import Ids
from pipeline.data.encoders import Encoders
from pipeline.data.files import Position
from pipeline.data.sources import Example, ExampleStream

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
