"""The closing table in the terminal: base, expanded, pre-trained, tuned. Needs rich and nothing heavier."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table as RichTable

from pipeline.comparison.differences import MARKS, Verdict, best, mark
from pipeline.comparison.measures import TARGET_NAMES, with_error
from pipeline.comparison.rows import Row, Scores

_COLOURS = {MARKS[Verdict.BETTER]: "green", MARKS[Verdict.WORSE]: "red"}


def closing_table(rows: Sequence[Row]) -> RichTable:
    """Scores by target with one standard error, a line a run, task and metric.

    Args:
        rows: those of results.json.
    """
    scores = Scores(rows)
    runs = list(dict.fromkeys(row["run"] for row in rows))
    targets = [target for target in TARGET_NAMES if any(target in scores.targets(run) for run in runs)]
    table = RichTable(
        caption="± one standard error; against the base ▲ better ▼ worse ≈ within noise (two standard errors)"
    )
    for head in (*(["run"] if len(runs) > 1 else []), "task", "metric"):
        table.add_column(head, no_wrap=True)
    for target in targets:
        table.add_column(TARGET_NAMES[target], justify="right", no_wrap=True)
    for measure in scores.measures():
        for run in runs:
            line = [scores.get(run, target, measure) for target in targets]
            names = [run, *measure] if len(runs) > 1 else list(measure)
            table.add_row(*map(escape, names), *_cells(line))
    return table


def _cells(line: Sequence[Row | None]) -> list[str]:
    base, winner = line[0], best(line)
    return ["–" if row is None else _cell(row, base, row is winner) for row in line]


def _cell(row: Row, base: Row | None, wins: bool) -> str:
    sign = mark(base if base is not None and base["target"] == "load" else None, row)
    text = with_error(row["metric"], row["value"], row["stderr"])
    text = f"[bold]{text}[/]" if wins else text
    return f"{text} [{_COLOURS[sign]}]{sign}[/]" if sign in _COLOURS else f"{text} {sign}".rstrip()
