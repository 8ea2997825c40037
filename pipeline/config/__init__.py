"""All settings: their types, units and meaning, and the rules between them.

Default values are in ``conf/*.yaml`` only, so fields have none here. Sections are frozen and strict: unknown keys,
wrong types and values out of range are rejected. Fields marked ``NotInKey`` cannot change the numbers of a result and
are not part of an artifact's key. Nothing here imports torch or reads files.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import TypeAdapter, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from pipeline.config.actions import Chat, Export
from pipeline.config.data import Data, Source, Split, Tokenize
from pipeline.config.evaluation import (
    MODEL_TARGETS,
    TRAINING_STAGES,
    Answers,
    Evaluate,
    EvaluateSnapshot,
    Report,
    Target,
)
from pipeline.config.execution import Launch, Resources, Slurm, Tracking
from pipeline.config.expand import METHODS, AnyExpand, Expand
from pipeline.config.model import Model
from pipeline.config.section import STAGE_NAMES, Line, NotInKey, OutputDir, RunName, Section, Seed, StageName
from pipeline.config.training import DeepSpeed, Train

__all__ = [
    "METHODS", "MODEL_TARGETS", "STAGE_NAMES", "STAGE_SETTINGS", "TRAINING_STAGES", "Answers",
    "AnyExpand", "Chat", "Data", "DeepSpeed", "Evaluate", "EvaluateSnapshot", "Expand", "Export", "Launch", "Model",
    "NotInKey", "Report", "Resources", "Section", "Settings", "Slurm", "Source", "Split", "Target", "Tokenize",
    "Tracking", "Train",
]  # fmt: skip


class Settings(Section):
    """The settings of one run."""

    name: RunName
    seed: Seed
    output_dir: OutputDir
    group_writable: bool  # let the group write to everything that is created, for a shared output_dir
    action: Literal["run", "plan", "submit", "status", "verify", "clean", "chat", "export"]
    watch: bool  # with action=status: repeat it until all artifacts are complete
    dry_run: bool  # with action=submit or export: say what would be submitted or written, and change nothing
    confirm: bool  # with action=clean: remove what is listed otherwise
    target: Line | None  # with action=chat or export: a stage or a model directory; null: the last training stage
    compare: list[Line]  # with action=chat: several of them instead, which answer the same questions
    chat: Chat
    export: Export
    stages: list[StageName]
    force: list[StageName]
    model: Model
    expand: AnyExpand
    data: Data
    pretrain: Train
    sft: Train
    evaluate: Evaluate
    tracking: Tracking
    launch: Launch
    slurm: Slurm

    @field_validator("dry_run")
    @classmethod
    def _is_possible(cls, dry_run: bool, info: ValidationInfo) -> bool:
        """Refuses it where it would have no effect on an action that changes something."""
        instead = {
            "run": "Leave it out, or set action=plan, which shows what would be done.",
            "clean": "Leave it out: without confirm=true, action=clean only lists.",
        }
        if dry_run and (remedy := instead.get(info.data.get("action", ""))):
            rule = "only action=submit and action=export have a dry run"
            raise PydanticCustomError("dry_run", "{rule}", {"rule": rule, "remedy": remedy})
        return dry_run

    @property
    def tunes(self) -> bool:
        """Whether the run has conversations, and with them instruction tuning."""
        return self.data.instructions is not None

    @property
    def training_stages(self) -> tuple[str, ...]:
        """The stages of the run that train a model, in order."""
        return TRAINING_STAGES if self.tunes else ("pretrain",)

    @property
    def summary(self) -> str:
        """What distinguishes the run from others, for the first line of its plan and its output."""
        untuned = "" if self.tunes else ", without instruction tuning (data.instructions=null)"
        return f"{self.expand.method}, seed {self.seed}{untuned}"

    @property
    def reads_data(self) -> bool:
        """Whether a chosen stage depends on the corpus or the instructions."""
        return not set(self.stages) <= ({"load"} if self.expansion.ranked_position else {"load", "expand"})

    @property
    def expansion(self) -> Expand:
        """The settings of expand, which depend on whether a training stage trains ``matched`` layers."""
        matched = any("matched" in getattr(self, stage).trainable_terms for stage in self.training_stages)
        return self.expand.with_matched_layers() if matched else self.expand

    @property
    def scores_models(self) -> bool:
        """Whether a chosen stage depends on benchmark scores."""
        return not {"evaluate", "report"}.isdisjoint(self.stages)

    @property
    def only_names_artifacts(self) -> bool:
        """Whether the command is about artifacts that exist, so that nothing that would build them is looked up."""
        return self.action in ("status", "verify", "chat", "export")

    @property
    def is_read_only(self) -> bool:
        """Whether the command must not change any file of the runs."""
        return self.action in ("plan", "status", "verify", "chat", "export") or (
            self.action == "submit" and self.dry_run
        )


STAGE_SETTINGS: dict[str, TypeAdapter[Any]] = {
    "load": TypeAdapter(Model),
    "expand": TypeAdapter(AnyExpand),
    "tokenize": TypeAdapter(Tokenize),
    "pretrain": TypeAdapter(Train),
    "sft": TypeAdapter(Train),
    "evaluate": TypeAdapter(EvaluateSnapshot | Evaluate | Answers),
    "report": TypeAdapter(Report),
}
