"""Settings of expand that all methods share. Each method's module adds its own (see ``pipeline.expansion.method``)."""

from __future__ import annotations

import json
import pkgutil
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, SerializeAsAny, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from pipeline.config.section import Device, NonNegative, NotInKey, Positive, Section

# Every module in pipeline/expansion/methods is a method of that name. They are listed here without being imported,
# because they are above this package in the import order.
METHODS = tuple(
    module.name for module in pkgutil.iter_modules([str(Path(__file__).parents[1] / "expansion" / "methods")])
)


class Expand(Section):
    """The base class of all methods' settings."""

    method: str  # METHODS, or for a method from outside this repository any other name
    # An importable module, or an entry point of the group depth_growth.methods, that defines a method from outside this
    # repository. Its source is in the key. It has a default because only the files of such methods contain it.
    module: Annotated[str | None, NotInKey] = None
    new_layers: Any  # how many layers to add; each method has its own type
    position: Any  # where to add them; each method has its own type
    probe_tokens: Positive  # of training text, to rank the layers for position=least_important | most_similar
    device: Annotated[Device, NotInKey]  # where linear algebra runs; auto: on a GPU where one is visible
    check_memory: Annotated[NonNegative, NotInKey]  # bytes; larger models (in float32) are checked layer by layer

    @property
    def ranked_position(self) -> str | None:
        """The position, if it follows from a ranking of the layers on training text."""
        return None

    def key_settings(self) -> dict[str, Any]:
        """Returns the settings that enter the key. ``probe_tokens`` is one of them only if layers are ranked."""
        settings = super().key_settings()
        if self.ranked_position is None:
            del settings["probe_tokens"]
        return settings

    @property
    def keeps_logits(self) -> bool:
        """Whether the expanded model computes exactly what the base does. The expand stage then verifies it."""
        return False

    def with_matched_layers(self) -> Expand:
        """Returns the settings to use if a training stage has ``trainable=matched``. Most methods need not know."""
        return self


def _validated_by_its_method(value: Any) -> Any:
    """Validates the section with the settings class of the method that it names.

    Raises:
        ValidationError: the method is unknown, or one of its settings is wrong.
        UserError: ``module`` cannot be imported or defines no method.
    """
    if not isinstance(value, dict):
        return value
    name, module = value.get("method"), value.get("module")
    if module is None and name not in METHODS:
        raise _fault("method", name, f"methods are {', '.join(METHODS)}", "Set expand=NAME.")
    if module is not None and name in METHODS:
        remedy = f"Leave out expand={name}, or choose expand=external with it."
        raise _fault("module", module, f"{name} is a method of this repository and needs no module", remedy)
    methods: Any = import_module("pipeline.expansion.methods")
    if module is None:
        method = methods.built_in_method(name)
    else:
        method = methods.external_method(module)
        value = {**value, "method": name or module.rpartition(".")[2]}
    return method.model_validate_json(json.dumps(value))


def _fault(field: str, given: Any, rule: str, remedy: str) -> ValidationError:
    error = PydanticCustomError("method", "{rule}", {"rule": rule, "remedy": remedy})
    details = InitErrorDetails(type=error, loc=(field,), input=given)
    return ValidationError.from_exception_data("expand", [details])


AnyExpand = Annotated[SerializeAsAny[Expand], BeforeValidator(_validated_by_its_method)]
