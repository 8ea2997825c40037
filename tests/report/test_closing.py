"""The table that a run prints when it ends."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

from rich.console import Console

from pipeline.report import RunArtifacts, closing_table, write_report
from tests.report.finished_runs import SCORES, finished_run


def _written(*runs: RunArtifacts) -> Path:
    report = runs[0].directories["load"].parent / "report"
    report.mkdir()
    write_report(runs, report)
    return report


def _printed(*runs: RunArtifacts) -> str:
    console = Console(width=200, record=True, file=StringIO())
    console.print(closing_table(_written(*runs)))
    return console.export_text()


def test_the_table_shows_all_targets_with_errors_and_marks(tmp_path: Path) -> None:
    text = _printed(finished_run(tmp_path))
    assert all(head in text for head in ("base", "expanded", "pre-trained", "tuned"))
    (line,) = [line for line in text.splitlines() if "word_perplexity" in line]
    assert [cell.strip() for cell in line.strip("│ ").split("│")] == [
        "held_out_text", "word_perplexity", "35.00 ± 0.40", "50.00 ± 0.40 ▼", "26.60 ± 0.40 ▲", "27.00 ± 0.40 ▲",
    ]  # fmt: skip
    assert "pretrain@" not in text and "cost" not in text
    assert "6 of 9 are significant, about 0.45 would be by chance" in " ".join(text.split())


def test_a_sweep_has_one_line_per_run(tmp_path: Path) -> None:
    text = _printed(finished_run(tmp_path, "s/lesa", "lesa"), finished_run(tmp_path, "s/copy", "copy"))
    assert text.count("s/lesa") == text.count("s/copy") == len(SCORES)


def test_task_names_are_not_interpreted_as_markup(tmp_path: Path) -> None:
    values = {"load": 0.5, "expand": 0.5, "pretrain": 0.5, "sft": 0.5}
    assert "[red]task" in _printed(finished_run(tmp_path, scores={("[red]task", "acc"): (1, None, values)}))


def test_without_scores_the_table_is_empty(tmp_path: Path) -> None:
    assert closing_table(_written(finished_run(tmp_path, stages=["load", "expand"]))).row_count == 0


def test_if_only_snapshots_were_scored_the_table_is_empty(tmp_path: Path) -> None:
    scores = {("quiz", "acc"): (40, 0.1, {"pretrain@50%": 0.5})}
    stages = ["load", "expand", "evaluate/pretrain-at-50"]
    report = _written(finished_run(tmp_path, stages=stages, scores=scores))
    assert "50.0 ± 10.0 %" in (report / "report.md").read_text()
    assert closing_table(report).row_count == 0
