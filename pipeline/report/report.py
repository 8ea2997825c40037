"""Writes a report: its numbers as JSON, PNG plots, report.md and the same text as one self-contained report.html."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from pipeline.files import temporary_path, write_json
from pipeline.report import sections
from pipeline.report.curves import base_loss
from pipeline.report.differences import PAIRED_FILE, paired_differences
from pipeline.report.findings import caveats, headline, title
from pipeline.report.markup import bullets, escape
from pipeline.report.results import RESULTS_FILE, Row, collect
from pipeline.report.runs import RunArtifacts
from pipeline.report.scores import Scores

CAPTIONS = {
    "scores": "Every task's main metric by target, two standard errors to each side; dashed: the base.",
    "held_out_loss": "Held-out loss while pre-training, by tokens, training FLOPs and time; dashed: the base.",
    "training_loss": "Training loss of every optimizer step.",
    "layers": "Where the layers of the expanded model come from; new ones are coloured.",
    "seconds": "Time by stage, as it took when it was built.",
}


def write_report(runs: Sequence[RunArtifacts], out: Path) -> list[Row]:
    """Compares one run's models, or those of several runs, and writes everything into ``out``.

    Returns:
        The rows of results.json.
    """
    # Here and not above: matplotlib takes a second that readers of results.json need not pay.
    from pipeline.report.markup import render
    from pipeline.report.plots import draw_all

    rows = collect(runs)
    write_json(out / RESULTS_FILE, rows)
    paired = paired_differences(runs)
    write_json(out / PAIRED_FILE, paired)
    scores = Scores(rows, paired)
    drawn = draw_all(runs, scores, base_loss(runs), out)
    figures = {name: caption for name, caption in CAPTIONS.items() if f"{name}.png" in drawn}
    text = compose(runs, scores, figures)
    _write(out / "report.md", text)
    _write(out / "report.html", render(text, title(runs), out))
    return rows


def compose(runs: Sequence[RunArtifacts], scores: Scores, figures: dict[str, str]) -> str:
    """The report's Markdown; ``figures`` maps the name of each drawn figure to its caption."""
    blocks = [
        f"# {escape(title(runs))}",
        f"> {headline(runs, scores)}",
        *sections.leaders(runs, scores),
        *sections.score_tables(runs, scores, figures),
        *sections.training(runs, figures),
        *sections.surgery(runs, figures),
        *sections.cost(runs, figures),
        *sections.from_papers(runs),
        "## What these numbers do not show",
        bullets(caveats(runs, scores)),
        *sections.reproduction(runs),
    ]
    return "\n\n".join(blocks) + "\n"


def _write(path: Path, text: str) -> None:
    temporary = temporary_path(path)
    temporary.write_text(text)
    os.replace(temporary, path)
