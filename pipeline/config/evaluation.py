"""Settings of evaluate and report, and the models that can be scored.

A target is a stage's model (``pretrain``), or a snapshot taken during a training stage (``pretrain@20%``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import field_validator

from pipeline.config.section import FilePath, Fraction, NonNegative, NotInKey, NotInKeyIf, Positive, Section

MODEL_TARGETS = ("load", "expand", "pretrain", "sft")
TRAINING_STAGES = ("pretrain", "sft")
_SNAPSHOT = re.compile(r"(pretrain|sft)@(\d+(?:\.\d+)?)%")


class Evaluate(Section):
    """Which lm-eval tasks are run, and on which models."""

    tasks: list[str]  # names known to lm-eval, bundled ones, or ones defined in include_path
    # A directory, or several, with lm-eval task YAMLs of your own. Their contents are in the key, the paths are not.
    include_path: Annotated[FilePath | list[FilePath] | None, NotInKey]
    targets: Annotated[list[str], NotInKey]  # load, expand, pretrain, sft, or a snapshot: pretrain@20%
    num_fewshot: NonNegative | dict[str, NonNegative] | None  # for all tasks, or per task; null: each task's own
    limit: Positive | None  # documents per task, at equal distances in its data
    held_out_characters: Positive  # of each source's held-out text, for the task held_out_text
    prompt_format: Literal["plain", "chat"]  # shared by all targets
    dtype: Literal["auto", "float32", "bfloat16"]  # of the weights; auto: bfloat16 if the hardware supports it
    backend: Annotated[Literal["hf", "vllm"], NotInKeyIf("hf")]  # what generates text; likelihoods are always by hf
    batch_size: Annotated[Positive, NotInKey]  # sequences; fewer where they are long
    sample_answers: Annotated[NonNegative, NotInKey]  # questions that every model answers for the report
    processes: Annotated[Positive | Literal["auto"], NotInKey]  # that score; auto: one per GPU, one on CPUs
    rescore: Annotated[bool, NotInKey]  # score a model even if its logits are proved to be those of a scored one

    def key_settings(self) -> dict[str, Any]:
        """Returns the settings that enter the key. It differs from when ``limit`` meant the first documents."""
        settings = super().key_settings()
        return settings if self.limit is None else {**settings, "limited_documents": "at equal distances"}

    @field_validator("targets")
    @classmethod
    def _normalize_targets(cls, targets: list[str]) -> list[str]:
        """Spells every target in one way and drops duplicates."""
        return list(dict.fromkeys(str(Target.parse(target)) for target in targets))

    def models(self) -> list[Target]:
        """Returns the models to score."""
        return [Target.parse(target) for target in self.targets]


class EvaluateSnapshot(Evaluate):
    """Scores a snapshot that training kept. ``driver/graph.py`` derives it from ``evaluate``."""

    fraction: Fraction  # of the training stage's steps


class Answers(Section):
    """Lets all finished models answer the same questions of held-out conversations, for readers of the report."""

    questions: Positive


class Report(Section):
    """What the report compares: one run, or the runs of a sweep."""

    runs: dict[str, str]  # run name -> expansion method


@dataclass(frozen=True)
class Target:
    """A stage's finished model, or its snapshot after ``fraction`` of the stage's steps."""

    stage: str
    fraction: float | None = None  # None: the finished model

    @classmethod
    def parse(cls, text: str) -> Target:
        """Parses a target. The inverse of ``str``.

        Raises:
            ValueError: the text names no model.
        """
        if text in MODEL_TARGETS:
            return cls(text)
        match = _SNAPSHOT.fullmatch(text)
        if match is None:
            raise ValueError(f"{text} must be one of {', '.join(MODEL_TARGETS)}, or a snapshot such as pretrain@20%")
        stage, fraction = match[1], float(match[2]) / 100
        if not 0 < fraction < 1:
            begin = "expand" if stage == "pretrain" else "pretrain"
            raise ValueError(f"{text} is not a snapshot during training; use {begin} for 0 % and {stage} for 100 %")
        return cls(stage, fraction)

    @classmethod
    def of_role(cls, role: str) -> Target:
        """Parses an artifact's role. The inverse of ``role``."""
        stage, _, at = role.removeprefix("evaluate/").partition("-at-")
        return cls(stage, float(at) / 100 if at else None)

    def __str__(self) -> str:
        return self.stage if self.fraction is None else f"{self.stage}@{percent(self.fraction)}%"

    @property
    def file_name(self) -> str:
        """For names of files and jobs, which cannot contain ``%``: ``pretrain-at-20``."""
        return self.stage if self.fraction is None else f"{self.stage}-at-{percent(self.fraction)}"

    @property
    def role(self) -> str:
        """The name of the artifact that holds its scores."""
        return f"evaluate/{self.file_name}"

    @property
    def order(self) -> tuple[int, float]:
        """Sorts targets from the base model to the tuned one."""
        return MODEL_TARGETS.index(self.stage), 1.0 if self.fraction is None else self.fraction


def percent(fraction: float) -> str:
    """Formats 0.2 as ``20``, 0.125 as ``12.5``."""
    return f"{100 * fraction:g}"
