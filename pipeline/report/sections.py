"""The sections of a report, each a list of Markdown blocks. A section without numbers is an empty list."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import printable
from pipeline.files import read_json
from pipeline.report import findings, tables
from pipeline.report.curves import SameBlocks, comparable_curves
from pipeline.report.findings import (
    final_target,
    is_shared_base,
    lead_findings,
    loss_change,
    number_of_comparisons,
)
from pipeline.report.markup import Table, bold, bullets, code, code_span, escape, image, table
from pipeline.report.metrics import TARGET_NAMES, duration, number, target_name
from pipeline.report.runs import RunArtifacts, labels, layouts, roles, seconds_by_stage, title_of
from pipeline.report.scores import Scores

LEGEND = (
    "± is one standard error over the task's documents. Compared with the base: ▲ better, ▼ worse, ≈ within noise, "
    "= the same value. A **bold** value beats all others of its row beyond noise. A difference is noise unless it "
    "is significant at the level of 5 %, over pairs of documents, and at least six documents changed."
)
# What papers report, never in one column with the results of a run: the papers' data and metrics differ. Each entry has
# the paper, its base model and the config values that identify it, the number of layers after expansion, how the
# numbers were made, and the rows.
PUBLISHED_FILE = Path(__file__).with_name("published.json")


def leaders(runs: Sequence[RunArtifacts], scores: Scores) -> list[str]:
    """For a sweep, lists the best method on each task, and whether its lead exceeds noise."""
    target = final_target(scores, runs)
    found = lead_findings(scores, runs, target)
    return [f"## Best method per task ({TARGET_NAMES[target]} models)", bullets(found)] if found else []


def next_steps(runs: Sequence[RunArtifacts], scores: Scores) -> list[str]:
    """For one run, lists what to try next."""
    found = findings.suggestions(runs[0], scores) if len(runs) == 1 else []
    return ["What to try next:", bullets(found)] if found else []


def score_tables(runs: Sequence[RunArtifacts], scores: Scores, figures: Mapping[str, str]) -> list[str]:
    """Shows one run's scores by target; for a sweep, scores by method for each target, then by target for each run."""
    if not scores.task_metrics():
        return []
    blocks = ["## Scores", *_picture(figures, "scores")]
    notes = [_reused_note(*names) for names in scores.reused()]
    legend = " ".join([LEGEND, *notes, *number_of_comparisons(runs, scores)])
    if len(runs) == 1:
        blocks += [table(tables.score_table(scores, runs[0].name)), legend]
        changes = ["### Change per stage", table(tables.difference_table(scores, runs[0].name))]
        return [*blocks, *(changes if len(scores.targets(runs[0].name)) > 1 else [])]
    blocks.append(legend)
    for target in ("expand", "pretrain", "sft"):
        if any(target in scores.targets(run.name) for run in runs):
            blocks += [
                f"### Methods side by side: {TARGET_NAMES[target]}",
                table(tables.method_table(scores, runs, target)),
            ]
    target = final_target(scores, runs)
    if not is_shared_base(scores, runs, target):
        blocks += [
            f"### Difference from the best value: {TARGET_NAMES[target]}",
            table(tables.lead_table(scores, runs, target)),
        ]
    for run in runs:
        blocks += [f"### By target: {escape(labels(runs)[run.name])}", table(tables.score_table(scores, run.name))]
    return blocks


def _reused_note(target: str, other: str) -> str:
    return (
        f"The {TARGET_NAMES[target]} model was not scored itself: its logits equal those of the {TARGET_NAMES[other]} "
        "model, so their scores are equal too (`evaluate.rescore=true force=[evaluate]` scores it "
        "as well)."
    )


def answers(runs: Sequence[RunArtifacts]) -> list[str]:
    """Shows what every model answered to the same questions of held-out conversations. A sweep shows the base once."""
    answers_by_question: dict[str, dict[tuple[str, str], None]] = {}  # who, and what
    for run in runs:
        for target in run.scored_targets():
            model = (
                target_name(target)
                if len(runs) == 1 or target == "load"
                else f"{labels(runs)[run.name]}, {target_name(target)}"
            )
            for entry in run.answers(target):
                rows = answers_by_question.setdefault(entry["question"], {("in the data", entry["reference"]): None})
                rows[(model, entry["answer"] + ("" if entry["ended"] else " …"))] = None
    if not answers_by_question:
        return []
    note = (
        "Questions of held-out conversations, with the most probable answer of every model (greedy search). An answer "
        "that ends with … was cut off. A few answers show how a model writes, not how good it is."
    )
    blocks = ["## The same questions, answered by every model", note]
    for question, rows in answers_by_question.items():
        cells = [[escape(model), escape(printable(answer))] for model, answer in rows]
        blocks += [bold(escape(printable(question))), table(Table(["model", "answer"], cells, text_columns=2))]
    return blocks


