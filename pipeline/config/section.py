"""The base class of all groups of settings, and types for single settings."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import reduce
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

StageName = Literal["load", "expand", "tokenize", "pretrain", "sft", "evaluate", "report"]
STAGE_NAMES: tuple[StageName, ...] = get_args(StageName)

MAX_NAME_BYTES = 255  # of a file or directory, on all common file systems
MAX_PATH_BYTES = 4095  # on Linux
# Entries of <output_dir>, and of <output_dir>/<name>, that are not runs.
RESERVED_FIRST = ("artifacts",)
RESERVED_LATER = (*STAGE_NAMES, "slurm", "wandb", "tensorboard", "mlruns", "export")


def setting_value(settings: object, name: str) -> Any:
    """Returns the value of a setting by its dotted name."""
    return reduce(getattr, name.split("."), settings)


class NotInKey:
    """Marks a field that can change the speed of a stage but not its numbers."""


@dataclass(frozen=True)
class NotInKeyIf:
    """Marks a field that enters the key only if it differs from ``value``.

    For fields that older artifacts were made without: ``value`` is what the stage did then.
    """

    value: Any


def _one_line(text: str) -> str:
    if not text.strip() or not text.isprintable():
        raise ValueError("it must be one line of printable characters")
    return text


def _run_name(name: str) -> str:
    """Checks that a run's directory is inside ``output_dir``, and that no artifact or other run is there."""
    parts = name.split("/")
    for part in parts:
        if not part or part != part.strip() or part in (".", "..") or not part.isprintable():
            raise ValueError(
                "it must be a relative path of printable names, without '..', without spaces around '/' and without a "
                "'/' at its beginning or end, because it is the run's directory in output_dir"
            )
        if len(part.encode()) > MAX_NAME_BYTES:
            raise ValueError(f"each part of it must have at most {MAX_NAME_BYTES} bytes, as the name of a directory")
    if parts[0] in RESERVED_FIRST:
        raise ValueError(f"{parts[0]} is the directory of all runs' artifacts")
    if taken := [part for part in parts[1:] if part in RESERVED_LATER]:
        raise ValueError(f"{taken[0]} is an entry of the directory of another run")
    return name


def _path(path: str) -> str:
    """Checks that the system accepts a path, since otherwise every look-up of it fails."""
    if not path.strip():  # would be the current directory
        raise ValueError("it is empty, as from a shell variable that is not set")
    encoded = path.encode(errors="surrogatepass")
    if b"\0" in encoded:
        raise ValueError("a path cannot contain a null byte")
    if len(encoded) > MAX_PATH_BYTES or any(len(part) > MAX_NAME_BYTES for part in encoded.split(b"/")):
        raise ValueError(
            f"a path has at most {MAX_PATH_BYTES:,} bytes, and each name in it at most {MAX_NAME_BYTES}; this one has "
            f"{len(encoded):,}"
        )
    if os.path.expanduser(path).startswith("~"):
        raise ValueError("it begins with the home directory of a user that does not exist; write './~' for a file name")
    return path


FilePath = Annotated[str, AfterValidator(_path)]
# Shells do not expand the '~' of output_dir=~/results. The other paths are expanded where they are read.
OutputDir = Annotated[str, AfterValidator(_path), AfterValidator(os.path.expanduser), AfterValidator(_one_line)]
Line = Annotated[str, AfterValidator(_one_line)]
RunName = Annotated[str, AfterValidator(_run_name)]
Positive = Annotated[int, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Dtype = Literal["float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda"]


class Section(BaseModel):
    """A group of settings: frozen, strict and without defaults."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    draws_random_numbers: ClassVar[bool] = False  # if True, the seed is part of the key

    def key_settings(self) -> dict[str, Any]:
        """Returns the settings that enter an artifact's key: all but those marked ``NotInKey`` or ``NotInKeyIf``."""
        settings: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if NotInKey not in field.metadata and NotInKeyIf(value) not in field.metadata:
                settings[name] = _plain(value)
        return settings


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return value.key_settings()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value
