"""The models that can be scored: a stage's, or one kept on the way through a training stage (``pretrain@20%``)."""

from __future__ import annotations

import re
from dataclasses import dataclass

MODEL_TARGETS = ("load", "expand", "pretrain", "sft")
TRAINING_STAGES = ("pretrain", "sft")
_ON_THE_WAY = re.compile(r"(pretrain|sft)@(\d+(?:\.\d+)?)%")


@dataclass(frozen=True)
class Target:
    """A stage's model, or the one after ``fraction`` of its steps."""

    stage: str
    fraction: float | None = None  # None: the finished model

    @classmethod
    def parse(cls, text: str) -> Target:
        """The inverse of ``str``.

        Raises:
            ValueError: it names no model.
        """
        if text in MODEL_TARGETS:
            return cls(text)
        match = _ON_THE_WAY.fullmatch(text)
        if match is None:
            raise ValueError(f"{text} is none of {', '.join(MODEL_TARGETS)}, nor like pretrain@20%")
        stage, fraction = match[1], float(match[2]) / 100
        if not 0 < fraction < 1:
            begin = "expand" if stage == "pretrain" else "pretrain"
            raise ValueError(f"{text} is not on the way; say {begin} for 0 % and {stage} for 100 %")
        return cls(stage, fraction)

    @classmethod
    def of_role(cls, role: str) -> Target:
        """The inverse of ``role``."""
        stage, _, at = role.removeprefix("evaluate/").partition("-at-")
        return cls(stage, float(at) / 100 if at else None)

    def __str__(self) -> str:
        return self.stage if self.fraction is None else f"{self.stage}@{percent(self.fraction)}%"

    @property
    def file_name(self) -> str:
        """As in names of files and jobs, which bear no ``%``: ``pretrain-at-20``."""
        return self.stage if self.fraction is None else f"{self.stage}-at-{percent(self.fraction)}"

    @property
    def role(self) -> str:
        """The name of the artifact that scores it."""
        return f"evaluate/{self.file_name}"

    @property
    def place(self) -> tuple[int, float]:
        """Sorts targets from the base to the tuned model."""
        return MODEL_TARGETS.index(self.stage), 1.0 if self.fraction is None else self.fraction


def percent(fraction: float) -> str:
    """0.2 as ``20``, 0.125 as ``12.5``."""
    return f"{100 * fraction:g}"
