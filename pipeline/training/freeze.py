"""Which parameters train, and the table that reports it.

Layers are identified by the model's own list of layers, and new layers by ``expansion.json``, never by substrings of
parameter names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from pipeline.config.training import trainable_terms
from pipeline.errors import UserError
from pipeline.files import read_json
from pipeline.models.families import Role, family_for, shape_of
from pipeline.models.family_inference.decoder import decoder_of
from pipeline.models.reading import EXPANSION_FILE
from pipeline.training.rates import Multiple
from pipeline.training.selection import BY_EXPANSION, layers_at_learning_rate, new_layers_of, select_parameters


def select_trainable(section: str, trainable: str, model: PreTrainedModel, model_dir: Path) -> set[str]:
    """Returns the names of the parameters that train; see ``pipeline.training.selection``.

    Raises:
        UserError: no parameter would train, or the model directory does not record which layers are new.
    """
    needs_expansion = not BY_EXPANSION.isdisjoint(trainable_terms(trainable))
    expansion = _read_expansion(section, trainable, model_dir) if needs_expansion else {}
    names = select_parameters(section, trainable, shape_of(model.config.to_dict()), expansion)
    assert names <= layer_of_parameter(model).keys(), "the model has other parameters than its config describes"
    return names


def _read_expansion(section: str, trainable: str, model_dir: Path) -> dict[str, Any]:
    path = model_dir / EXPANSION_FILE
    if not path.is_file():
        raise UserError(
            setting=f"{section}.trainable",
            value=trainable,
            rule=f"new layers are recorded in {EXPANSION_FILE}, which {model_dir} does not contain",
            remedy=f"Set {section}.trainable=all, or a regular expression over parameter names.",
        )
    expansion: dict[str, Any] = read_json(path)
    return expansion


def freeze_others(model: PreTrainedModel, trainable: set[str]) -> None:
    """Makes the parameters named in ``trainable`` require gradients, and no others."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable)


# ------------------------------------------------------------------------------- layers and parameters


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Returns the transformer layers of a causal language model, in order."""
    return decoder_of(model).layers


def layer_of_parameter(model: PreTrainedModel) -> dict[str, int | None]:
    """Maps every parameter to its decoder layer, or to None outside of them, in the model's order."""
    owner = {id(p): i for i, layer in enumerate(decoder_layers(model)) for p in layer.parameters()}
    return {name: owner.get(id(p)) for name, p in model.named_parameters()}


def roles_of_parameters(model: PreTrainedModel) -> dict[str, Role]:
    """Maps the parameters inside layers to their roles. Parameters that hold several roles are omitted."""
    family = family_for(model.config.to_dict())
    found = {name: family.role_of(name) for name, _ in model.named_parameters()}
    return {name: role for name, role in found.items() if role is not None}


def new_layers(model_dir: Path) -> set[int]:
    """Returns the indices of the layers that a model's ``expansion.json`` marks as new. Empty if there is none."""
    return new_layers_of(_expansion_or_nothing(model_dir))


def layers_with_learning_rate(trainable: str, model_dir: Path) -> set[int]:
    """Returns the layers that learn at ``learning_rate`` also if ``base_learning_rate`` is set."""
    return layers_at_learning_rate(trainable, _expansion_or_nothing(model_dir))


def _expansion_or_nothing(model_dir: Path) -> dict[str, Any]:
    path = model_dir / EXPANSION_FILE
    return read_json(path) if path.is_file() else {}


def lowest_trainable_layer(model: PreTrainedModel) -> int:
    """Returns the lowest decoder layer that gradients must reach.

    It is 0 if parameters before the layers (embeddings) train, and the number of layers if only parameters after them
    do.
    """
    layers = decoder_layers(model)
    inside = {id(p) for p in layers.parameters()}
    before = [p for p in model.get_input_embeddings().parameters() if id(p) not in inside]
    if any(p.requires_grad for p in before):
        return 0
    trained = (i for i, layer in enumerate(layers) if any(p.requires_grad for p in layer.parameters()))
    return next(trained, len(layers))


def full_shape(parameter: nn.Parameter) -> Any:
    """Returns the shape of the full parameter, of which a rank holds only a partition at ZeRO 3."""
    return getattr(parameter, "ds_shape", parameter.shape)


