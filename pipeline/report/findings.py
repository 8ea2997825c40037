"""The report's sentences: what the numbers of a run or a sweep show, and what must not be concluded from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pipeline.config import TRAINING_STAGES
from pipeline.report.curves import LossChange, comparable_curves, curves
from pipeline.report.differences import Difference, Verdict, by_chance, leader
from pipeline.report.markup import escape
from pipeline.report.metrics import (
    PERPLEXITIES,
    TARGET_NAMES,
    base_metric,
    count,
    duration,
    is_share,
    number,
    preferred,
    scientific,
    significant,
    task_name,
    with_error,
)
from pipeline.report.results import Result
from pipeline.report.runs import RunArtifacts, labels, seconds_by_stage
from pipeline.report.scores import Scores
from pipeline.report.significance import expected_by_chance
from pipeline.report.tables import STEPS
from pipeline.training.block_losses import perplexity

OTHER_BLOCKS = "Held-out losses of runs with other held-out blocks are on different text, and cannot be compared."
SMALL_TOKENS = 100e6  # below this many pre-training tokens the report warns about the scale


def primary_metrics(scores: Scores) -> list[tuple[str, str]]:
    """Returns one (task, metric) per task, in the order of the evaluation."""
    tasks: dict[str, list[str]] = {}
    for task, metric in scores.task_metrics():
        tasks.setdefault(task, []).append(metric)
    return [(task, preferred(metrics, task)) for task, metrics in tasks.items()]


def title(runs: Sequence[RunArtifacts]) -> str:
    """Returns the report's first line."""
    if len(runs) > 1:
        return f"{sweep_name(runs)}: {len(runs)} runs side by side"
    return f"{runs[0].name}: {_growth(runs[0])}"


def sweep_name(runs: Sequence[RunArtifacts]) -> str:
    """Returns what the runs' names have in common up to their last slash."""
    stems = {run.name.rpartition("/")[0] for run in runs}
    return stems.pop() if len(stems) == 1 and stems != {""} else "sweep"


def _growth(run: RunArtifacts) -> str:
    expansion = run.expansion()
    if expansion is None or expansion["num_layers"] == expansion["num_base_layers"]:
        return "the base model, not expanded"
    return f"expanded from {expansion['num_base_layers']} to {expansion['num_layers']} layers with {run.method_title}"


# ------------------------------------------------------------------------------------------ one run


def headline(runs: Sequence[RunArtifacts], scores: Scores) -> str:
    """Returns the report's first paragraph: the outcome in a few sentences."""
    return _sweep_headline(runs) if len(runs) > 1 else _run_headline(runs[0], scores)


def _run_headline(run: RunArtifacts, scores: Scores) -> str:
    last = final_target(scores, [run])
    differences = _differences(scores, run.name, "load", last)
    texts = [d for d in differences if base_metric(d.metric) in PERPLEXITIES]
    others = [outcome(d) for d in differences if base_metric(d.metric) not in PERPLEXITIES]
    # If no text was scored, the training loop's own held-out loss takes its place.
    sentences = [_text_sentence(run, last, d) for d in texts] or _curve_sentence(run)
    if others:
        sentences.append(f"From base to {TARGET_NAMES[last]}: {'; '.join(others)}.")
    if last != "sft":  # tuning may lose on documents what it gains on questions
        tuned = [outcome(difference) for difference in _differences(scores, run.name, "load", "sft")]
        sentences += [f"From base to {TARGET_NAMES['sft']}: {'; '.join(tuned)}."] if tuned else []
    growth = escape(_growth(run))
    return " ".join([f"{growth[0].upper()}{growth[1:]}.", *sentences, *_cost_sentence(run)])


def _cost_sentence(run: RunArtifacts) -> list[str]:
    seconds = sum(seconds_by_stage(run).values())
    flops = sum(training["flops"] for stage in ("pretrain", "sft") if (training := run.training(stage)))
    if not flops:
        return []
    return [f"All stages took {duration(seconds)}, and training {scientific(flops)} FLOPs."]


