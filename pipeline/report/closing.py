"""The table of scores that a run prints in the terminal when it ends, by target."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape
from rich.table import Table as RichTable

from pipeline.files import read_json
from pipeline.report.differences import MARKS, PAIRED_FILE, Verdict, by_chance
from pipeline.report.metrics import TARGET_NAMES, with_error
from pipeline.report.results import RESULTS_FILE, Result
from pipeline.report.scores import Scores

_COLORS = {MARKS[Verdict.BETTER]: "green", MARKS[Verdict.WORSE]: "red"}


def closing_table(report: Path) -> RichTable:
    """Tabulates scores by target with one standard error, one line per run, task and metric.

    Args:
        report: the directory of a report that was written.
    """
    results: list[Result] = read_json(report / RESULTS_FILE)
    scores = Scores(results, read_json(report / PAIRED_FILE))
    runs = list(dict.fromkeys(result["run"] for result in results))
    targets = [target for target in TARGET_NAMES if any(target in scores.targets(run) for run in runs)]
    lines = {
        (run, task_metric): [scores.get(run, target, task_metric) for target in targets]
        for task_metric in scores.task_metrics()
        for run in runs
        if targets  # not if only snapshots were scored
    }
    judged = by_chance(verdict for line in lines.values() for verdict in _verdicts(scores, line))
    table = RichTable(
        caption="± one standard error; compared with the base over pairs of documents: ▲ better ▼ worse ≈ within noise"
        + (f"; {judged}" if judged else "")
    )
    for head in (*(["run"] if len(runs) > 1 else []), "task", "metric"):
        table.add_column(head, no_wrap=True)
    for target in targets:
        table.add_column(TARGET_NAMES[target], justify="right", no_wrap=True)
    for (run, task_metric), line in lines.items():
        names = [run, *task_metric] if len(runs) > 1 else list(task_metric)
        table.add_row(*map(escape, names), *_cells(scores, line))
    return table


def _base(line: Sequence[Result | None]) -> Result | None:
    return line[0] if line[0] is not None and line[0]["target"] == "load" else None


def _verdicts(scores: Scores, line: Sequence[Result | None]) -> list[Verdict]:
    base = _base(line)
    return [] if base is None else [scores.difference(base, each).verdict for each in line[1:] if each is not None]


def _cells(scores: Scores, line: Sequence[Result | None]) -> list[str]:
    base, best = _base(line), scores.best(line)
    return ["–" if each is None else _cell(each, scores.mark(base, each), each is best) for each in line]


def _cell(result: Result, mark: str, is_best: bool) -> str:
    text = with_error(result["metric"], result["value"], result["stderr"])
    text = f"[bold]{text}[/]" if is_best else text
    return f"{text} [{_COLORS[mark]}]{mark}[/]" if mark in _COLORS else f"{text} {mark}".rstrip()
