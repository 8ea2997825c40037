"""Which parameters the setting ``trainable`` selects, for the engine's model and for the plan. No torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from pipeline.config.training import TRAINABLE_WORDS, trainable_terms
from pipeline.errors import UserError
from pipeline.expansion.methods import built_in_method
from pipeline.models.families import Shape

BY_EXPANSION = frozenset({"auto", "new_layers", "matched"})  # they depend on ``expansion.json``


def select_parameters(section: str, trainable: str, shape: Shape, expansion: Mapping[str, Any]) -> set[str]:
    """Returns the names of the parameters that train: all that any term of the setting selects.

    ``auto`` selects what the expansion method trains by default: the new layers if it inserts some, and all parameters
    if it inserts none or repeats base layers. ``new_layers`` and ``all`` select those explicitly. ``matched`` selects
    the new layers, or if there are none, as many layers of the base where a method would have inserted them.
    ``layers`` selects all decoder layers, and ``embeddings``, ``norms`` and ``head`` these of the full model. A regular
    expression may match any part of a parameter name in memory, where all experts of a layer are one parameter. Tensors
    that gradients do not reach are never selected.

    Args:
        section: "pretrain" or "sft", for the messages.
        trainable: the setting.
        shape: the tensors of the model.
        expansion: the content of ``expansion.json``; only used for ``BY_EXPANSION``.

    Raises:
        UserError: a term is wrong, or selects no parameter.
    """
    check_terms(section, trainable)
    layers = shape.learned()
    chosen: set[str] = set()
    for term in trainable_terms(trainable):
        match term:
            case "all":
                chosen |= layers.keys()
            case "layers":
                chosen |= {name for name, layer in layers.items() if layer is not None}
            case "embeddings":
                chosen |= shape.embeddings
            case "norms":
                chosen |= shape.norms
            case "head":
                chosen |= {shape.head, *shape.head_bias}
            case _ if term in BY_EXPANSION:
                chosen |= _by_expansion(section, term, layers, expansion)
            case _:
                chosen |= _matching(section, trainable, term, layers, shape.experts)
    return chosen & layers.keys()


def layers_at_learning_rate(trainable: str, expansion: Mapping[str, Any]) -> set[int]:
    """Returns the layers whose rate is ``learning_rate`` also if ``base_learning_rate`` is set.

    These are the new layers, or the layers that ``matched`` trains in their place.
    """
    return new_layers_of(expansion) or (
        {*expansion.get("matched", ())} if "matched" in trainable_terms(trainable) else set()
    )


def new_layers_of(expansion: Mapping[str, Any]) -> set[int]:
    """Returns the indices of the layers that the content of ``expansion.json`` marks as new."""
    return {entry["layer"] for entry in expansion.get("layers", ()) if entry["new"]}


def check_terms(section: str, trainable: str) -> None:
    """Checks the words and regular expressions of the setting.

    Raises:
        UserError: a word does not exist, or a regular expression is not valid.
    """
    for term in trainable_terms(trainable):
        if not term.startswith("/"):
            if term not in TRAINABLE_WORDS:
                raise UserError(
                    setting=f"{section}.trainable",
                    value=trainable,
                    rule=f"{term!r} is none of {', '.join(TRAINABLE_WORDS)}",
                    remedy=f"{_near([term])}Put a regular expression between slashes, such as new_layers+/lm_head/.",
                )
            continue
        try:
            re.compile(term[1:-1])
        except re.error as error:
            raise UserError(
                setting=f"{section}.trainable",
                value=trainable,
                rule=f"it is neither {', '.join(TRAINABLE_WORDS)} nor a valid regular expression: {error}",
                remedy="Correct the expression. It may match any part of a parameter name.",
            ) from error


def _near(terms: Iterable[str]) -> str:
    near = {match: None for term in terms for match in get_close_matches(term, TRAINABLE_WORDS, 1)}
    return f"Did you mean {' or '.join(near)}? " if near else ""


def _matching(
    section: str, trainable: str, term: str, layers: Mapping[str, int | None], experts: Collection[str]
) -> set[str]:
    pattern = re.compile(term[1:-1])
    chosen = {name for name in layers if pattern.search(name)}
    if not chosen:
        example = next(name for name, layer in layers.items() if layer is not None)
        if experts:
            example += f", and all experts of a layer are one parameter, such as {min(experts)}"
        raise UserError(
            setting=f"{section}.trainable",
            value=trainable,
            rule="no parameter name matches it, so nothing would train",
            remedy=f"{_near(term[1:-1].split('+'))}Correct the pattern. Parameter names look like {example}.",
        )
    return chosen


def no_matrix_error(section: str, optimizer: str) -> UserError:
    """Returns the error for a choice of parameters without a matrix that the optimizer would update by Muon."""
    kind = "new" if optimizer == "muon_new_layers" else "decoder"
    return UserError(
        setting=f"{section}.optimizer",
        value=optimizer,
        rule=f"Muon updates the matrices of {kind} layers, and none of them trains",
        remedy=f"Set {section}.optimizer=adamw, or change {section}.trainable.",
    )


def _by_expansion(
    section: str, trainable: str, layers: Mapping[str, int | None], expansion: Mapping[str, Any]
) -> set[str]:
    new = new_layers_of(expansion)
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