def suggestions(run: RunArtifacts, scores: Scores) -> list[str]:
    """Returns what to try after a run, judged by its scores on text: sentences with the settings to change."""
    found = []
    pretrained, tuned = (_text_verdicts(scores, run.name, "load", after) for after in ("pretrain", "sft"))
    if pretrained and not pretrained & {Verdict.BETTER, Verdict.UNKNOWN}:
        found.append(
            "Pre-training did not improve held-out text: tune `pretrain.learning_rate` (`scripts/study`), or train on "
            "more tokens."
        )
    if Verdict.WORSE in tuned or Verdict.WORSE in _text_verdicts(scores, run.name, "pretrain", "sft"):
        mixed = (run.manifest("sft") or {}).get("settings", {}).get("corpus_fraction", 0.0) > 0.0
        means = "a lower `sft.learning_rate`" if mixed else "`sft.corpus_fraction=0.2` or a lower `sft.learning_rate`"
        found.append(f"Tuning lost on held-out text: try {means}.")
    if run.new_layers() and run.training("pretrain"):
        found.append(
            "Growing is worth it only if it beats the base trained as long: run `expand=none` with the same settings "
            "(in a sweep such as `--multirun expand=...,none`)."
        )
    return found


def _text_verdicts(scores: Scores, run: str, before: str, after: str) -> set[Verdict]:
    found = _differences(scores, run, before, after)
    return {difference.verdict for difference in found if base_metric(difference.metric) in PERPLEXITIES}


def _differences(scores: Scores, run: str, before: str, after: str) -> list[Difference]:
    """Returns the difference in the main metric of every task that was scored with both models."""
    found = (_difference(scores, run, before, after, task_metric) for task_metric in primary_metrics(scores))
    return [difference for difference in found if difference is not None]


def final_target(scores: Scores, runs: Sequence[RunArtifacts]) -> str:
    """Returns the target by which runs are compared.

    This is the pre-trained model if all runs have scored it, because tuning optimizes for conversations. Otherwise it
    is the last target that all runs have scored.
    """
    targets = [target for target in TARGET_NAMES if all(target in scores.targets(run.name) for run in runs)]
    return "pretrain" if "pretrain" in targets else targets[-1] if targets else "load"


def is_shared_base(scores: Scores, runs: Sequence[RunArtifacts], target: str) -> bool:
    """Returns whether a target is the base of all runs, whose scores say nothing about the runs."""
    return target == "load" and scores.shared_base([run.name for run in runs])


def _text_sentence(run: RunArtifacts, target: str, difference: Difference) -> str:
    training = run.training("pretrain")
    trained = "Pre-training" if training is None else f"Pre-training on {count(training['tokens'])} tokens"
    cause = {"expand": "Expansion", "pretrain": trained, "sft": f"{trained} and instruction tuning"}[target]
    task, metric = difference.after["task"], difference.after["metric"]
    before, after = difference.before["value"], difference.after["value"]
    if difference.verdict is Verdict.SAME:
        return f"{cause} left {_spoken(metric)} on {escape(task_name(task))} unchanged ({number(metric, before)})."
    verb = "lowered" if after < before else "raised"
    remark = "" if difference.verdict in (Verdict.BETTER, Verdict.WORSE) else f", {difference.verdict}"
    return (
        f"{cause} {verb} {_spoken(metric)} on {escape(task_name(task))} by "
        f"{100 * abs(after / before - 1):.1f} % relative to the base model "
        f"({number(metric, before)} → {number(metric, after)}{remark})."
    )


def _curve_sentence(run: RunArtifacts) -> list[str]:
    training, found = run.training("pretrain"), curves([run], "pretrain")
    if training is None or not found:
        return []
    (curve,) = found
    before, after = perplexity(curve.first["loss"]), perplexity(curve.result["loss"])
    loss = "" if curve.change is None else f"; the loss {loss_change(curve.change)}"
    if curve.averages:
        loss = f", that of the averages of the weights (loss {curve.result['loss']:.3f})"
    return [
        f"Pre-training on {count(training['tokens'])} tokens changed the expanded model's perplexity on held-out "
        f"blocks of the corpus from {significant(before)} to {significant(after)}{loss}."
    ]


