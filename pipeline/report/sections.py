"""The report's sections, each a list of Markdown blocks; a section without numbers is an empty list."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.files import read_json
from pipeline.report import sections as published
from pipeline.report import tables
from pipeline.report.curves import Curve, curves, seconds_by_stage
from pipeline.report.findings import final_target, lead_findings
from pipeline.report.markup import Table, bold, bullets, code, escape, figure, table
from pipeline.report.metrics import TARGET_NAMES, duration, number
from pipeline.report.runs import RunArtifacts, labels, layouts, roles, title_of
from pipeline.report.scores import Scores

Blocks = list[str]
LEGEND = (
    "± is one standard error over the task's documents. Against the base: ▲ better, ▼ worse, ≈ within noise, = the "
    "same number. **Bold** beats every other value of its row beyond noise. A difference is noise unless it exceeds "
    "two of its own standard errors, over pairs of documents, and at least six documents changed."
)


def leaders(runs: Sequence[RunArtifacts], scores: Scores) -> Blocks:
    """Of a sweep: who leads on each task, and whether that says anything."""
    target = final_target(scores, runs)
    found = lead_findings(scores, runs, target)
    return [f"## Who leads ({TARGET_NAMES[target]} models)", bullets(found)] if found else []


def score_tables(runs: Sequence[RunArtifacts], scores: Scores, figures: Mapping[str, str]) -> Blocks:
    """Scores of one run by target; of a sweep by method for each target, then by target for each run."""
    if not scores.measures():
        return []
    blocks = ["## Scores", *_picture(figures, "scores")]
    if len(runs) == 1:
        blocks += [table(tables.score_table(scores, runs[0].name)), LEGEND]
        changes = ["### What each step changed", table(tables.difference_table(scores, runs[0].name))]
        return [*blocks, *(changes if len(scores.targets(runs[0].name)) > 1 else [])]
    blocks.append(LEGEND)
    for target in ("expand", "pretrain", "sft"):
        if any(target in scores.targets(run.name) for run in runs):
            blocks += [
                f"### Methods side by side: {TARGET_NAMES[target]}",
                table(tables.method_table(scores, runs, target)),
            ]
    target = final_target(scores, runs)
    blocks += [
        f"### Distance to the best value: {TARGET_NAMES[target]}",
        table(tables.lead_table(scores, runs, target)),
    ]
    for run in runs:
        blocks += [f"### By target: {escape(labels(runs)[run.name])}", table(tables.score_table(scores, run.name))]
    return blocks


def training(runs: Sequence[RunArtifacts], figures: Mapping[str, str]) -> Blocks:
    """Held-out curves, at equal budgets too, and what was trained."""
    found = curves(runs, "pretrain")
    blocks: Blocks = []
    if found:
        blocks += ["## Held-out loss", *_picture(figures, "held_out_loss"), *_curve_blocks(found)]
    if any(run.training(stage) for run in runs for stage in ("pretrain", "sft")):
        blocks += ["## What was trained", table(tables.training_table(runs)), *_picture(figures, "training_loss")]
    tuned = curves(runs, "sft")
    if tuned:
        blocks += ["While tuning, on held-out conversations:", table(tables.curve_table(tuned))]
    return blocks


def _curve_blocks(found: Sequence[Curve]) -> Blocks:
    blocks = [table(tables.curve_table(found)), "Loss in nats a token, perplexity in brackets."]
    if len(found) > 1:
        blocks += ["### At equal budgets", table(tables.budget_table(found)),
                   "Linear between the points measured; the budget is the largest that every run reaches."]  # fmt: skip
    return blocks


def surgery(runs: Sequence[RunArtifacts], figures: Mapping[str, str]) -> Blocks:
    """Which layers are new, where they came from, and what the expansion stage said about itself."""
    lines = []
    for alike, expansion in layouts(runs):
        origins = ", ".join(
            f"{layer['layer']} ← {'+'.join(map(str, layer['from']))}" for layer in expansion["layers"] if layer["new"]
        )
        lines.append(f"{bold(escape(', '.join(labels(runs)[run.name] for run in alike)))}: {origins}")
    if not lines:
        return []
    return ["## The new layers", *_picture(figures, "layers"), bullets(lines), *_expansion_notes(runs)]


def _expansion_notes(runs: Sequence[RunArtifacts]) -> Blocks:
    lines = []
    for run in runs:
        manifest = run.manifest("expand")
        if manifest is not None and run.new_layers():
            difference = manifest["metrics"]["check"]["logit_difference"]
            said = "starts from other outputs than the base's; the scores say how far they are"
            if difference is not None:
                said = f"computes what the base does: logits differ by {difference:.1g} of the largest at most"
            warnings = [escape(warning) for warning in manifest["metrics"]["warnings"]]
            lines.append(f"{bold(escape(labels(runs)[run.name]))} {'; '.join([said, *warnings])}")
    return ["Checked before any training:", bullets(lines)] if lines else []


def cost(runs: Sequence[RunArtifacts], figures: Mapping[str, str]) -> Blocks:
    """Seconds and memory by stage."""
    totals = [
        f"{escape(labels(runs)[run.name])} {duration(sum(seconds_by_stage(run).values()))}"
        for run in runs
        if seconds_by_stage(run)
    ]
    if not totals:
        return []
    counted = ", shared ones counted in each run" if len(runs) > 1 else ""
    total = f"All stages together{counted}: {', '.join(totals)}."
    return ["## Cost", *_picture(figures, "seconds"), total, table(tables.artifact_table(runs))]


def from_papers(runs: Sequence[RunArtifacts]) -> Blocks:
    """Published rows of the same set-up, in tables of their own."""
    blocks: Blocks = []
    for setup in published.matching(runs):
        blocks += [
            f"### {escape(setup['paper'])}: {escape(setup['base'])} to {setup['num_layers']} layers",
            table(_published_table(setup)),
            f"{setup['setup']} {setup['note']}",
        ]
    intro = "The papers' own numbers on the same base model. Data and metrics differ from those above: not one column."
    return ["## Published results", intro, *blocks] if blocks else []


def _published_table(setup: Mapping[str, Any]) -> Table:
    heads = list(dict.fromkeys(name for row in setup["rows"] for name in row["values"]))
    rows = []
    for row in setup["rows"]:
        after = row.get("after", TARGET_NAMES[row["target"]])
        rows.append([title_of(row["method"]), after, *(_published_value(name, row["values"]) for name in heads)])
    return Table(["method", "after", *heads], rows, text_columns=2)


def _published_value(name: str, values: Mapping[str, float]) -> str:
    if name not in values:
        return tables.NOTHING
    return number("acc", values[name]) if name.endswith(" acc") else f"{values[name]:g}"


def reproduction(runs: Sequence[RunArtifacts]) -> Blocks:
    """Commit, packages, and every stage's settings, once for all runs that share them."""
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
        whom = "" if len(used_by) == len(runs) else f" ({', '.join(used_by)})"
        blocks += [f"### Settings: {role}{escape(whom)}", code(settings, "json")]
    return blocks if users else []


