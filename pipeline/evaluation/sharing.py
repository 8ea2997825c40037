"""Several processes score one model: each computes every n-th batch, and all of them get the results of all batches.

lm-eval's own data parallelism divides the documents instead, which changes the numbers: the few-shot examples of a
document depend on which documents the same process has had before it, the padding of a batch on the documents in it,
and bootstrapped standard errors on the order of the documents. Here every process builds all requests, and the batches
are those of a single process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.files import read_json, write_json
from pipeline.training.watchdog import Watch, wait_until

PART_FILES = "part-*.json"


@dataclass
class ScoringRanks:
    """The processes that score one model, of which this is one.

    They exchange results as files, since these are a few numbers per document. The processes are all on one host.

    Attributes:
        rank: the number of this process.
        count: how many there are.
        folder: where results are exchanged.
        watch: ends the job if a process is stuck; None if there is only one.
    """

    rank: int = 0
    count: int = 1
    folder: Path = Path()
    watch: Watch | None = None
    _exchanges: int = field(default=0, init=False)

    def enter(self, part: str, is_alone: bool = False) -> None:
        """Records which part of the work this process has reached; see ``watchdog.Phase``."""
        if self.watch is not None:
            self.watch.enter(part, is_alone)

    def describe(self, part: str) -> None:
        """Records that this process has made progress within a part."""
        if self.watch is not None:
            self.watch.describe(part)

    def wait(self, part: str) -> None:
        """Waits until all processes have finished a part, however long that takes."""
        self.gather(None, part)

    def gather(self, own: Any, part: str) -> list[Any]:
        """Returns what all processes pass to the same call (JSON values), in the order of their ranks.

        Args:
            own: of this process.
            part: what the others may still be at, for messages.
        """
        if self.count == 1:
            return [own]
        self.enter(f"waiting for the others after {part}", is_alone=True)
        files = [self._file(self._exchanges, rank) for rank in range(self.count)]
        write_json(files[self.rank], own)
        for file in files:
            wait_until(file.exists)
        parts = [read_json(file) for file in files]
        # A rank writes only after it has read all previous files, so that these are no longer needed.
        self._file(self._exchanges - 1, self.rank).unlink(missing_ok=True)
        self._exchanges += 1
        self.enter("computing scores", is_alone=True)  # rank 0 may take much longer
        return parts

    def _file(self, exchange: int, rank: int) -> Path:
        return self.folder / PART_FILES.replace("*", f"{exchange}-{rank}")


@dataclass
class BatchTurns:
    """The batches of one of lm-eval's methods, which every process goes through twice.

    The first time it computes those whose turn it is, the second time it has the results of all.
    """

    ranks: ScoringRanks
    _own: dict[int, Any] = field(default_factory=dict, init=False)
    _all: dict[int, Any] | None = field(default=None, init=False)
    _next: int = field(default=0, init=False)

    def run(self, method: Callable[[], Any]) -> Any:
        """Returns what the method returns, which calls ``result_of`` once for each of its batches."""
        answers = method()
        if self.ranks.count == 1:
            return answers
        parts = self.ranks.gather(list(self._own.items()), "scoring")
        self._all, self._next = {number: result for part in parts for number, result in part}, 0
        return method()

    def result_of(self, compute: Callable[[], Any], placeholder: Any, in_order: bool = False) -> Any:
        """Returns the result of the next batch (JSON values).

        Args:
            compute: computes it.
            placeholder: has the form of a result, for batches that another process computes.
            in_order: the result depends on the batches before, so that one process computes all of them.
        """
        number = self._next
        self._next += 1
        if self._all is not None:
            return self._all[number]
        if self.ranks.rank != (0 if in_order else number % self.ranks.count):
            return placeholder
        self._own[number] = compute()
        return self._own[number]


def own_requests(requests: Sequence[tuple[Any, list[int], list[int]]], batch: int, ranks: ScoringRanks) -> list[int]:
    """Returns which requests of ``HFLM._loglikelihood_tokens`` are in the batches of this process.

    It computes requests that differ only in the last token at once, and orders these groups by their tokens (see
    ``lm_eval.models.utils.Collator``). Given only the requests of some batches, it forms the same batches.

    Args:
        requests: any first item, and the token ids of context and continuation.
        batch: the number of groups in a batch.
        ranks: this process and the others.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, (_, context, continuation) in enumerate(requests):
        groups.setdefault((*context, *continuation[:-1]), []).append(number)
    ordered = sorted(groups, key=lambda tokens: (-len(tokens), tokens))
    own = (ordered[start : start + batch] for start in range(ranks.rank * batch, len(ordered), ranks.count * batch))
    return sorted(number for keys in own for key in keys for number in groups[key])