def loss_change(change: LossChange) -> str:
    """Returns, for example, ``fell by 0.149 ± 0.012, paired over 16 blocks``."""
    verb = "fell" if change.value < 0 else "rose"
    return f"{verb} by {with_error('loss', abs(change.value), change.stderr)}, paired over {change.blocks} blocks"


def _difference(scores: Scores, run: str, before: str, after: str, task_metric: tuple[str, str]) -> Difference | None:
    first, second = scores.get(run, before, task_metric), scores.get(run, after, task_metric)
    return None if first is None or second is None or before == after else scores.difference(first, second)


def outcome(difference: Difference) -> str:
    """Returns, for example, ``general-English minimal pairs 81.4 % → 80.9 % (−0.5 points, within noise)``."""
    metric, task = difference.after["metric"], difference.after["task"]
    before, after = number(metric, difference.before["value"]), number(metric, difference.after["value"])
    what = escape(task_name(task)) + ("" if is_share(metric) else f", {_spoken(metric)}")
    change = "" if difference.verdict is Verdict.SAME else f"{difference.text(with_error=False)}, "
    return f"{what} {before} → {after} ({change}{difference.verdict})"


def _spoken(metric: str) -> str:
    return escape(metric.replace("_", " "))


# ------------------------------------------------------------------------------------------- a sweep


def _sweep_headline(runs: Sequence[RunArtifacts]) -> str:
    names = ", ".join(escape(name) for name in labels(runs).values())
    sentences = [f"A comparison of {names}."]
    groups = comparable_curves(runs, "pretrain")
    if len(groups) > 1:
        sentences.append(OTHER_BLOCKS)
    for group in groups:
        found = sorted(group.curves, key=lambda curve: curve.result["loss"])
        ranking = ", ".join(f"{escape(curve.label)} {curve.result['loss']:.3f}" for curve in found)
        reference = "" if group.base is None else f" (base model: {group.base:.3f})"
        data = f" with {escape(group.data)}" if group.data else ""
        sentences.append(f"Held-out loss after pre-training{data}, one run each{reference}: {ranking}.")
    return " ".join(sentences)


def lead_findings(scores: Scores, runs: Sequence[RunArtifacts], target: str) -> list[str]:
    """Returns one sentence per task: which run has the best value, and which runs are within noise of it."""
    names = labels(runs)
    if is_shared_base(scores, runs, target):
        return []
    found = []
    for task, metric in primary_metrics(scores):
        line = [scores.get(run.name, target, (task, metric)) for run in runs]
        first = leader(line)
        if first is not None:
            found.append(_lead_sentence(scores, first, line, names))
    return found


def _lead_sentence(scores: Scores, first: Result, line: Sequence[Result | None], names: dict[str, str]) -> str:
    task, metric = first["task"], first["metric"]
    where = escape(task_name(task))
    ahead = (
        f"{escape(names[first['run']])} has the best {_spoken(metric)} on {where} ({number(metric, first['value'])})"
    )
    if scores.best(line) is first:
        return f"{ahead}, significantly ahead of all others."
    others = [result for result in line if result is not None and result is not first]
    verdicts = {result["run"]: scores.difference(result, first, len(others) + 1).verdict for result in others}
    if Verdict.UNKNOWN in verdicts.values():
        return f"{ahead}, but without standard errors this lead may be noise."
    rivals = [names[run] for run, verdict in verdicts.items() if verdict is not Verdict.BETTER]
    return f"{ahead}, but within noise of {', '.join(map(escape, rivals))}."


# --------------------------------------------------------------------------------------- comparisons