# ------------------------------------------------------------------------------------------- table


@dataclass(frozen=True)
class ParameterRow:
    """One parameter in the table that is printed before the first step."""

    layer: int | None  # None outside the decoder layers
    role: str  # the name inside its layer, or the full name
    name: str
    parameters: int
    trained: bool
    dtype: str  # of compute; the master weight of a trained parameter is float32
    learning_rate_multiple: float | Mapping[str, float] = 1.0  # of all of it, or of its parts by role


def parameter_table(model: PreTrainedModel, multiples: Mapping[str, Multiple]) -> list[ParameterRow]:
    """Returns one row per parameter, in the model's order.

    Args:
        model: the model.
        multiples: of the learning rate, of the parameters that do not learn at the scheduled one.
    """
    layers = layer_of_parameter(model)
    rows = []
    for name, parameter in model.named_parameters():
        layer = layers[name]
        role = name if layer is None else name.partition(f".{layer}.")[2]
        dtype = str(parameter.dtype).removeprefix("torch.")
        size, trained = full_shape(parameter).numel(), parameter.requires_grad
        rows.append(ParameterRow(layer, role, name, size, trained, dtype, _of_roles(multiples.get(name, 1.0))))
    return rows


def _of_roles(multiple: Multiple) -> float | dict[str, float]:
    return {part.role: part.multiple for part in multiple} if isinstance(multiple, tuple) else multiple


def format_table(rows: list[ParameterRow]) -> str:
    """Formats all rows as text, for the log."""
    lines = [f"{'layer':>5}  {'role':<40} {'parameters':>14}  {'':<7}  dtype"]
    for row in rows:
        layer = "-" if row.layer is None else str(row.layer)
        lines.append(f"{layer:>5}  {row.role:<40} {row.parameters:>14,}  {_state(row):<7}  {_dtypes(row)}")
    return "\n".join(lines)


def format_summary(rows: list[ParameterRow]) -> str:
    """Formats the table for the terminal. Consecutive layers that are alike share lines, as do roles that are alike."""
    lines = [f"{'layers':>9}  {'role':<34} {'parameters':>16}  {'':<7}  dtype"]
    layers = [(layer, list(group)) for layer, group in groupby(rows, key=lambda row: row.layer)]
    for _, run in groupby(layers, key=lambda item: (item[0] is None, *_signature(item[1]))):
        members = list(run)
        first, last = members[0][0], members[-1][0]
        label = "others" if first is None else str(first) if first == last else f"{first}-{last}"
        lines += [f"{label:>9}  {line}" for line in _role_lines([row for _, group in members for row in group])]
    trained = _count([row for row in rows if row.trained])
    lines.append(f"{trained:,} of {_count(rows):,} parameters train")
    return "\n".join(lines)


def _signature(rows: list[ParameterRow]) -> tuple[tuple[str, int, bool], ...]:
    """Returns what must be equal for layers to share lines."""
    return tuple((row.role, row.parameters, row.trained) for row in rows)


def _role_lines(rows: list[ParameterRow]) -> list[str]:
    """Returns one line for all roles if they are alike, and one per role otherwise."""
    alike = len({(row.trained, _dtypes(row)) for row in rows}) == 1
    groups: dict[str, list[ParameterRow]] = {}
    for row in rows:
        groups.setdefault("all" if alike else row.role, []).append(row)
    return [
        f"{role:<34} {_count(members):>16,}  {_state(members[0]):<7}  {_dtypes(members[0])}"
        for role, members in groups.items()
    ]


def _state(row: ParameterRow) -> str:
    return "trained" if row.trained else "frozen"


def _count(rows: list[ParameterRow]) -> int:
    return sum(row.parameters for row in rows)


def _dtypes(row: ParameterRow) -> str:
    text = f"{row.dtype}, master float32" if row.trained and row.dtype != "float32" else row.dtype
    multiple = row.learning_rate_multiple
    if multiple == 1:
        return text
    if isinstance(multiple, Mapping):
        return f"{text}, {', '.join(f'{role} {value:.3g}' for role, value in multiple.items())} times the learning rate"
    return f"{text}, {multiple:.3g} times the learning rate"
