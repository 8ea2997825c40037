"""Writes a report: results as JSON, plots as PNG, report.md, and the same text as one self-contained report.html."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.files import write_json, write_text
from pipeline.report import sections
from pipeline.report.differences import PAIRED_FILE, paired_differences
from pipeline.report.findings import caveats, headline, title
from pipeline.report.markup import bullets, escape
from pipeline.report.results import RESULTS_FILE, Result, collect_results
from pipeline.report.runs import RunArtifacts
from pipeline.report.scores import Scores

CAPTIONS = {
    "scores": "Main metric of every task by target, with two standard errors to each side. Dashed: the base model.",
    "held_out_loss": "Held-out loss during pre-training by tokens, training FLOPs and time. Dashed: the base model.",
    "training_loss": "Training loss at every optimizer step.",
    "layers": "Where the layers of the expanded model come from. New layers are colored.",
    "ranking": "What each layer of the base does on the probe text, with one standard error over its tokens to each "
    "side. Colored: the layers after which new ones were added, or that train instead.",
    "seconds": "Time per stage, measured when its artifacts were built.",
}


def write_report(runs: Sequence[RunArtifacts], out: Path) -> list[Result]:
    """Compares the models of one run or of several runs and writes all files of the report into ``out``.

    Returns:
        The entries of results.json.
    """
    # Imported here because matplotlib takes a second that readers of results.json need not spend.
    from pipeline.report.markup import render
    from pipeline.report.plots import draw_all

    results = collect_results(runs)
    write_json(out / RESULTS_FILE, results)
    paired = paired_differences(runs)
    write_json(out / PAIRED_FILE, paired)
    scores = Scores(results, paired)
    drawn = draw_all(runs, scores, out)
    figures = {name: caption for name, caption in CAPTIONS.items() if f"{name}.png" in drawn}
    text = compose(runs, scores, figures)
    write_text(out / "report.md", text)
    write_text(out / "report.html", render(text, title(runs), out))
    return results


def compose(runs: Sequence[RunArtifacts], scores: Scores, figures: dict[str, str]) -> str:
    """Returns the report's Markdown. ``figures`` maps the name of each figure that was drawn to its caption."""
    blocks = [
        f"# {escape(title(runs))}",
        f"> {headline(runs, scores)}",
        *sections.next_steps(runs, scores),
        *sections.leaders(runs, scores),
        *sections.score_tables(runs, scores, figures),
        *sections.answers(runs),
        *sections.training(runs, figures),
        *sections.layer_origins(runs, figures),
        *sections.cost(runs, figures),
        *sections.published_results(runs),
        "## What these numbers do not show",
        bullets(caveats(runs, scores)),
        *sections.reproduction(runs),
    ]
    return "\n\n".join(blocks) + "\n"