def number_of_comparisons(runs: Sequence[RunArtifacts], scores: Scores) -> list[str]:
    """Returns sentences on how many differences the tables of scores judge, and how many would count by chance."""
    judged = by_chance(verdict for run in runs for verdict in _verdicts(scores, run.name, with_steps=len(runs) == 1))
    found = []
    if judged:
        which = "from the base and between stages" if len(runs) == 1 else "from the base"
        found.append(
            f"Of all differences {which}, {judged}; each is judged alone, without a correction for their number."
        )
    rows = _rows_with_a_leader(runs, scores) if len(runs) > 1 else 0
    if rows:
        found.append(
            "Differences from the best of several methods are judged by Tukey's studentized range unless it beats all "
            f"others, since it is chosen after looking: in about {expected_by_chance(rows)} of {rows} rows, one or "
            "more would be significant by chance alone."
        )
    return found


def _verdicts(scores: Scores, run: str, with_steps: bool) -> Iterator[Verdict]:
    """Yields the verdicts on all models of a run compared with the base, and those on the steps between stages."""
    pairs = [("load", target) for target in scores.all_targets(run) if target != "load"]
    if with_steps:
        pairs += [step for step in STEPS if step not in pairs]
    for task_metric in scores.task_metrics():
        for before, after in pairs:
            first, second = scores.get(run, before, task_metric), scores.get(run, after, task_metric)
            if first is not None and second is not None:
                yield scores.difference(first, second).verdict


def _rows_with_a_leader(runs: Sequence[RunArtifacts], scores: Scores) -> int:
    """Counts the rows in which at least one difference from the best method can be judged."""
    target = final_target(scores, runs)
    lines = ([scores.get(run.name, target, task_metric) for run in runs] for task_metric in scores.task_metrics())
    return sum(_is_judged(scores, line) for line in lines)


def _is_judged(scores: Scores, line: Sequence[Result | None]) -> bool:
    best = leader(line)
    others = [result for result in line if result is not None and result is not best]
    return best is not None and any(scores.difference(best, other).verdict.could_count for other in others)


# ------------------------------------------------------------------------------------------- caveats


def caveats(runs: Sequence[RunArtifacts], scores: Scores) -> list[str]:
    """Returns sentences about what must not be concluded from the report's numbers."""
    return [
        _seed_caveat(runs),
        "A difference counts if it is significant at the level of 5 % (two-sided t test; 2.0 standard errors for many "
        "documents) and at least six documents changed. Both models are scored on the same documents, so the standard "
        "error is taken over pairs of them, or over clusters where documents name theirs, and can be far smaller than "
        "the errors of the two scores. Perplexities are compared by the logarithm of their ratio.",
        *_unpaired_caveats(scores),
        *_data_caveats(runs),
        *_size_caveats(runs),
        *_held_out_caveats(runs),
        *_comparison_caveats(runs),
        *_evaluation_caveats(runs, scores),
    ]


def _seed_caveat(runs: Sequence[RunArtifacts]) -> str:
    # Of stages that draw no random numbers, which may include the expansion, manifests record seed 0.
    manifests = [manifest for run in runs for role in TRAINING_STAGES if (manifest := run.manifest(role))]
    manifests = manifests or [manifest for run in runs if (manifest := run.manifest("expand"))]
    seeds = sorted({str(manifest["seed"]) for manifest in manifests})
    return (
        f"Every row is a single run (seed {escape(', '.join(seeds))}). Standard errors are over the documents of a "
        "task and do not include the variation between seeds."
    )


def _unpaired_caveats(scores: Scores) -> list[str]:
    affected = [escape(f"{task} {metric}") for task, metric in scores.unpaired()]
    if not affected:
        return []
    return [
        f"Some differences in {', '.join(affected)} have no standard error over pairs, because the models were scored "
        "on different documents or the score is not a mean over documents. √(se₁² + se₂²) is used for these, as for "
        "independent scores."
    ]


def _data_caveats(runs: Sequence[RunArtifacts]) -> list[str]:
    """Returns what tokenizing warned about, such as dropped conversations, once for all runs that share the data."""
    manifests = [run.manifest(f"tokenize/{purpose}") for purpose in ("corpus", "instructions") for run in runs]
    found = [warning for manifest in manifests if manifest for warning in manifest["metrics"].get("warnings", ())]
    return [escape(warning) for warning in dict.fromkeys(found)]


