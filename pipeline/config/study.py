"""Settings of a study: its contenders, seeds and budget, and how learning rates are tuned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from pipeline.config.section import Fraction, Line, NonNegative, Positive, PositiveFloat, RunName, Section, Seed


def _several_ascending(values: list[float]) -> list[float]:
    if sorted(set(values)) != values:
        raise ValueError("they must ascend, and none may occur twice")
    return values


def _distinct(values: list[int]) -> list[int]:
    if len(set(values)) != len(values):
        raise ValueError("none may occur twice")
    return values


Rates = Annotated[list[PositiveFloat], Field(min_length=2), AfterValidator(_several_ascending)]
Seeds = Annotated[list[Seed], Field(min_length=1), AfterValidator(_distinct)]


class Contender(Section):
    """One contender, as overrides of the pipeline's settings."""

    overrides: list[Line]
    learning_rates: Rates | None  # to tune it over instead of tune.learning_rates


def _from_list(value: Any) -> Any:
    """Accepts the overrides alone."""
    return {"overrides": value, "learning_rates": None} if isinstance(value, list) else value


class Tune(Section):
    """Successive halving (Jamieson and Talwalkar, arXiv 1502.07943) over learning rates, on the validation loss."""

    learning_rates: Rates
    seeds: Seeds
    rungs: Annotated[list[PositiveFloat], Field(min_length=1), AfterValidator(_several_ascending)]  # of the tokens
    keep: Fraction  # of the rates after each rung, but at least one
    max_new_rates: NonNegative  # per contender, beyond the grid while the best rate is at its edge

    @model_validator(mode="after")
    def _check_rungs(self) -> Tune:
        if self.rungs[-1] > 1:
            raise ValueError("rungs are fractions of the study's tokens, so none may exceed 1")
        return self


class Study(Section):
    """A comparison of contenders on one budget."""

    name: RunName
    common: list[Line]  # overrides of every run
    contenders: dict[str, Annotated[Contender, BeforeValidator(_from_list)]]
    reference: str  # the contender that the others are compared with, and whose FLOPs and seconds they get
    seeds: Seeds  # of the final runs
    tokens: Positive  # of every final run
    equal_flops: bool  # also run every contender for the FLOPs of the reference
    equal_seconds: bool  # also compare at the seconds of the reference
    save_models: bool  # of the final runs
    flops_per_second: PositiveFloat | None  # to estimate hours; null: as measured in finished runs of the study
    tune: Tune

    @model_validator(mode="after")
    def _check_together(self) -> Study:
        if len(self.contenders) < 2:
            raise ValueError("contenders: there must be at least two")
        if self.reference not in self.contenders:
            raise ValueError(f"reference: it must be one of the contenders {', '.join(self.contenders)}")
        if len(self.seeds) < 2:
            raise ValueError("seeds: at least two are needed for a standard error")
        if set(self.seeds) & set(self.tune.seeds):
            raise ValueError("tune.seeds: rates would be selected for the seeds they are compared on; use others")
        return self

    def rates_of(self, contender: str) -> list[float]:
        """Returns the learning rates that a contender's tuning begins with."""
        return self.contenders[contender].learning_rates or self.tune.learning_rates


# What a study sets in every run.
STUDY_SETS = (
    "name", "seed", "stages", "force", "pretrain.steps", "pretrain.epochs", "pretrain.learning_rate",
    "pretrain.evaluate_at", "pretrain.save_model",
)  # fmt: skip


def overridden(overrides: Iterable[str], names: Iterable[str]) -> str | None:
    """Returns the first override of one of the settings, or None."""
    keys: Mapping[str, str] = {item.partition("=")[0].lstrip("+~"): item for item in overrides}
    return next((keys[name] for name in names if name in keys), None)
