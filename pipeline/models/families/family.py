"""What a row of the table is, and how it reads a checkpoint's tensor names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any

from pipeline.errors import UserError
from pipeline.models.families.tensors import LayerTensor, Place, Role

Config = Mapping[str, Any]  # config.json


@dataclass(frozen=True)
class Fused:
    """Several tensors of a layer stored as one, along its rows; perhaps for all experts, perhaps transposed.

    Attributes:
        parts: role by name within a layer, in the order of their rows; names of stacked experts' hold ``{i}``.
        shares: for every part the config entry that its number of rows is proportional to; empty where all are alike.
        groups: the config entry that says how often the pattern repeats; None where it does not.
        stacked: whether the first dimension is the expert.
        transposed: whether matrices are stored ``[in, out]``.
    """

    parts: Mapping[str, Role]
    shares: tuple[str, ...] = ()
    groups: str | None = None
    stacked: bool = False
    transposed: bool = False

    def tensors(self, stored: str, config: Config, experts: int) -> Iterator[LayerTensor]:
        """The parts of the stored tensor of this name, expert by expert."""
        shares = [_count(config, entry) for entry in self.shares] or [1] * len(self.parts)
        bounds = list(pairwise(accumulate(shares, initial=0)))
        groups = _count(config, self.groups) if self.groups else 1
        for expert in range(experts) if self.stacked else (None,):
            for (name, role), (begin, end) in zip(self.parts.items(), bounds, strict=True):
                place = Place(stored, expert, self.transposed, groups, begin, end, sum(shares))
                yield LayerTensor(name.format(i=expert), role, place)


def num_experts(config: Config) -> int:
    """Experts of every layer, shared ones not counted; 0 for a dense model."""
    return int(config.get("num_local_experts") or config.get("num_experts") or 0)


def _count(config: Config, entry: str) -> int:
    """A config's number; key-value heads that it does not name are as many as the query's."""
    return int(config.get(entry) or config["num_attention_heads"])


@dataclass(frozen=True)
class Architecture:
    """One model family.

    Attributes:
        layer: role by name within a layer, or how a stored tensor is put together; ``{i}`` stands for any number.
        derived: tensors within a layer that old checkpoints hold and that are made anew from the config.
        parallel: whether attention and MLP both read the layer's input, where the config does not say.
    """

    layer: Mapping[str, Role | Fused] = field(repr=False)
    layer_prefix: str = "model.layers.{layer}."
    embeddings: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    lm_head: str = "lm_head.weight"
    derived: tuple[str, ...] = ("self_attn.rotary_emb.inv_freq",)
    parallel: bool = False

    def layer_of(self, tensor_name: str) -> int | None:
        """The layer that a tensor belongs to; None outside the layers."""
        split = self.split(tensor_name)
        return None if split is None else split[0]

    def split(self, tensor_name: str) -> tuple[int, str] | None:
        """A full name as layer and name within the layer; None outside the layers."""
        before, after = self.layer_prefix.split("{layer}")
        match = re.fullmatch(re.escape(before) + r"(\d+)" + re.escape(after) + "(.+)", tensor_name)
        return None if match is None else (int(match[1]), match[2])

    def tensor_name(self, layer: int, name: str) -> str:
        """The full name of a layer's tensor; the inverse of ``split``."""
        return self.layer_prefix.format(layer=layer) + name

    def is_derived(self, tensor_name: str) -> bool:
        """Whether a tensor holds nothing that was learnt, so that it need not be kept."""
        split = self.split(tensor_name)
        return split is not None and split[1] in self.derived

    def role_of(self, tensor_name: str) -> Role | None:
        """What a stored tensor does; None outside the layers, and where several roles are stored as one."""
        split = self.split(tensor_name)
        entry = None if split is None else self._entry(split[1])
        if isinstance(entry, Fused):
            roles = list(entry.parts.values())
            return roles[0] if len({role.name for role in roles}) == 1 else None
        return entry

    def _entry(self, name: str) -> Role | Fused | None:
        return self.layer.get(name) or self.layer.get(re.sub(r"\.\d+\.", ".{i}.", name))

    def layer_tensors(self, tensor_names: Iterable[str], config: Config) -> list[LayerTensor]:
        """The tensors that every layer has, fused ones taken apart, in the order of layer 0's names.

        Raises:
            UserError: the model's layers are not named as the family's, differ in what they hold, or hold a tensor
                that has no role here.
        """
        held = self._held(tensor_names, config["num_hidden_layers"])
        for layer, names in enumerate(held):
            if not names:
                raise _refuse(self.tensor_name(layer, "*"), "the model has no tensors of that name")
            if set(names) != set(held[0]):
                differing = ", ".join(sorted(set(names) ^ set(held[0])))
                raise _refuse(f"layers 0 and {layer}", f"they differ in {differing}, and new layers need like ones")
        tensors = [tensor for name in held[0] for tensor in self._tensors(name, config)]
        return [_parallel(tensor) for tensor in tensors] if self._is_parallel(config) else tensors

    def _held(self, tensor_names: Iterable[str], num_layers: int) -> list[list[str]]:
        """Names within each layer."""
        held: list[list[str]] = [[] for _ in range(num_layers)]
        for layer, name in filter(None, map(self.split, tensor_names)):
            if layer >= num_layers:
                raise _refuse(self.tensor_name(layer, name), f"config.json speaks of {num_layers} layers only")
            if name not in self.derived:
                held[layer].append(name)
        return held

    def _tensors(self, name: str, config: Config) -> list[LayerTensor]:
        entry = self._entry(name)
        if entry is None:
            raise UserError(
                setting="model.path",
                value=name,
                rule="this tensor of a layer has no role in the family's row of the architecture table",
                remedy="Add its name and role to the family's row in pipeline/architecture/table.py.",
            )
        if isinstance(entry, Role):
            return [LayerTensor(name, entry)]
        return list(entry.tensors(name, config, num_experts(config)))

    def _is_parallel(self, config: Config) -> bool:
        return bool(config.get("use_parallel_residual", self.parallel))


def _parallel(tensor: LayerTensor) -> LayerTensor:
    """The tensor in a layer whose MLP reads what its attention reads."""
    return replace(tensor, role=replace(tensor.role, after_attention=False))


def _refuse(value: str, rule: str) -> UserError:
    remedy = "Choose a model whose layers are all alike and named as its family's are by save_pretrained."
    return UserError(setting="model.path", value=value, rule=rule, remedy=remedy)
