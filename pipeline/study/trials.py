"""The runs of a study: which settings each has, whether it is finished, and what it measured.

A run is an ordinary run of the pipeline up to ``pretrain``. Its artifact's key says whether it exists, so a study keeps
no record of its own, and runs that were made by hand or for another study are reused.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.config import Settings
from pipeline.config.study import Study
from pipeline.driver.graph import Node
from pipeline.files import read_json
from pipeline.launch.workers import load_outcome
from pipeline.planning import FoundInputs, PreparedRun, prepare, with_inputs
from pipeline.planning.training import TrainingPlan, plan_training
from pipeline.tracking import METRICS_FILE, read_metrics
from pipeline.training.block_losses import LOSS_OF, BlockLosses
from pipeline.training.job import LOGS, TRAINING_FILE

Compose = Callable[[Sequence[str]], Settings]
STAGE = "pretrain"


@dataclass(frozen=True)
class Trial:
    """One training run of a study."""

    contender: str
    learning_rate: float
    steps: int
    seed: int
    final: bool  # False: for the choice of the learning rate only

    @property
    def name(self) -> str:
        """The run's directory below the contender's."""
        return f"rate-{self.learning_rate:g}_steps-{self.steps}_seed-{self.seed}"


@dataclass(frozen=True)
class Measured:
    """What a finished run measured. Losses are inf if training diverged.

    Attributes:
        held_out, validation, forgetting: the losses after training, in nats per token; forgetting is None without such
            a text.
        before: the same losses before training, by their names in training.json; only of final runs.
        blocks: the losses after training by block, by the same names. Empty if averaged weights are the result, and for
            a run by an earlier version.
        seconds_per_step: the median over the steps; inf if training diverged.
        keeps_depth: the expansion added no layer, so that ``before`` is the base model's.
    """

    held_out: float
    validation: float
    forgetting: float | None
    before: Mapping[str, float]
    blocks: Mapping[str, BlockLosses]
    steps: int
    tokens: int
    flops: int
    seconds: float
    seconds_per_step: float
    trained_parameters: int
    total_parameters: int
    keeps_depth: bool

    @property
    def diverged(self) -> bool:
        """Whether the loss was not finite."""
        return math.isinf(self.held_out)


DIVERGED = Measured(math.inf, math.inf, None, {}, {}, 0, 0, 0, math.inf, math.inf, 0, 0, False)


class Trials:
    """All runs of one study.

    Args:
        study: the study.
        bases: the composed settings of every contender, before those that the study sets.

    Attributes:
        study, bases: the same.
    """

    def __init__(self, study: Study, bases: Mapping[str, Settings]) -> None:
        self.study, self.bases = study, bases
        self._prepared: dict[Trial, PreparedRun] = {}
        self._measured: dict[Trial, Measured] = {}

    def settings(self, trial: Trial) -> Settings:
        """Returns the settings of a run. The same ones on the command line give the same artifact."""
        base = self.bases[trial.contender]
        changes = {
            "learning_rate": trial.learning_rate,
            "steps": trial.steps,
            "epochs": None,
            "evaluate_at": [0.0, 1.0] if trial.final else [1.0],
            "save_model": trial.final and self.study.save_models,
        }
        return base.model_copy(
            update={
                "name": f"{self.study.name}/{trial.contender}/{trial.name}",
                "seed": trial.seed,
                "stages": [STAGE],
                "pretrain": base.pretrain.model_copy(update=changes),
            }
        )

    def prepare(self, trials: Iterable[Trial]) -> list[PreparedRun]:
        """Works out the keys of some runs."""
        trials = list(trials)
        for trial in trials:
            if trial not in self._prepared:
                self._prepared[trial] = with_inputs(self.settings(trial), self._inputs[trial.contender])
        return [self._prepared[trial] for trial in trials]

    @cached_property
    def _inputs(self) -> dict[str, FoundInputs]:
        """What the runs of every contender read, looked up once, so that all runs of a command read the same."""
        seed = self.study.seeds[0]
        first = [self.settings(Trial(name, self.study.rates_of(name)[0], 1, seed, final=False)) for name in self.bases]
        return {name: found.inputs for name, found in zip(self.bases, prepare(first), strict=True)}

    def plan(self, trial: Trial) -> TrainingPlan | None:
        """Returns what training needs; None if the model's config is not known."""
        (prepared,) = self.prepare([trial])
        return plan_training(prepared, STAGE)

    def measured(self, trial: Trial) -> Measured | None:
        """Returns what a finished run measured, or None if it is not finished."""
        if trial not in self._measured:
            (prepared,) = self.prepare([trial])
            found = _read(prepared.nodes)
            if found is None:
                return None
            self._measured[trial] = found
        return self._measured[trial]

    def tokens_per_step(self, contender: str) -> int:
        """Returns the tokens of one optimizer step."""
        train = self.bases[contender].pretrain
        return train.global_batch * train.sequence_length

    @property
    def directory(self) -> Path:
        """The directory of the study, which contains those of its runs."""
        return Path(self.bases[self.study.reference].output_dir) / self.study.name

    @cached_property
    def token_steps(self) -> dict[str, int]:
        """The steps of every contender at the study's tokens."""
        return {name: max(1, round(self.study.tokens / self.tokens_per_step(name))) for name in self.bases}

    @property
    def final_tokens(self) -> str:
        """The tokens of the final runs, in words. These take whole steps, and batches may differ between contenders."""
        found = sorted({steps * self.tokens_per_step(name) for name, steps in self.token_steps.items()})
        return " to ".join(f"{tokens:,}" for tokens in dict.fromkeys([found[0], found[-1]])) + " tokens"


def _read(nodes: Mapping[str, Node]) -> Measured | None:
    node = nodes[STAGE]
    if not node.artifact.is_complete():
        # A loss that is not finite is the same on every attempt.
        if not load_outcome(node.artifact.partial / LOGS).get("diverged"):
            return None
        has_text = getattr(nodes["tokenize/corpus"].settings, "forgetting", None) is not None
        return replace(DIVERGED, forgetting=math.inf if has_text else None)
    training, expansion = read_json(node.artifact.path / TRAINING_FILE), nodes["expand"].artifact.path
    first, last = training["held_out"][0], training["held_out"][-1]
    # The exported weights are the averages, if there are any.
    averages = {name: loss for name, loss in training.get("ema", {}).items() if name != "decay"}
    after = {"held_out_loss": last["loss"], **last, **averages}
    record = read_json(expansion / "expansion.json")
    return Measured(
        held_out=after["held_out_loss"],
        validation=after["validation_loss"],
        forgetting=after.get("forgetting_loss"),
        before={} if first is last else {name: first[name] for name in LOSS_OF.values() if name in first},
        blocks={} if averages else {name: BlockLosses(**last["blocks"][name]) for name in last.get("blocks", {})},
        steps=training["steps"],
        tokens=training["tokens"],
        flops=training["flops"],
        seconds=training["seconds"],
        seconds_per_step=_seconds_per_step(node.artifact.path, training),
        trained_parameters=training["trainable_parameters"],
        total_parameters=training["total_parameters"],
        keeps_depth=record["num_layers"] == record["num_base_layers"],
    )


def _seconds_per_step(artifact: Path, training: Mapping[str, Any]) -> float:
    per_step = training["tokens"] / training["steps"]
    speeds = [
        line["tokens_per_second"] for line in read_metrics(artifact / METRICS_FILE) if "tokens_per_second" in line
    ]
    return per_step / statistics.median(speeds)
