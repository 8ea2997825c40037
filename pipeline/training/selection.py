"""What ``trainable`` means, for the engine's model and for one that is only planned. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pipeline.errors import UserError
from pipeline.expansion.methods import built_in_method

BY_EXPANSION = ("auto", "new_layers")  # what these mean, ``expansion.json`` says
NAMED_CHOICES = (*BY_EXPANSION, "all")


def select(section: str, trainable: str, layers: Mapping[str, int | None], expansion: Mapping[str, Any]) -> set[str]:
    """The names of the parameters that train.

    ``auto`` means the new layers where the method inserts some, and everything where nothing is new or where base
    layers are repeated; ``new_layers`` and ``all`` say it themselves; anything else is a regular expression
    searched in parameter names.

    Args:
        section: "pretrain" or "sft", for the messages.
        layers: every parameter's decoder layer, None outside of them.
        expansion: the method and the layers of ``expansion.json``; read for ``BY_EXPANSION`` only.

    Raises:
        UserError: nothing would train.
    """
    if trainable == "all":
        return set(layers)
    if trainable in BY_EXPANSION:
        return _by_expansion(section, trainable, layers, expansion)
    pattern = trainable_pattern(section, trainable)
    chosen = {name for name in layers if pattern.search(name)}
    if not chosen:
        raise UserError(
            setting=f"{section}.trainable",
            value=trainable,
            rule="it is searched in parameter names and matches none, so nothing would train",
            remedy="Names look like " + next(name for name, layer in layers.items() if layer is not None) + ".",
        )
    return chosen


def trainable_pattern(section: str, trainable: str) -> re.Pattern[str]:
    """Compile a ``trainable`` that is a regular expression.

    Raises:
        UserError: it is not one.
    """
    try:
        return re.compile(trainable)
    except re.error as error:
        raise UserError(
            setting=f"{section}.trainable",
            value=trainable,
            rule=f"it is none of {', '.join(NAMED_CHOICES)} and no regular expression: {error}",
            remedy="Correct it; it is searched in parameter names.",
        ) from error


def stored_apart(section: str, parameter: str) -> UserError:
    """The refusal of a parameter that is held as one and stored in several tensors, as most mixtures' experts are."""
    return UserError(
        setting=f"{section}.trainable",
        value=parameter,
        rule="this parameter is stored in several tensors and held as one, and cannot be trained yet",
        remedy=f"Say {section}.trainable=REGEX with a pattern that leaves it out, such as self_attn.",
    )


def _by_expansion(
    section: str, trainable: str, layers: Mapping[str, int | None], expansion: Mapping[str, Any]
) -> set[str]:
    new = {entry["layer"] for entry in expansion["layers"] if entry["new"]}
    if trainable == "auto" and (not new or _trained_by_default(expansion) == "all"):
        return set(layers)
    if not new:
        raise UserError(
            setting=f"{section}.trainable",
            value=trainable,
            rule=f"method {expansion['method']} added no layer, so nothing would train",
            remedy=f"Say {section}.trainable=all.",
        )
    return {name for name, layer in layers.items() if layer in new}


def _trained_by_default(expansion: Mapping[str, Any]) -> str:
    """What the method trains by default; models expanded before this was recorded were made by a built-in method."""
    method = built_in_method(expansion["method"])
    return str(expansion.get("trains", None if method is None else method.trains))
