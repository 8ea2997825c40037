"""The base class of all groups of settings, and types for single settings."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field


class NotInKey:
    """Marks a field that can change the speed of a stage but not its numbers."""


Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]
Dtype = Literal["float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda"]


class Section(BaseModel):
    """A group of settings: frozen, strict and without defaults."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    draws_random_numbers: ClassVar[bool] = False  # if True, the seed is part of the key

    def key_settings(self) -> dict[str, Any]:
        """Returns the settings that enter an artifact's key: all fields that are not marked ``NotInKey``."""
        settings: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            if NotInKey in field.metadata:
                continue
            value = getattr(self, name)
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
