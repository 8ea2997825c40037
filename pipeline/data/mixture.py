"""Mixes several sources in proportion to their weights, and tokenizes their documents ahead of use.

The share of a source in the training tokens is its weight divided by the sum of all weights. For example, general text
that is replayed to reduce forgetting is a source with a small weight.
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
from pipeline.data.records import Drops, Example
from pipeline.data.sources import ExampleStream
from pipeline.data.tokenizer import TokenizerPool

COUNTS = ("documents", "tokens", "dropped")  # counters of a MixtureSource, by their names in dataset.json
LISTED_FILES = 1000  # of a source; those read later are counted together
FURTHER_FILES = "further files"

BATCH_DOCUMENTS = 256  # a batch sent to a tokenizer worker ends after this many documents
BATCH_CHARACTERS = 2**20  # or after this many characters, whichever comes first


class Mixture:
    """Examples of several sources, interleaved so that their shares are exact to within one document at every point.

    The next example is taken from the source that is furthest behind its share. Reading ends at the token budget, or
    when the first source is exhausted: reading only the others further would change the shares, and no source is read
    twice. After that, only the held-out examples of sources with predefined splits are read.

    The consumer decides what to keep, and reports it with :meth:`MixtureSource.count`.

    Args:
        sources: the sources.
        budget: training tokens after which reading ends; None for no limit.
        unmixed: sources that are not mixed with the others, but read after them.
        unmixed_budget: tokens after which reading each of these ends; None for no limit.

    Attributes:
        mixed: the sources that are mixed.
        sources: all of them.
    """

    def __init__(
        self,
        sources: Sequence[MixtureSource],
        budget: int | None,
        unmixed: Sequence[MixtureSource] = (),
        unmixed_budget: int | None = None,
    ) -> None:
        self.mixed, self.sources = sources, [*sources, *unmixed]
        self._budget, self._unmixed_budget = budget, unmixed_budget

    def __iter__(self) -> Iterator[tuple[int, Example, Ids | None]]:
        """Yields the index of the source, the example, and its token ids if it was tokenized in advance."""
        iterators = [iter(source.examples) for source in self.sources]
        while not (self._is_full() or any(source.exhausted for source in self.mixed)):
            index = min(range(len(self.mixed)), key=self._tokens_per_weight)
            item = next(iterators[index], None)
            if item is None:
                self.sources[index].exhausted = True  # ends the loop for all sources
            else:
                yield (index, *item)
        for index, iterator in enumerate(iterators[: len(self.mixed)]):
            # Held-out examples of python_docs, for example, follow all of its training examples.
            if self.sources[index].has_splits:
                yield from ((index, *item) for item in iterator if item[0].split == "held_out")
        for index in range(len(self.mixed), len(self.sources)):
            yield from self._read_unmixed(index, iterators[index])

    def _read_unmixed(
        self, index: int, iterator: Iterator[tuple[Example, Ids | None]]
    ) -> Iterator[tuple[int, Example, Ids | None]]:
        source = self.sources[index]
        while self._unmixed_budget is None or source.tokens.total() < self._unmixed_budget:
            item = next(iterator, None)
            if item is None:
                source.exhausted = True
                return
            yield (index, *item)

    @property
    def training_tokens(self) -> int:
        """Training tokens of all sources so far."""
        return sum(source.tokens["train"] for source in self.sources)

    def total(self, name: str) -> Counter[str]:
        """Returns the sum of one of ``COUNTS`` over all sources."""
        return sum((getattr(source, name) for source in self.sources), Counter())

    def _is_full(self) -> bool:
        return self._budget is not None and self.training_tokens >= self._budget

    def _tokens_per_weight(self, index: int) -> float:
        source = self.sources[index]
        return source.tokens["train"] / source.weight


@dataclass
class MixtureSource:
    """One source of a mixture, with counts of what was kept and dropped so far.

    Attributes:
        examples: its examples, which can be resumed.
        weight: its share, relative to the sum of all weights.
        has_splits: whether its examples come with a split.
        documents: number of documents or conversations kept, by split.
        tokens: number of tokens kept, by split.
        dropped: number of documents or conversations dropped, by reason, with the first few locations.
        files: number of records read, by file.
        exhausted: whether it was read to its end.
    """

    examples: Examples
    weight: float
    has_splits: bool
    documents: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    dropped: Drops = field(default_factory=Drops)
    files: Counter[str] = field(default_factory=Counter)
    exhausted: bool = False

    def count_read(self, example: Example) -> None:
        """Counts one more record that was read, whether it is kept or dropped."""
        if example.file:
            known = example.file in self.files or len(self.files) < LISTED_FILES
            self.files[example.file if known else FURTHER_FILES] += 1

    def count(self, split: str, tokens: int) -> None:
        """Counts one more document that was kept."""
        self.documents[split] += 1
        self.tokens[split] += tokens

    @property
    def examples_read(self) -> int:
        """Number of examples that were kept or dropped."""
        return self.documents.total() + self.dropped.total() - self.dropped["truncated"]

    def counts(self) -> dict[str, Any]:
        """Returns all counts, as JSON values."""
        return {name: dict(sorted(getattr(self, name).items())) for name in COUNTS}

    def state(self) -> dict[str, Any]:
        """Returns the position in the source and all counts, as JSON values."""
        read = {"files": dict(self.files), "locations": self.dropped.locations}
        return {"position": self.examples.position(), "ran_out": self.exhausted, **self.counts(), **read}

    def restore(self, state: dict[str, Any]) -> None:
        """Restores the counts of a saved state. ``examples`` must have been opened at the saved position."""
        self.exhausted = state["ran_out"]
        self.documents, self.tokens = Counter(state["documents"]), Counter(state["tokens"])
        # An attempt of an earlier version of this program did not save the last two.
        self.dropped = Drops(state["dropped"], state.get("locations"))
        self.files = Counter(state.get("files", {}))


class Examples(Protocol):
    """The examples of one source, with their token ids if they were tokenized in advance."""

    def __iter__(self) -> Iterator[tuple[Example, Ids | None]]: ...

    def position(self) -> Position:
        """Returns the position after the last example that was returned, as JSON values."""


class UntokenizedExamples:
    """Examples without token ids. Conversations are tokenized one at a time, with their template."""

    def __init__(self, stream: ExampleStream) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[tuple[Example, None]]:
        return ((example, None) for example in self._stream)

    def position(self) -> Position:
        """Returns the position after the last example that was returned."""
        return {"stream": self._stream.position()}


@dataclass(frozen=True)
class _PendingBatch:
    """Documents that are being tokenized."""

    start: Position  # of the stream, before the first document
    examples: list[Example]
    ids: Future[list[Ids]]


class PrefetchedDocuments:
    """Documents with their token ids in the order of the stream, read and tokenized a few batches ahead of use.

    Args:
        stream: the documents. If ``position`` is given, it must have been opened at its ``stream`` entry.
        pool: tokenizes them.
        position: a value returned by ``position()``; documents resume there.
    """

    def __init__(self, stream: ExampleStream, pool: TokenizerPool, position: Position | None = None) -> None:
        self._stream, self._pool = stream, pool
        # The stream is at the start of a batch. This many of its documents were already returned.
        self._skip: int = position["taken"] if position else 0
        self._batch_start: Position | None = None
        self._returned = 0  # documents of the current batch

    def __iter__(self) -> Iterator[tuple[Example, Ids]]:
        for batch in self._prefetched():
            self._batch_start, self._returned = batch.start, 0
            for example, ids in zip(batch.examples, batch.ids.result(), strict=True):
                self._returned += 1
                yield example, ids

    def position(self) -> Position:
        """Returns the position after the last document that was returned, however far ahead the stream was read."""
        if self._batch_start is None:
            return {"stream": self._stream.position(), "taken": self._skip}
        return {"stream": self._batch_start, "taken": self._returned}

    def _prefetched(self) -> Iterator[_PendingBatch]:
        pending: deque[_PendingBatch] = deque()
        for batch in self._batches():
            pending.append(batch)
            if len(pending) > 2 * self._pool.workers:  # per worker, one batch in progress and one in the queue
                yield pending.popleft()
        while pending:
            yield pending.popleft()

    def _batches(self) -> Iterator[_PendingBatch]:
        examples = iter(self._stream)
        deque(islice(examples, self._skip), maxlen=0)  # reads and discards them
        start, batch, characters = self._stream.position(), list[Example](), 0
        for example in examples:
            batch.append(example)
            characters += len(example.content)
            if len(batch) == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
                yield self._submit(start, batch)
                start, batch, characters = self._stream.position(), [], 0
        if batch:
            yield self._submit(start, batch)

    def _submit(self, start: Position, batch: list[Example]) -> _PendingBatch:
        return _PendingBatch(start, batch, self._pool.submit([str(example.content) for example in batch]))