def training(runs: Sequence[RunArtifacts], figures: Mapping[str, str]) -> list[str]:
    """Shows held-out losses, also at equal budgets, and what was trained."""
    groups = comparable_curves(runs, "pretrain")
    blocks: list[str] = []
    if groups:
        blocks += ["## Held-out loss", *_picture(figures, "held_out_loss")]
        for group in groups:
            blocks += _curve_blocks(group, f": {escape(group.title)}" if len(groups) > 1 else "")
    if any(run.training(stage) for run in runs for stage in ("pretrain", "sft")):
        blocks += ["## Training", table(tables.training_table(runs)), *_picture(figures, "training_loss")]
    tuned = comparable_curves(runs, "sft")
    for group in tuned:
        which = f" of {escape(group.title)}" if len(tuned) > 1 else ""
        blocks += [f"Held-out loss{which} on conversations during instruction tuning:", *_measurements(group)]
    return blocks


def _curve_blocks(group: SameBlocks, which: str) -> list[str]:
    found = group.curves
    blocks = [*([f"### Measurements{which}"] if which else []), *_measurements(group)]
    if len(found) > 1:
        blocks += [
            f"### At equal budgets{which}",
            table(tables.budget_table(found)),
            "Interpolated linearly between measurements. Each budget is the largest that every run reaches."
            + (" Losses of averages are known only at the end of a run." if any(c.averages for c in found) else ""),
        ]
    return blocks


def _measurements(group: SameBlocks) -> list[str]:
    """Shows the losses of some curves, and what training changed."""
    found = group.curves
    blocks = [table(tables.curve_table(found)), "Loss in nats per token, perplexity in parentheses."]
    changes = [
        f"the loss of {escape(curve.label)} {loss_change(curve.change)}" for curve in found if curve.change is not None
    ]
    if changes:
        blocks[1] = (
            "Loss in nats per token ± one standard error over blocks, perplexity in parentheses. These measurements "
            "are on the same blocks, so the error of a difference is usually far smaller than those of the two losses. "
            f"From the first to the last measurement, {'; '.join(changes)}."
        )
    averaged = [escape(curve.label) for curve in found if curve.averages]
    if averaged:
        blocks[1] += (
            f" The result of {', '.join(averaged)} is the averages of the weights (`ema_decay`), whose loss is in the "
            "last row. All other losses of the table, and the curves in plots, are of the weights without averaging."
        )
    return blocks


def layer_origins(runs: Sequence[RunArtifacts], figures: Mapping[str, str]) -> list[str]:
    """Lists the new layers, the base layers they are made from, and what the expansion stage verified."""
    lines = []
    for alike, expansion in layouts(runs):
        origins = ", ".join(
            escape(f"{layer['layer']} ← {'+'.join(map(str, layer['from']))}")
            for layer in expansion["layers"]
            if layer["new"]
        )
        lines.append(f"{bold(escape(', '.join(labels(runs)[run.name] for run in alike)))}: {origins}")
    ranking = _picture(figures, "ranking")
    if not lines:
        return ["## The layers that train", *ranking] if ranking else []
    return ["## The new layers", *_picture(figures, "layers"), bullets(lines), *ranking, *_expansion_notes(runs)]


def _expansion_notes(runs: Sequence[RunArtifacts]) -> list[str]:
    lines = []
    for run in runs:
        manifest = run.manifest("expand")
        if manifest is not None and run.new_layers():
            difference = manifest["metrics"]["check"]["logit_difference"]
            finding = "does not compute the same outputs as the base model; the scores show the effect"
            if difference is not None:
                finding = (
                    "computes the same outputs as the base model: logits differ by at most "
                    f"{difference:.1g} of the largest"
                )
            warnings = [escape(warning) for warning in manifest["metrics"]["warnings"]]
            lines.append(f"{bold(escape(labels(runs)[run.name]))} {'; '.join([finding, *warnings])}")
    return ["Verified before training:", bullets(lines)] if lines else []


