"""Reads the YAML file of a study: ``+study=NAME`` is ``study/NAME.yaml`` in conf/ or in ``--config-dir``."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pipeline.config.messages import did_you_mean, explain_validation, list_choices
from pipeline.config.study import STUDY_SETS, Study, overridden
from pipeline.errors import UserError
from pipeline.files import merge_nested

EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")  # 1e-3, which YAML reads as text without a decimal point
OWN = "study."  # as in study.seeds=[1,2], a setting of the study itself


def asks_for_study(overrides: Iterable[str]) -> bool:
    """Whether a command line names a study."""
    return any(named_study(item) is not None for item in overrides)


def named_study(override: str) -> str | None:
    """Returns NAME of ``+study=NAME``, and None for other overrides."""
    key, equals, name = override.partition("=")
    return name if equals and key.lstrip("+") == "study" else None


def load_study(overrides: Sequence[str], folders: Sequence[Path]) -> tuple[Study, list[str]]:
    """Returns the study that a command line names, and the overrides that apply to its runs.

    Raises:
        UserError: there is no such study, its file is invalid, or an override sets what the study sets.
        YAMLError: its file is not YAML.
    """
    name = next(name for item in overrides if (name := named_study(item)) is not None)
    values = _read(name, folders)
    rest = []
    for item in overrides:
        key, _, value = item.partition("=")
        if key.lstrip("+").startswith(OWN):
            _set(values, key.lstrip("+").removeprefix(OWN), yaml.safe_load(value))
        elif named_study(item) is None:
            rest.append(item)
    try:
        study = Study.model_validate_json(json.dumps(_with_numbers(values)))
    except ValidationError as error:
        raise explain_validation(error, "study") from error
    _refuse_overrides(study, rest)
    return study, rest


def _read(name: str, folders: Sequence[Path], extending: Sequence[Path] = ()) -> dict[str, Any]:
    """Returns the content of a study's file, merged into that of the study that it extends.

    Its common overrides follow those of the extended one, so that they take precedence.

    Args:
        name: of the study.
        folders: where it is looked for, the last one first.
        extending: the files that extend it, directly or not.
    """
    files = [path for folder in reversed(folders) if os.path.isfile(path := folder / "study" / f"{name}.yaml")]
    if not files:
        known = list_choices("study", folders)
        raise UserError(
            setting="+study",
            value=name,
            rule="there is no such study; choose from " + ", ".join(known),
            remedy=did_you_mean(name, known) + "Set +study=NAME to one of these, or --config-dir to your conf/.",
        )
    # A file of the user's may extend the one of the same name in conf/.
    file = next((path for path in files if path not in extending), None)
    if file is None:
        raise UserError(
            setting=f"extends ({extending[-1]})",
            value=name,
            rule="a study cannot extend itself, nor one that extends it",
            remedy="Name another one, or leave it out.",
        )
    values = yaml.safe_load(file.read_text())
    if not isinstance(values, dict):
        raise UserError(setting="+study", value=file, rule="it has no settings", remedy="See conf/study/quick.yaml.")
    extended = values.pop("extends", None)
    if extended is None:
        return values
    base = _read(extended, folders, [*extending, file])
    return {**merge_nested(base, values), "common": [*base.get("common", []), *values.get("common", [])]}


def _with_numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_numbers(item) for item in value]
    return float(value) if isinstance(value, str) and EXPONENT.fullmatch(value) else value


def _set(values: dict[str, Any], name: str, value: Any) -> None:
    """Sets one setting of a study, such as ``contenders.copy.learning_rates``.

    Raises:
        UserError: a part of the name is of a setting that has no settings of its own, such as an entry of a list.
    """
    *path, last = name.split(".")
    for depth, key in enumerate(path):
        within = values.setdefault(key, {})
        if isinstance(within, list) and depth == 1 and path[0] == "contenders":
            within = values[key] = {"overrides": within, "learning_rates": None}  # what such a list stands for
        if not isinstance(within, dict):
            setting = ".".join(path[: depth + 1])
            raise UserError(
                setting=f"{OWN}{name}",
                value=value,
                rule=f"{OWN}{setting} has no settings of its own, and is only set as a whole",
                remedy=f"Set {OWN}{setting}=" + ("[VALUE,...]." if isinstance(within, list) else "VALUE."),
            )
        values = within
    values[last] = value


def _refuse_overrides(study: Study, rest: Sequence[str]) -> None:
    """Refuses overrides of what the study sets in every run, which would have no effect."""
    contenders = {f"contenders.{name}": contender.overrides for name, contender in study.contenders.items()}
    for where, overrides in {"common": study.common, **contenders, "command line": rest}.items():
        if (found := overridden(overrides, STUDY_SETS)) is not None:
            key, _, value = found.partition("=")
            raise UserError(
                setting=f"{key} (study, {where})",
                value=value,
                rule="a study sets this itself in every run",
                remedy="Remove it. Seeds, tokens and learning rates are settings of the study, such as study.tokens.",
            )
