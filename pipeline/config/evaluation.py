"""Settings of evaluate and report."""

from __future__ import annotations

from typing import Annotated, Literal

from pipeline.config.section import NonNegative, NotInKey, Positive, Section


class Evaluate(Section):
    """lm-eval over a set of targets."""

    tasks: list[str]  # names known to lm-eval, or the bundled ones
    targets: Annotated[list[Literal["load", "expand", "pretrain", "sft"]], NotInKey]
    num_fewshot: NonNegative | dict[str, NonNegative] | None  # for all tasks, or by task; null: each task's own
    limit: Positive | None  # documents a task
    held_out_characters: Positive  # of the corpus's held-out text, for the task held_out_text
    prompt_format: Literal["plain", "chat"]  # one for all targets of a table
    dtype: Literal["auto", "float32", "bfloat16"]  # of the weights; auto: bfloat16 on a GPU, float32 on a CPU
    batch_size: Annotated[Positive, NotInKey]  # sequences, fewer where they are long


class Report(Section):
    """What the report sets side by side: one run, or the runs of a sweep."""

    runs: dict[str, str]  # the run's name -> its expansion method