def _size_caveats(runs: Sequence[RunArtifacts]) -> list[str]:
    tokens = [training["tokens"] for run in runs if (training := run.training("pretrain"))]
    if not tokens or max(tokens) >= SMALL_TOKENS:
        return []
    return [
        f"Pre-training saw {count(max(tokens))} tokens, while the papers use billions. The results do not show which "
        "method is best at scale."
    ]


def _held_out_caveats(runs: Sequence[RunArtifacts]) -> list[str]:
    found = []
    measured = {
        (manifest["settings"]["held_out_blocks"], manifest["settings"]["sequence_length"], _has_loss_errors(run))
        for run in runs
        if (manifest := run.manifest("pretrain"))
    }
    for blocks, length, has_errors in sorted(measured):
        error = (
            ". Its standard error is over these blocks, and too small if several of them are parts of one document"
            if has_errors
            else " and has no standard error"
        )
        found.append(f"The held-out loss is a mean over at most {blocks} blocks of {length} tokens{error}.")
    if any(len(comparable_curves(runs, stage)) > 1 for stage in TRAINING_STAGES):
        found.append(OTHER_BLOCKS)
    if any(run.training("sft") for run in runs):
        found.append(
            "The held-out loss during instruction tuning is measured on conversations and cannot be compared with the "
            "loss on the corpus."
        )
    return found


def _has_loss_errors(run: RunArtifacts) -> bool:
    points = (run.training("pretrain") or {"held_out": []})["held_out"]
    return any(point.get("loss_stderr") is not None for point in points)


def _comparison_caveats(runs: Sequence[RunArtifacts]) -> list[str]:
    if len(runs) < 2:
        return []
    found = []
    if len({run.method for run in runs}) > 1:
        found.append(
            "Unless the settings below differ, all methods share one learning rate. The best learning rate depends on "
            "the method and can matter more than the method itself."
        )
    trained = sorted({training["trainable_parameters"] for run in runs if (training := run.training("pretrain"))})
    if len(trained) > 1:
        found.append(
            f"The runs train different numbers of parameters ({count(trained[0])} to {count(trained[-1])}), so they "
            "differ in more than their initialization."
        )
    tokens = sorted({training["tokens"] for run in runs if (training := run.training("pretrain"))})
    if len(tokens) > 1:
        found.append(
            f"The runs train on different numbers of tokens ({count(tokens[0])} to {count(tokens[-1])}), so their "
            "scores and their losses after training are not at equal budgets."
        )
    places = {tuple(run.new_layers()) for run in runs if run.new_layers()}
    if len(places) > 1:
        found.append(
            "The new layers are not at the same places in all runs, so placement and initialization are confounded."
        )
    return found


def _evaluation_caveats(runs: Sequence[RunArtifacts], scores: Scores) -> list[str]:
    found = []
    evaluations = [e for run in runs for target in scores.targets(run.name) if (e := run.evaluation(target))]
    formats = sorted({str(evaluation["prompt_format"]) for evaluation in evaluations})
    if len(formats) > 1:
        found.append(
            f"The models were scored with different prompt formats ({escape(', '.join(formats))}). Do not compare them."
        )
    dtypes = sorted({str(evaluation["dtype"]) for evaluation in evaluations})
    if len(dtypes) > 1:
        found.append(
            f"The models were scored in different precisions ({escape(', '.join(dtypes))}), so their differences "
            "include rounding. `force=[evaluate]` scores all of them again."
        )
    limits = {m["settings"]["limit"] for run in runs if (m := run.manifest("evaluate/load"))} - {None}
    if limits:
        found.append(f"At most {max(limits)} documents of every task were scored, at equal distances in its data.")
    for run in runs:
        absent = [TARGET_NAMES[t] for t in TARGET_NAMES if t in run.directories and t not in scores.targets(run.name)]
        if absent:
            found.append(f"Not scored in {escape(run.name)}: {', '.join(absent)}.")
    return found
