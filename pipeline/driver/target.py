"""The finished models that ``action=chat`` and ``action=export`` are about: those of a run's stages, or directories."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import MODEL_TARGETS, Model, Settings, Target, Train
from pipeline.config.messages import did_you_mean
from pipeline.driver.graph import Node
from pipeline.errors import UserError
from pipeline.models.source import ModelSource, resolve


@dataclass(frozen=True)
class FinishedModel:
    """A model directory.

    Attributes:
        setting: the setting that named it.
        name: the name of a stage, or the path as it was given.
        source: its files.
    """

    setting: str
    name: str
    directory: Path
    source: ModelSource


def requested_targets(run: Settings) -> tuple[str, list[str]]:
    """Returns which models the command is about, and the setting that names them.

    Raises:
        UserError: there is no such target.
    """
    setting, names = "target", [run.target or run.training_stages[-1]]
    if run.action == "chat" and run.compare:
        setting, names = "compare", run.compare
    for name in names:
        if name not in MODEL_TARGETS and not os.path.isdir(os.path.expanduser(name)):
            raise _unknown(setting, name)
    return setting, list(dict.fromkeys(names))


def finished_models(
    run: Settings, names: Sequence[str], setting: str, nodes: Mapping[str, Node]
) -> list[FinishedModel]:
    """Finds model directories.

    Args:
        run: the settings.
        names: stages and directories.
        setting: the setting that names them.
        nodes: the graph; empty if no stage is named.

    Raises:
        UserError: the model of a stage has not been built or saved, or a directory does not contain a complete
            model.
    """
    return [_finished_model(run, name, setting, nodes) for name in names]


def _finished_model(run: Settings, name: str, setting: str, nodes: Mapping[str, Node]) -> FinishedModel:
    if name not in MODEL_TARGETS:
        directory = Path(name).expanduser()
        try:
            return FinishedModel(setting, name, directory, resolve(_model_in(directory, run.model)))
        except UserError as error:
            rule, remedy = error.rule, f"Set {setting} to a stage or to the directory of a complete model."
            raise UserError(setting=setting, value=name, rule=rule, remedy=remedy) from error
    node = nodes[name]
    if not node.artifact.is_complete():
        raise UserError(
            setting=setting,
            value=name,
            rule=f"{run.name} has no finished {name} with these settings",
            remedy=f"Build it first: the same command with action=run and stages=[{name}].",
        )
    if isinstance(node.settings, Train) and not node.settings.save_model:
        raise UserError(
            setting=setting,
            value=name,
            rule="only the metrics of that training were kept",
            remedy=f"Set {name}.save_model=true and run it again.",
        )
    return FinishedModel(setting, name, node.artifact.path, resolve(_model_in(node.artifact.path, run.model)))


def _model_in(directory: Path, model: Model) -> Model:
    own = {"path": str(directory), "revision": None, "gguf_file": None, "package": None, "shape": None}
    return model.model_copy(update=own)


def _unknown(setting: str, name: str) -> UserError:
    try:
        is_snapshot = Target.parse(name).fraction is not None
    except ValueError:
        is_snapshot = False
    stages = ", ".join(MODEL_TARGETS)
    if is_snapshot:
        rule = "a snapshot holds only the trained weights and is not a complete model"
    else:
        rule = f"it must be one of {stages}, or a model directory, and there is no such directory"
    remedy = f"Set {setting} to one of {stages}, or to a directory."
    return UserError(setting=setting, value=name, rule=rule, remedy=did_you_mean(name, MODEL_TARGETS) + remedy)
