"""A report's scores, looked up by run, target, task and metric, and what may be said of two of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pipeline.config import MODEL_TARGETS, Target
from pipeline.report.differences import Difference, Model, PairedDifference, Verdict, side_by_side
from pipeline.report.results import COST_TASK, CURVE_TASKS, Row


class Scores:
    """lm-eval's rows of a report.

    Args:
        rows: those of results.json; the others of them are passed over.
        paired: those of paired_differences.json.
    """

    def __init__(self, rows: Iterable[Row], paired: Iterable[PairedDifference] = ()) -> None:
        scored = [row for row in rows if row["task"] not in (COST_TASK, *CURVE_TASKS.values())]
        self._rows = {(row["run"], row["target"], row["task"], row["metric"]): row for row in scored}
        self._paired: dict[tuple[Model, Model, str, str], PairedDifference] = {}
        for pair in paired:
            before, after = (pair["against_run"], pair["against_target"]), (pair["run"], pair["target"])
            for one, other in ((before, after), (after, before)):
                self._paired[one, other, pair["task"], pair["metric"]] = pair

    def get(self, run: str, target: str, measure: tuple[str, str]) -> Row | None:
        """The row of that (task, metric), or None where it was not scored."""
        return self._rows.get((run, target, *measure))

    def difference(self, before: Row, after: Row) -> Difference:
        """Two rows of one task and metric, with the error over pairs of documents where there is one."""
        models = (before["run"], before["target"]), (after["run"], after["target"])
        pair = self._paired.get((*models, after["task"], after["metric"]))
        return Difference(before, after) if pair is None else Difference(before, after, pair["stderr"], pair["changed"])

    def unpaired(self) -> list[tuple[str, str]]:
        """The (task, metric) in which models side by side have no error over pairs, though each has one of its own."""
        with_error = [key for key, row in self._rows.items() if row["stderr"] is not None]
        return [
            (task, metric)
            for task, metric in self.measures()
            if any(
                (*pair, task, metric) not in self._paired
                for pair in side_by_side(key[:2] for key in with_error if key[2:] == (task, metric))
            )
        ]

    def best(self, rows: Sequence[Row | None]) -> Row | None:
        """The row that is better than every other, beyond noise, if there is one."""
        present = [row for row in rows if row is not None]
        for row in present:
            others = [other for other in present if other is not row]
            if others and all(self.difference(other, row).verdict is Verdict.BETTER for other in others):
                return row
        return None

    def mark(self, base: Row | None, row: Row) -> str:
        """How a row stands to the base; see ``differences.MARKS``. Nothing for the base itself."""
        return "" if base is None or base is row else self.difference(base, row).mark

    def measures(self) -> list[tuple[str, str]]:
        """Every (task, metric) scored, in the order of the evaluation."""
        return list(dict.fromkeys((task, metric) for _, _, task, metric in self._rows))

    def targets(self, run: str) -> list[str]:
        """The finished models of that run that were scored, from base to tuned."""
        return [target for target in self.all_targets(run) if target in MODEL_TARGETS]

    def all_targets(self, run: str) -> list[str]:
        """The same, with the snapshots between them."""
        scored = {target for name, target, _, _ in self._rows if name == run}
        return sorted(scored, key=lambda target: Target.parse(target).order)

    def shared_base(self, runs: Sequence[str]) -> bool:
        """Whether all runs grew from a base with the same scores."""
        measures = self.measures()
        bases = [[self._value(run, measure) for measure in measures] for run in runs]
        return all(base == bases[0] for base in bases) and any(value is not None for value in bases[0])

    def _value(self, run: str, measure: tuple[str, str]) -> float | None:
        row = self.get(run, "load", measure)
        return None if row is None else row["value"]
