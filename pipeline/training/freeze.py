"""Which parameters train. Decided by ``expansion.json`` and the layer list, never by guessing from names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from pipeline.errors import UserError
from pipeline.files import read_json
from pipeline.models.families import Role, family_of
from pipeline.models.reading import EXPANSION_FILE
from pipeline.training.selection import BY_EXPANSION, select


@dataclass(frozen=True)
class Row:
    """One parameter in the table that is printed before the first step."""

    layer: int | None  # None: outside the decoder layers
    role: str  # its name inside its layer, or its full name
    name: str
    parameters: int
    trained: bool
    dtype: str  # of compute; a trained parameter's master weight is float32


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The transformer blocks of a causal language model, in order."""
    layers = model.base_model.layers
    assert isinstance(layers, nn.ModuleList)
    return layers


def layer_of_parameter(model: PreTrainedModel) -> dict[str, int | None]:
    """Every parameter's decoder layer, or None outside of them; found by identity, in the model's order."""
    owner = {id(p): i for i, layer in enumerate(decoder_layers(model)) for p in layer.parameters()}
    return {name: owner.get(id(p)) for name, p in model.named_parameters()}


def roles_of_parameters(model: PreTrainedModel) -> dict[str, Role]:
    """The role of every parameter that has one alone, by name; those outside the layers are left out."""
    architecture = family_of(model.config.model_type)
    found = {name: architecture.role_of(name) for name, _ in model.named_parameters()}
    return {name: role for name, role in found.items() if role is not None}


def select_trainable(section: str, trainable: str, model: PreTrainedModel, model_dir: Path) -> set[str]:
    """The names of the parameters that train; see ``pipeline.training.selection``.

    Raises:
        UserError: nothing would train, or the model directory does not say which layers are new.
    """
    layers = layer_of_parameter(model)
    expansion = _read_expansion(section, trainable, model_dir) if trainable in BY_EXPANSION else {}
    return select(section, trainable, layers, expansion)


def new_layers(expansion: Mapping[str, Any]) -> set[int]:
    """The layers that ``expansion.json`` calls new."""
    return {entry["layer"] for entry in expansion["layers"] if entry["new"]}


def _read_expansion(section: str, trainable: str, model_dir: Path) -> dict[str, Any]:
    path = model_dir / EXPANSION_FILE
    if not path.is_file():
        raise UserError(
            setting=f"{section}.trainable",
            value=trainable,
            rule=f"{EXPANSION_FILE} says which layers are new, and {model_dir} has none",
            remedy=f"Say {section}.trainable=all, or a regular expression over parameter names.",
        )
    expansion: dict[str, Any] = read_json(path)
    return expansion


def freeze_others(model: PreTrainedModel, trainable: set[str]) -> None:
    """Only these parameters ask for gradients from here on."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable)


def lowest_trainable_layer(model: PreTrainedModel) -> int:
    """The lowest decoder layer that gradients must reach.

    0 when something before the layers trains (embeddings), the number of layers when only something after them does.
    """
    layers = decoder_layers(model)
    inside = {id(p) for p in layers.parameters()}
    before = [p for p in model.get_input_embeddings().parameters() if id(p) not in inside]
    if any(p.requires_grad for p in before):
        return 0
    trained = (i for i, layer in enumerate(layers) if any(p.requires_grad for p in layer.parameters()))
    return next(trained, len(layers))


# ------------------------------------------------------------------------------------------- table


def describe(model: PreTrainedModel) -> list[Row]:
    """One row a parameter, in the model's order."""
    layers = layer_of_parameter(model)
    rows = []
    for name, parameter in model.named_parameters():
        layer = layers[name]
        role = name if layer is None else name.partition(f".{layer}.")[2]
        dtype = str(parameter.dtype).removeprefix("torch.")
        rows.append(Row(layer, role, name, full_shape(parameter).numel(), parameter.requires_grad, dtype))
    return rows


def full_shape(parameter: nn.Parameter) -> Any:
    """The shape of the whole parameter, also where ZeRO 3 holds only a slice of it."""
    return getattr(parameter, "ds_shape", parameter.shape)


def format_rows(rows: list[Row]) -> str:
    """The whole table as text, for the log."""
    lines = [f"{'layer':>5}  {'role':<40} {'parameters':>14}  {'':<7}  dtype"]
    for row in rows:
        layer = "-" if row.layer is None else str(row.layer)
        lines.append(f"{layer:>5}  {row.role:<40} {row.parameters:>14,}  {_state(row):<7}  {_dtypes(row)}")
    return "\n".join(lines)


def format_summary(rows: list[Row]) -> str:
    """The table for the terminal: neighbouring layers that fare alike share lines, and so do a layer's roles."""
    lines = [f"{'layers':>9}  {'role':<34} {'parameters':>16}  {'':<7}  dtype"]
    layers = [(layer, list(group)) for layer, group in groupby(rows, key=lambda row: row.layer)]
    for _, run in groupby(layers, key=lambda item: (item[0] is None, *_fate(item[1]))):
        members = list(run)
        first, last = members[0][0], members[-1][0]
        label = "others" if first is None else str(first) if first == last else f"{first}-{last}"
        lines += [f"{label:>9}  {line}" for line in _role_lines([row for _, group in members for row in group])]
    trained = _count([row for row in rows if row.trained])
    lines.append(f"{trained:,} of {_count(rows):,} parameters train")
    return "\n".join(lines)


def _role_lines(rows: list[Row]) -> list[str]:
    """One line for all roles where they fare alike, else one a role."""
    alike = len({(row.trained, row.dtype) for row in rows}) == 1
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault("all" if alike else row.role, []).append(row)
    return [
        f"{role:<34} {_count(members):>16,}  {_state(members[0]):<7}  {_dtypes(members[0])}"
        for role, members in groups.items()
    ]


def _state(row: Row) -> str:
    return "trained" if row.trained else "frozen"


def _fate(rows: list[Row]) -> tuple[tuple[str, int, bool], ...]:
    return tuple((row.role, row.parameters, row.trained) for row in rows)


def _count(rows: list[Row]) -> int:
    return sum(row.parameters for row in rows)


def _dtypes(row: Row) -> str:
    return f"{row.dtype}, master float32" if row.trained and row.dtype != "float32" else row.dtype
