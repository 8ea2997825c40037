"""The closing table in the terminal: base, expanded, pre-trained, tuned. Needs rich and nothing heavier."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape
from rich.table import Table as RichTable

from pipeline.files import read_json
from pipeline.report.differences import MARKS, PAIRED_FILE, Verdict
from pipeline.report.metrics import TARGET_NAMES, with_error
from pipeline.report.results import RESULTS_FILE, Row
from pipeline.report.scores import Scores

_COLOURS = {MARKS[Verdict.BETTER]: "green", MARKS[Verdict.WORSE]: "red"}


def closing_table(report: Path) -> RichTable:
    """Scores by target with one standard error, a line a run, task and metric.

    Args:
        report: the directory of a written report.
    """
    rows: list[Row] = read_json(report / RESULTS_FILE)
    scores = Scores(rows, read_json(report / PAIRED_FILE))
    runs = list(dict.fromkeys(row["run"] for row in rows))
    targets = [target for target in TARGET_NAMES if any(target in scores.targets(run) for run in runs)]
    table = RichTable(
        caption="± one standard error; against the base, in pairs of documents, ▲ better ▼ worse ≈ within noise"
    )
    for head in (*(["run"] if len(runs) > 1 else []), "task", "metric"):
        table.add_column(head, no_wrap=True)
    for target in targets:
        table.add_column(TARGET_NAMES[target], justify="right", no_wrap=True)
    for measure in scores.measures():
        for run in runs:
            line = [scores.get(run, target, measure) for target in targets]
            names = [run, *measure] if len(runs) > 1 else list(measure)
            table.add_row(*map(escape, names), *_cells(scores, line))
    return table


def _cells(scores: Scores, line: Sequence[Row | None]) -> list[str]:
    base = line[0] if line[0] is not None and line[0]["target"] == "load" else None
    winner = scores.best(line)
    return ["–" if row is None else _cell(row, scores.mark(base, row), row is winner) for row in line]


def _cell(row: Row, sign: str, wins: bool) -> str:
    text = with_error(row["metric"], row["value"], row["stderr"])
    text = f"[bold]{text}[/]" if wins else text
    return f"{text} [{_COLOURS[sign]}]{sign}[/]" if sign in _COLOURS else f"{text} {sign}".rstrip()