def _environment(manifest: Mapping[str, Any]) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in manifest["packages"].items())
    return f"commit `{manifest['git_commit'] or 'unknown'}`; {escape(packages)}"


def _picture(figures: Mapping[str, str], name: str) -> Blocks:
    """The figure if it was drawn, with its caption."""
    return [figure(f"{name}.png", figures[name])] if name in figures else []


# --------------------------------------------------------------------------------------------------
# What papers report for the set-up at hand, never in one column with ours: their data and metrics are their own.
#
# ``published.json`` holds one entry a set-up: paper, base model, the configuration values that recognise it, the number
# of layers after expansion, a note on how the numbers were made, and the rows.

PUBLISHED = Path(__file__).with_name("published.json")


def matching(runs: Iterable[RunArtifacts]) -> list[dict[str, Any]]:
    """The set-ups whose base model, depth and method one of the runs shares."""
    runs = list(runs)
    return [setup for setup in read_json(PUBLISHED) if any(_is_setup_of(setup, run) for run in runs)]


def _is_setup_of(setup: Mapping[str, Any], run: RunArtifacts) -> bool:
    config, expansion = run.read("load", "config.json"), run.expansion()
    if config is None or expansion is None:
        return False
    same_base = all(_config_value(config, name) == value for name, value in setup["base_config"].items())
    same_depth = expansion["num_layers"] in (setup["num_layers"], expansion["num_base_layers"])
    return same_base and same_depth and run.method in {row["method"] for row in setup["rows"]}


def _config_value(config: Mapping[str, Any], name: str) -> Any:
    """One value of a model's configuration; Llama 3 and 3.1 differ in the kind of rotary embedding alone."""
    if name == "rope_type":
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        return rope.get("rope_type", "default")
    return config.get(name)
