"""Settings of evaluate and report."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import field_validator

from pipeline.config.section import Fraction, NonNegative, NotInKey, Positive, Section
from pipeline.config.targets import Target


class Evaluate(Section):
    """lm-eval over a set of targets."""

    tasks: list[str]  # names known to lm-eval, or the bundled ones
    targets: Annotated[list[str], NotInKey]  # load, expand, pretrain, sft, or a model on the way: pretrain@20%
    num_fewshot: NonNegative | dict[str, NonNegative] | None  # for all tasks, or by task; null: each task's own
    limit: Positive | None  # documents a task
    held_out_characters: Positive  # of every source's held-out text, for the task held_out_text
    prompt_format: Literal["plain", "chat"]  # one for all targets of a table
    dtype: Literal["auto", "float32", "bfloat16"]  # of the weights; auto: bfloat16 on a GPU, float32 on a CPU
    batch_size: Annotated[Positive, NotInKey]  # sequences, fewer where they are long

    @field_validator("targets")
    @classmethod
    def _each_names_a_model(cls, targets: list[str]) -> list[str]:
        """Written in one way, each once."""
        return list(dict.fromkeys(str(Target.parse(target)) for target in targets))

    def models(self) -> list[Target]:
        """What is to be scored."""
        return [Target.parse(target) for target in self.targets]

    def on_the_way(self) -> list[Target]:
        """Those of them that are no stage's finished model."""
        return [target for target in self.models() if target.fraction is not None]


class EvaluateOnTheWay(Evaluate):
    """Scores a model that training kept on the way (built by graph.py from ``evaluate``)."""

    fraction: Fraction  # of the training stage's steps


class Report(Section):
    """What the report sets side by side: one run, or the runs of a sweep."""

    runs: dict[str, str]  # the run's name -> its expansion method
