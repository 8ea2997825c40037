"""The artifacts of a finished run, as the report reads them: directories and the JSON files in them.

A role is the name of an artifact as in ``pipeline.artifacts.task``: ``load``, ``tokenize/corpus``, ``evaluate/sft``. A
role without a directory was not part of the run and reads as None. A directory is always complete, so a missing file in
it is an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.artifacts.task import ANSWERS, ANSWERS_FOLDER
from pipeline.config import MODEL_TARGETS, Target
from pipeline.evaluation.scores import Samples
from pipeline.expansion.layer_plan import recorded_gaps
from pipeline.expansion.methods import built_in_method
from pipeline.files import read_json
from pipeline.tracking import METRICS_FILE, read_metrics

ARTIFACT_ROLES = (
    "load", "expand", "tokenize/corpus", "tokenize/instructions", "pretrain", "sft",
    "evaluate/load", "evaluate/expand", "evaluate/pretrain", "evaluate/sft", ANSWERS,
)  # fmt: skip


@dataclass(frozen=True)
class RunArtifacts:
    """One run: its name, its expansion method, and role -> finished artifact directory."""

    name: str
    method: str
    directories: Mapping[str, Path]

    def read(self, role: str, file: str) -> Any | None:
        """Returns the contents of a JSON file of an artifact, or None if the run has no such artifact."""
        directory = self.directories.get(role)
        return None if directory is None else read_json(directory / file)

    def manifest(self, role: str) -> dict[str, Any] | None:
        """Returns key, settings, seconds, peak memory and packages, as ``driver/run.py`` recorded them."""
        return self.read(role, "manifest.json")

    def evaluation(self, target: str) -> dict[str, Any] | None:
        """Returns the scores of one model, under ``rows``. ``target`` is as in results.json."""
        return self.read(Target.parse(target).role, "evaluation.json")

    def samples(self, target: str) -> dict[str, dict[str, Samples]]:
        """Returns the values per document that the evaluation of one model kept.

        Returns:
            By the task of a score, the samples of each task that the score is computed from: the task itself, or all
            tasks of a group such as MMLU.
        """
        found: dict[str, dict[str, Samples]] = {}
        for file in sorted((self.directories[Target.parse(target).role] / "tasks").glob("*.json")):
            scored = read_json(file)
            found |= {task: {task: samples} for task, samples in scored["samples"].items()}
            found.setdefault(scored["task"], scored["samples"])
        return found

    def answers(self, target: str) -> list[dict[str, Any]]:
        """Returns what one model answered to questions of held-out conversations; empty if it was asked none."""
        directory = self.directories.get(ANSWERS)
        file = None if directory is None else directory / ANSWERS_FOLDER / f"{target}.json"
        return read_json(file) if file is not None and file.is_file() else []

    def scored_targets(self) -> list[str]:
        """Returns the models that were scored, from base to tuned, snapshots included."""
        named = [Target.of_role(role) for role in self.directories if role.startswith("evaluate/") and role != ANSWERS]
        return list(map(str, sorted(named, key=lambda target: target.order)))

    def training(self, stage: str) -> dict[str, Any] | None:
        """Totals and held-out losses of ``pretrain`` or ``sft``."""
        return self.read(stage, "training.json")

    def expansion(self) -> dict[str, Any] | None:
        """Returns which layers are new and where they come from."""
        return self.read("expand", "expansion.json")

    @property
    def method_title(self) -> str:
        """The method's display name."""
        recorded = (self.expansion() or {}).get("title")
        return recorded or title_of(self.method)

    @property
    def method_color(self) -> str | None:
        """The method's color in plots, or None if it has none."""
        method = built_in_method(self.method)
        recorded: str | None = (self.expansion() or {}).get("color")
        return recorded or (None if method is None else method.color)

    def new_layers(self) -> list[int]:
        """Indices of the new layers in the expanded model."""
        expansion = self.expansion() or {"layers": []}
        return [layer["layer"] for layer in expansion["layers"] if layer["new"]]

    def ranking(self) -> dict[str, Any] | None:
        """Returns how the base's layers were ranked on a probe text, or None if they were not."""
        manifest = self.manifest("expand")
        return None if manifest is None else manifest["metrics"].get("ranking")

    def chosen_layers(self) -> set[int]:
        """Returns the base layers after which new ones were added, or that train instead of new ones."""
        expansion = self.expansion()
        return set() if expansion is None else set(recorded_gaps(expansion))

    def keeps_logits(self) -> bool:
        """Returns whether the expansion stage verified that the expanded model's logits equal the base model's."""
        manifest = self.manifest("expand")
        return manifest is not None and manifest["metrics"]["check"]["logit_difference"] is not None

    def training_steps(self, stage: str) -> list[dict[str, Any]]:
        """Returns the lines of metrics.jsonl with a training loss, sorted by step; empty if the stage did not run."""
        directory = self.directories.get(stage)
        if directory is None:
            return []
        lines = read_metrics(directory / METRICS_FILE)
        return sorted((line for line in lines if "loss" in line), key=lambda line: line["step"])