def cost(runs: Sequence[RunArtifacts], figures: Mapping[str, str]) -> list[str]:
    """Shows seconds and memory by stage."""
    totals = [
        f"{escape(labels(runs)[run.name])} {duration(sum(seconds_by_stage(run).values()))}"
        for run in runs
        if seconds_by_stage(run)
    ]
    if not totals:
        return []
    counted = " (shared stages count for every run)" if len(runs) > 1 else ""
    total = f"All stages together{counted}: {', '.join(totals)}."
    return ["## Cost", *_picture(figures, "seconds"), total, table(tables.artifact_table(runs))]


def reproduction(runs: Sequence[RunArtifacts]) -> list[str]:
    """Lists commit, packages and every stage's settings, once for all runs that share them."""
    names = labels(runs)
    users: dict[tuple[str, str], list[str]] = {}
    environments: dict[str, None] = {}
    for role in roles(runs):
        for run in runs:
            manifest = run.manifest(role)
            if manifest is not None:
                users.setdefault((role, json.dumps(manifest["settings"], indent=1)), []).append(names[run.name])
                environments[_environment(manifest)] = None
    blocks = ["## Reproduction", bullets(environments)]
    for (role, settings), used_by in users.items():
        which = "" if len(used_by) == len(runs) else f" ({', '.join(used_by)})"
        blocks += [f"### Settings: {role}{escape(which)}", code(settings, "json")]
    return blocks if users else []


def _environment(manifest: Mapping[str, Any]) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in manifest["packages"].items())
    return f"commit {code_span(manifest['git_commit'] or 'unknown')}; {escape(packages)}"


def _picture(figures: Mapping[str, str], name: str) -> list[str]:
    """Returns the figure with its caption, if it was drawn."""
    return [image(f"{name}.png", figures[name])] if name in figures else []


# ------------------------------------------------------------------------------- published results


def published_results(runs: Sequence[RunArtifacts]) -> list[str]:
    """Shows the papers' results for the same base model, depth and method, each in a separate table."""
    blocks: list[str] = []
    for setup in matching_setups(runs):
        blocks += [
            f"### {escape(setup['paper'])}: {escape(setup['base'])} to {setup['num_layers']} layers",
            table(_published_table(setup)),
            f"{setup['setup']} {setup['note']}",
        ]
    intro = (
        "The papers' own numbers for the same base model. Their data and metrics differ from those above, so the "
        "values are not comparable."
    )
    return ["## Published results", intro, *blocks] if blocks else []


def matching_setups(runs: Iterable[RunArtifacts]) -> list[dict[str, Any]]:
    """Returns the published setups that share base model, depth and method with one of the runs."""
    runs = list(runs)
    return [setup for setup in read_json(PUBLISHED_FILE) if any(_is_setup_of(setup, run) for run in runs)]


def _is_setup_of(setup: Mapping[str, Any], run: RunArtifacts) -> bool:
    config, expansion = run.read("load", "config.json"), run.expansion()
    if config is None or expansion is None:
        return False
    same_base = all(_config_value(config, name) == value for name, value in setup["base_config"].items())
    # A control without expansion belongs to every depth.
    same_depth = expansion["num_layers"] in (setup["num_layers"], expansion["num_base_layers"])
    return same_base and same_depth and run.method in {row["method"] for row in setup["rows"]}


def _config_value(config: Mapping[str, Any], name: str) -> Any:
    """Returns one value of a model's config."""
    if name == "rope_type":  # all that distinguishes the configs of Llama 3 and 3.1; newer configs moved it
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        return rope.get("rope_type", "default")
    return config.get(name)


def _published_table(setup: Mapping[str, Any]) -> Table:
    heads = list(dict.fromkeys(name for row in setup["rows"] for name in row["values"]))
    rows = []
    for row in setup["rows"]:
        after = row.get("after", TARGET_NAMES[row["target"]])
        rows.append([title_of(row["method"]), after, *(_published_value(name, row["values"]) for name in heads)])
    return Table(["method", "after", *heads], rows, text_columns=2)


def _published_value(name: str, values: Mapping[str, float]) -> str:
    if name not in values:
        return tables.MISSING
    return number("acc", values[name]) if name.endswith(" acc") else f"{values[name]:g}"
