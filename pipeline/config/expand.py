"""Settings of expand: one class a method."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.config.section import (
    Device,
    Fraction,
    NonNegative,
    NonNegativeFloat,
    NotInKey,
    Positive,
    PositiveFloat,
    Section,
)


class Expansion(Section):
    """What every method has."""

    min_base_layers: ClassVar[int] = 1

    device: Annotated[Device, NotInKey]  # where linear algebra runs; auto: a GPU where one is visible
    check_memory: Annotated[NonNegative, NotInKey]  # bytes; larger models (in float32) are checked layer by layer


class Expand(Expansion):
    """What every method that inserts layers has; each method's own class adds its settings."""

    new_layers: Positive
    position: Literal["top", "middle", "bottom", "interleaved"] | list[int]  # a list: the gap of every new layer


class LesaExpand(Expand):
    """LESA (arXiv 2502.13794): predicted matrices."""

    min_base_layers: ClassVar[int] = 3  # the predictor learns from layers with two neighbours

    method: Literal["lesa"]
    variant: str  # the preset the numbers below came from; for the record, never read by the method
    epochs: Positive
    norm_loss_weight: Fraction  # the loss's lambda
    learning_rate: PositiveFloat  # AdamW's; where standardized, as one over the width beyond 576 columns
    weight_decay: NonNegativeFloat  # AdamW's
    schedule: Literal["constant", "cosine"]  # of the learning rate; cosine has a short warm-up
    batch_size: Positive  # singular directions a step
    norm_batch: Positive  # singular directions over which the loss takes a norm; the authors': their batch
    hidden_size: Positive  # of the predictor
    standardized: bool  # inputs of unit variance, first predictions centred and of the targets' size; else raw
    norms: Literal["layer0", "neighbour", "average"]  # where a new layer's norms come from
    zero_init: bool  # zero the outputs, so that logits stay


class LlamaProExpand(Expand):
    """LLaMA Pro (arXiv 2401.02415): copies with zeroed outputs."""

    method: Literal["llama_pro"]


class OptDeusExpand(Expand):
    """OpT-DeUS (arXiv 2508.08011): neighbours fused by optimal transport, outputs zeroed."""

    method: Literal["opt_deus"]
    variant: str
    regularization: PositiveFloat  # Sinkhorn's entropic reg
    max_iterations: Positive
    marginal_error: PositiveFloat  # L1, at which a solve counts as converged
    rescale_plan: bool  # rows of the plan sum to one before fusing
    solver: Literal["log", "pot_float32"]  # pot_float32 is the authors' own call, underflow included


class SolarExpand(Expansion):
    """SOLAR (arXiv 2312.15166): the base's layers twice, overlapping."""

    method: Literal["solar"]
    new_layers: Positive
    position: Literal["overlap"]

    @field_validator("position", mode="before")
    @classmethod
    def _own_placement(cls, position: Any) -> Any:
        """A named position means nothing here and is recorded as ``overlap``."""
        if isinstance(position, list):
            raise ValueError("solar has a placement of its own; name any position and it is recorded as overlap")
        return "overlap" if position in ("top", "middle", "bottom", "interleaved") else position


class AverageExpand(Expand):
    """Mean of the two neighbours; a control."""

    method: Literal["average"]


class CopyExpand(Expand):
    """The lower neighbour once more; a control."""

    method: Literal["copy"]


class NoExpand(Expansion):
    """The base as it is; the control that says what continued training alone gives."""

    method: Literal["none"]
    new_layers: Literal[0]
    position: None

    @model_validator(mode="before")
    @classmethod
    def _ignore_placement(cls, values: Any) -> Any:
        """An experiment's new_layers and position mean nothing here and are recorded as 0 and none."""
        return {**values, "new_layers": 0, "position": None} if isinstance(values, dict) else values


AnyExpand = Annotated[
    LesaExpand | LlamaProExpand | OptDeusExpand | SolarExpand | AverageExpand | CopyExpand | NoExpand,
    Field(discriminator="method"),
]

METHODS = ("lesa", "llama_pro", "opt_deus", "solar", "average", "copy", "none")
