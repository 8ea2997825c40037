"""What a reader must not conclude from a report's numbers."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.comparison.markdown import escape
from pipeline.comparison.measures import TARGET_NAMES, count
from pipeline.comparison.run_artifacts import RunArtifacts
from pipeline.comparison.scores import Scores

SMALL_TOKENS = 100e6


def caveats(runs: Sequence[RunArtifacts], scores: Scores) -> list[str]:
    """What a reader must not conclude from these numbers."""
    return [
        _seed_caveat(runs),
        "A difference counts when it exceeds two of its standard errors and at least six documents changed. Both "
        "models are scored on the same documents, so the error is taken over pairs of them: it can be far smaller than "
        "the errors of the two scores. Of differences without any effect, about one in twenty still counts.",
        *_unpaired_caveats(scores),
        *_size_caveats(runs),
        *_held_out_caveats(runs),
        *_comparison_caveats(runs),
        *_evaluation_caveats(runs, scores),
    ]


def _unpaired_caveats(scores: Scores) -> list[str]:
    measures = [escape(f"{task} {metric}") for task, metric in scores.unpaired()]
    if not measures:
        return []
    return [
        f"Not all differences in {', '.join(measures)} have errors over pairs: the models were scored on other "
        "documents, or the score is no mean over documents. There √(se₁² + se₂²) stands, as for independent scores."
    ]


def _seed_caveat(runs: Sequence[RunArtifacts]) -> str:
    manifests = [manifest for run in runs for role in ("expand", "pretrain") if (manifest := run.manifest(role))]
    seeds = sorted({str(manifest["seed"]) for manifest in manifests})
    return (
        f"One run a row (seed {', '.join(seeds)}). Standard errors are over the documents of a task; they say nothing "
        "about what another seed would give."
    )


def _size_caveats(runs: Sequence[RunArtifacts]) -> list[str]:
    tokens = [training["tokens"] for run in runs if (training := run.training("pretrain"))]
    if not tokens or max(tokens) >= SMALL_TOKENS:
        return []
    return [
        f"Pre-training saw {count(max(tokens))} tokens; the papers use billions. This shows what happened here, "
        "not which method is best at scale."
    ]


def _held_out_caveats(runs: Sequence[RunArtifacts]) -> list[str]:
    found = []
    sizes = {
        (manifest["settings"]["held_out_blocks"], manifest["settings"]["sequence_length"])
        for run in runs
        if (manifest := run.manifest("pretrain"))
    }
    for blocks, length in sorted(sizes):
        found.append(
            f"The held-out loss is a mean over at most {blocks} blocks of {length} tokens and has no standard error."
        )
    if any(run.training("sft") for run in runs):
        found.append("Held-out loss while tuning is on conversations and cannot be compared with that on the corpus.")
    return found


def _comparison_caveats(runs: Sequence[RunArtifacts]) -> list[str]:
    if len(runs) < 2:
        return []
    found = []
    if len({run.method for run in runs}) > 1:
        found.append(
            "Unless the settings below say otherwise, all methods share one learning rate. The best rate differs by "
            "method and can move the result more than the method does."
        )
    trained = sorted({training["trainable_parameters"] for run in runs if (training := run.training("pretrain"))})
    if len(trained) > 1:
        found.append(
            f"The runs train different numbers of parameters ({count(trained[0])} to {count(trained[-1])}): "
            "what they start from is not the only difference."
        )
    places = {tuple(run.new_layers()) for run in runs if run.new_layers()}
    if len(places) > 1:
        found.append(
            "The new layers do not stand at the same places, so that placement and initialisation are confounded."
        )
    return found


def _evaluation_caveats(runs: Sequence[RunArtifacts], scores: Scores) -> list[str]:
    found = []
    evaluations = [e for run in runs for target in scores.targets(run.name) if (e := run.evaluation(target))]
    formats = sorted({str(evaluation["prompt_format"]) for evaluation in evaluations})
    if len(formats) > 1:
        found.append(f"Scores were taken with different prompt formats ({', '.join(formats)}): do not compare them.")
    limits = {m["settings"]["limit"] for run in runs if (m := run.manifest("evaluate/load"))} - {None}
    if limits:
        found.append(f"Every task was cut to its first {max(limits)} documents.")
    for run in runs:
        absent = [TARGET_NAMES[t] for t in TARGET_NAMES if t in run.directories and t not in scores.targets(run.name)]
        if absent:
            found.append(f"Not scored in {escape(run.name)}: {', '.join(absent)}.")
    return found
