"""Which parameters the setting ``trainable`` selects, for the engine's model and for the plan. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pipeline.errors import UserError
from pipeline.expansion.methods import built_in_method

BY_EXPANSION = ("auto", "new_layers", "matched")  # they depend on ``expansion.json``
NAMED_CHOICES = (*BY_EXPANSION, "all")


def select_parameters(
    section: str, trainable: str, layers: Mapping[str, int | None], expansion: Mapping[str, Any]
) -> set[str]:
    """Returns the names of the parameters that train.

    ``auto`` selects what the expansion method trains by default: the new layers if it inserts some, and all parameters
    if it inserts none or repeats base layers. ``new_layers`` and ``all`` select those explicitly. ``matched`` selects
    the new layers, or if there are none, as many layers of the base where a method would have inserted them. Any other
    value is a regular expression that may match any part of a parameter name.

    Args:
        section: "pretrain" or "sft", for the messages.
        trainable: the setting.
        layers: the decoder layer of every parameter, None outside of them.
        expansion: the content of ``expansion.json``; only used for ``BY_EXPANSION``.

    Raises:
        UserError: no parameter would train.
    """
    if trainable == "all":
        return set(layers)
    if trainable in BY_EXPANSION:
        return _by_expansion(section, trainable, layers, expansion)
    pattern = trainable_pattern(section, trainable)
    chosen = {name for name in layers if pattern.search(name)}
    if not chosen:
        example = next(name for name, layer in layers.items() if layer is not None)
        raise UserError(
            setting=f"{section}.trainable",
            value=trainable,
            rule="no parameter name matches it, so nothing would train",
            remedy=f"Correct the pattern. Parameter names look like {example}.",
        )
    return chosen


def layers_at_learning_rate(trainable: str, expansion: Mapping[str, Any]) -> set[int]:
    """Returns the layers whose rate is ``learning_rate`` also if ``base_learning_rate`` is set.

    These are the new layers, or the layers that ``matched`` trains in their place.
    """
    new = {entry["layer"] for entry in expansion.get("layers", ()) if entry["new"]}
    return new or ({*expansion.get("matched", ())} if trainable == "matched" else set())


def trainable_pattern(section: str, trainable: str) -> re.Pattern[str]:
    """Compiles the setting as a regular expression.

    Raises:
        UserError: the setting is not a valid regular expression.
    """
    try:
        return re.compile(trainable)
    except re.error as error:
        raise UserError(
            setting=f"{section}.trainable",
            value=trainable,
            rule=f"it is neither {', '.join(NAMED_CHOICES)} nor a valid regular expression: {error}",
            remedy="Correct the expression. It may match any part of a parameter name.",
        ) from error


def split_parameter_error(section: str, parameter: str) -> UserError:
    """Returns the error for a parameter that is stored as several tensors, as the experts of most mixtures are."""
    return UserError(
        setting=f"{section}.trainable",
        value=parameter,
        rule="this parameter is assembled from several stored tensors, and such parameters cannot be trained yet",
        remedy=f"Set {section}.trainable to a regular expression that excludes it, such as self_attn.",
    )


def _by_expansion(
    section: str, trainable: str, layers: Mapping[str, int | None], expansion: Mapping[str, Any]
) -> set[str]:
    new = {entry["layer"] for entry in expansion["layers"] if entry["new"]}
    if trainable == "auto" and (not new or _trained_by_default(expansion) == "all"):
        return set(layers)
    if trainable == "matched":
        new = new or {*expansion.get("matched", ())}
    if not new:
        raise UserError(
            setting=f"{section}.trainable",
            value=trainable,
            rule=f"method {expansion['method']} added no layers, so nothing would train",
            remedy=f"Set {section}.trainable=all.",
        )
    return {name for name, layer in layers.items() if layer in new}


def _trained_by_default(expansion: Mapping[str, Any]) -> str:
    """Returns what the method trains by default."""
    # Older models do not record it. They were expanded by a built-in method.
    method = built_in_method(expansion["method"])
    return str(expansion.get("trains", None if method is None else method.trains))
