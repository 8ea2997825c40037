"""A report's scores, looked up by run, target, task and metric, and comparisons of two of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pipeline.config import MODEL_TARGETS, Target
from pipeline.report.differences import Difference, PairedDifference, ScoredModel, Verdict, compared_models
from pipeline.report.results import COST_TASK, CURVE_TASKS, Result


class Scores:
    """lm-eval's scores among a report's results.

    Args:
        results: the entries of results.json. Held-out losses and costs are ignored.
        paired: the entries of paired_differences.json.
    """

    def __init__(self, results: Iterable[Result], paired: Iterable[PairedDifference] = ()) -> None:
        scored = [result for result in results if result["task"] not in (COST_TASK, *CURVE_TASKS.values())]
        self._results = {(each["run"], each["target"], each["task"], each["metric"]): each for each in scored}
        self._paired: dict[tuple[ScoredModel, ScoredModel, str, str], PairedDifference] = {}
        for pair in paired:
            before, after = (pair["against_run"], pair["against_target"]), (pair["run"], pair["target"])
            # The standard error and the number of changed documents are the same in both directions.
            for one, other in ((before, after), (after, before)):
                self._paired[one, other, pair["task"], pair["metric"]] = pair

    def get(self, run: str, target: str, task_metric: tuple[str, str]) -> Result | None:
        """Returns the result for a (task, metric), or None if it was not scored."""
        return self._results.get((run, target, *task_metric))

    def task_metrics(self) -> list[tuple[str, str]]:
        """Returns every (task, metric) that was scored, in the order of the evaluation."""
        return list(dict.fromkeys((task, metric) for _, _, task, metric in self._results))

    def reused(self) -> list[tuple[str, str]]:
        """Returns (target, other) for every target that has the scores of another, because its logits are the same."""
        return sorted({(each["target"], each["scores_of"]) for each in self._results.values() if each["scores_of"]})

    def targets(self, run: str) -> list[str]:
        """Returns the finished models of a run that were scored, from base to tuned."""
        return [target for target in self.all_targets(run) if target in MODEL_TARGETS]

    def all_targets(self, run: str) -> list[str]:
        """Returns the scored models of a run, snapshots included, from base to tuned."""
        scored = {target for name, target, _, _ in self._results if name == run}
        return sorted(scored, key=lambda target: Target.parse(target).order)

    def difference(self, before: Result, after: Result, contenders: int = 2) -> Difference:
        """Returns the difference of two results for one task and metric, with the error over pairs if known.

        Args:
            before: one result.
            after: the other.
            contenders: the number of results that one of the two was chosen from as the best.
        """
        models = (before["run"], before["target"]), (after["run"], after["target"])
        return Difference(before, after, self._paired.get((*models, after["task"], after["metric"])), contenders)

    def mark(self, base: Result | None, result: Result) -> str:
        """Compares a result with the base. Returns one of ``differences.MARKS``; empty for the base itself."""
        return "" if base is None or base is result else self.difference(base, result).mark

    def best(self, results: Sequence[Result | None]) -> Result | None:
        """Returns the result that is better than every other beyond noise, if there is one.

        Each comparison is at the full level: to be chosen in error, a result must win the comparison with one that is
        at least as good, however many others there are (an intersection-union test).
        """
        present = [result for result in results if result is not None]
        for result in present:
            others = [other for other in present if other is not result]
            if others and all(self.difference(other, result).verdict is Verdict.BETTER for other in others):
                return result
        return None

    def unpaired(self) -> list[tuple[str, str]]:
        """Returns every (task, metric) for which two compared models have standard errors but no error over pairs."""
        with_error = [key for key, result in self._results.items() if result["stderr"] is not None]
        return [
            (task, metric)
            for task, metric in self.task_metrics()
            if any(
                (*pair, task, metric) not in self._paired
                for pair in compared_models(key[:2] for key in with_error if key[2:] == (task, metric))
            )
        ]

    def shared_base(self, runs: Sequence[str]) -> bool:
        """Returns whether the base models of all runs have the same scores."""
        task_metrics = self.task_metrics()
        bases = [[self._base_value(run, task_metric) for task_metric in task_metrics] for run in runs]
        return all(base == bases[0] for base in bases) and any(value is not None for value in bases[0])

    def _base_value(self, run: str, task_metric: tuple[str, str]) -> float | None:
        result = self.get(run, "load", task_metric)
        return None if result is None else result["value"]