def roles(runs: Sequence[RunArtifacts]) -> list[str]:
    """Returns ``ARTIFACT_ROLES``, followed by the scores of all runs' snapshots."""
    targets = {target for run in runs for target in run.scored_targets()} - set(MODEL_TARGETS)
    snapshots = sorted(map(Target.parse, targets), key=lambda target: target.order)
    return [*ARTIFACT_ROLES, *(target.role for target in snapshots)]


def labels(runs: Sequence[RunArtifacts]) -> dict[str, str]:
    """Maps each run's name to its label in tables and plots: the method, or the run's name if methods repeat."""
    methods = [run.method for run in runs]
    if len(set(methods)) == len(methods):
        return {run.name: run.method_title for run in runs}
    return {run.name: run.name.rsplit("/", 1)[-1] for run in runs}


def title_of(method: str) -> str:
    """Returns the display name of one of this repository's methods; any other name unchanged."""
    found = built_in_method(method)
    return method if found is None else found.title


def layouts(runs: Sequence[RunArtifacts]) -> list[tuple[list[RunArtifacts], dict[str, Any]]]:
    """Returns the runs that added layers, grouped by where their layers come from.

    Returns:
        For each group its runs and the contents of the first run's expansion.json.
    """
    groups: dict[str, tuple[list[RunArtifacts], dict[str, Any]]] = {}
    for run in runs:
        expansion = run.expansion()
        if expansion is not None and run.new_layers():
            layout = str([(layer["new"], layer["from"]) for layer in expansion["layers"]])
            groups.setdefault(layout, ([], expansion))[0].append(run)
    return list(groups.values())


# ---------------------------------------------------------------------------------------- build times

TIMED_STAGES = tuple(dict.fromkeys(role.partition("/")[0] for role in ARTIFACT_ROLES))


def seconds_by_stage(run: RunArtifacts) -> dict[str, float]:
    """Returns how long building each stage's artifacts took; several artifacts (tokenize, evaluate) are added up."""
    seconds: dict[str, float] = {}
    for role in roles([run]):
        manifest = run.manifest(role)
        if manifest is not None:
            stage = role.partition("/")[0]
            seconds[stage] = seconds.get(stage, 0.0) + manifest["seconds"]
    return seconds


def is_shared(runs: Sequence[RunArtifacts], stage: str) -> bool:
    """Returns whether all runs use the same artifacts of a stage, so that its time was spent once."""
    keys = [
        [
            manifest["key"]
            for role in roles(runs)
            if role.partition("/")[0] == stage and (manifest := run.manifest(role))
        ]
        for run in runs
    ]
    return len(runs) > 1 and all(keys_of_run == keys[0] for keys_of_run in keys)
