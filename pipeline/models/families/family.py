"""The columns of the family table, and how a row is applied to the tensor names of a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from pipeline.errors import UserError
from pipeline.models.families.parameters import Config, Fused, Parameter, Parameters, num_experts
from pipeline.models.families.tensors import LayerTensor, Place, Role


@dataclass(frozen=True)
class Family:
    """One row of the table: a model family.

    Names are those of parameters in memory, as transformers builds the model. Checkpoints may also store experts one
    by one, under the names of the parts of ``Fused``.

    Attributes:
        layer: parameters of every decoder layer.
        dense: parameters that only layers without experts have, in families with both kinds of layers.
        sparse: parameters that only layers with experts have, in such families.
        defaults: entries that the family's config class fills in when config.json leaves them out.
        norm_bias: whether the final norm has a bias.
        stored_names: by name in memory, names on disk of tensors that transformers renames when it loads a model.
        derived: buffers within a layer that old checkpoints contain although they follow from the config.
    """

    layer: Parameters = field(repr=False)
    dense: Parameters = field(default_factory=dict, repr=False)
    sparse: Parameters = field(default_factory=dict, repr=False)
    defaults: Config = field(default_factory=dict)
    norm_bias: bool = False
    layer_prefix: str = "model.layers.{layer}."
    embeddings: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    lm_head: str = "lm_head.weight"
    stored_names: Mapping[str, str] = field(default_factory=dict)
    derived: tuple[str, ...] = ("self_attn.rotary_emb.inv_freq",)

    # ------------------------------------------------------------------ config

    def with_defaults(self, config: Config) -> Config:
        """The config with the family's defaults for entries that are absent or null.

        A null ``num_key_value_heads`` is not a default: every head then has its own keys and values.
        """
        given = {name: value for name, value in config.items() if value is not None or name == "num_key_value_heads"}
        return {**self.defaults, **given}

    def parameters(self, config: Config, layer: int) -> Parameters:
        """The parameters of one layer of a model.

        Args:
            config: with the family's defaults, see ``with_defaults``.
            layer: index of the layer.

        Raises:
            KeyError: the number of experts is missing, which is not 0 by default.
        """
        if self.sparse and config.get("num_local_experts") is None:
            _ = config["num_experts"]
        kind = self.sparse if _is_sparse(config, layer) else self.dense
        return {name: entry for name, entry in {**self.layer, **kind}.items() if entry.exists(config)}

    # ------------------------------------------------------------------- names

    def split(self, tensor_name: str) -> tuple[int, str] | None:
        """Splits a full name into layer and name within the layer. None outside the decoder layers."""
        before, after = self.layer_prefix.split("{layer}")
        match = re.fullmatch(re.escape(before) + r"(\d+)" + re.escape(after) + "(.+)", tensor_name)
        return None if match is None else (int(match[1]), match[2])

    def tensor_name(self, layer: int, name: str) -> str:
        """The full name of a layer's tensor. The inverse of ``split``."""
        return self.layer_prefix.format(layer=layer) + name

    def layer_of(self, tensor_name: str) -> int | None:
        """The layer that a tensor belongs to. None outside the decoder layers."""
        split = self.split(tensor_name)
        return None if split is None else split[0]

    def is_derived(self, tensor_name: str) -> bool:
        """Whether a tensor holds nothing that was learned, so that it need not be kept."""
        split = self.split(tensor_name)
        return split is not None and split[1] in self.derived

    @property
    def stored_lm_head(self) -> str:
        """The name of the head on disk."""
        return self.stored_names.get(self.lm_head, self.lm_head)

    def parameter_of(self, stored: str) -> str:
        """The full name in memory of the parameter that a tensor on disk is, or is a part of."""
        in_memory = {on_disk: name for name, on_disk in self.stored_names.items()}
        split = self.split(stored)
        if split is None:
            return in_memory.get(stored, stored)
        name = in_memory.get(split[1], split[1])
        part = re.sub(r"\.\d+\.", ".{i}.", name)
        entries = {**self.layer, **self.dense, **self.sparse}
        fused = [whole for whole, entry in entries.items() if isinstance(entry, Fused) and part in entry.parts]
        return self.tensor_name(split[0], fused[0] if fused and name not in entries else name)

    def parts_of(self, parameter: str, config: Config) -> set[str]:
        """The full names of the tensors that a parameter is stored as if it is stored in parts. Empty if it is not."""
        split = self.split(parameter)
        entry = None if split is None else {**self.layer, **self.dense, **self.sparse}.get(split[1])
        if split is None or not isinstance(entry, Fused):
            return set()
        return {self.tensor_name(split[0], name) for name, _, _ in entry.places(split[1], self.with_defaults(config))}

    # ------------------------------------------------------------------- roles

    @cached_property
    def roles(self) -> dict[str, Role]:
        """Role by name within a layer, of all tensors and all parts of fused tensors."""
        singles = {name: entry for name, entry in self._entries.items() if isinstance(entry, Parameter)}
        return {name: self._complete_role(entry.role) for name, entry in singles.items()}

    @cached_property
    def _entries(self) -> dict[str, Parameter | Fused]:
        """All entries of the row, by every name that a tensor of a layer may have in memory or on disk."""
        entries: dict[str, Parameter | Fused] = {**self.layer, **self.dense, **self.sparse}
        for entry in [*entries.values()]:
            if isinstance(entry, Fused):
                entries |= entry.parts
        return entries | {stored: entries[name] for name, stored in self.stored_names.items() if name in entries}

    def _entry(self, name: str) -> Parameter | Fused | None:
        return self._entries.get(name) or self._entries.get(re.sub(r"\.\d+\.", ".{i}.", name))

    def _complete_role(self, role: Role, parallel: bool = False) -> Role:
        """The role with ``silent`` and ``after_attention``.

        A block is silenced by the tensors that write its output. Where a norm follows them (Gemma 2 and 3, OLMo 2),
        the scale of that norm is silenced instead: zero projections would keep the logits as well, but the norm of
        zero multiplies their gradient by about a thousand.
        """
        silent = None
        if role.side == "output" and (role.kind == "norm" or role.block not in self._blocks_with_output_norm):
            silent = 0.0 - role.offset
        after_attention = not parallel and (role.block, role.side) == ("mlp", "input")
        return replace(role, silent=silent, after_attention=after_attention)

    @cached_property
    def _blocks_with_output_norm(self) -> set[str]:
        roles = [entry.role for entry in self._entries.values() if isinstance(entry, Parameter)]
        return {role.block for role in roles if (role.kind, role.side) == ("norm", "output")}

    def role_of(self, tensor_name: str) -> Role | None:
        """The role of a tensor. None outside the decoder layers, and for a fused tensor of several roles."""
        split = self.split(tensor_name)
        entry = None if split is None else self._entry(split[1])
        if isinstance(entry, Fused):
            first, *others = entry.parts.values()
            entry = None if any(part.role.name != first.role.name for part in others) else first
        return None if entry is None else self._complete_role(entry.role)

    # ------------------------------------------------------------- checkpoints

    def layer_tensors(self, tensor_names: Iterable[str], config: Config) -> list[LayerTensor]:
        """The tensors that every layer has, with fused ones split into parts, in the order of layer 0's names.

        Args:
            tensor_names: the full names of all tensors of the checkpoint.
            config: the content of its config.json.

        Raises:
            UserError: layers are not named like the family's, differ in what they hold, or hold a tensor without a
                role.
        """
        config = self.with_defaults(config)
        layers = self._names_by_layer(tensor_names, config["num_hidden_layers"])
        for layer, names in enumerate(layers):
            if not names:
                raise _unexpected(self.tensor_name(layer, "*"), "the model has no tensors with this name")
            require_like_layers(0, layers[0], layer, names)
        parallel = bool(config.get("use_parallel_residual"))
        return [
            LayerTensor(name, self._complete_role(role, parallel), place)
            for stored in layers[0]
            for name, role, place in self._parts(stored, config)
        ]

    def _names_by_layer(self, tensor_names: Iterable[str], num_layers: int) -> list[list[str]]:
        layers: list[list[str]] = [[] for _ in range(num_layers)]
        for layer, name in filter(None, map(self.split, tensor_names)):
            if layer >= num_layers:
                raise _unexpected(self.tensor_name(layer, name), f"config.json declares only {num_layers} layers")
            if name not in self.derived:
                layers[layer].append(name)
        return layers

    def _parts(self, stored: str, config: Config) -> Iterator[tuple[str, Role, Place | None]]:
        entry = self._entry(stored)
        if entry is None:
            raise UserError(
                setting="model.path",
                value=stored,
                rule="this tensor of a layer has no role in the family's row of the family table",
                remedy="Add its name and role to the family's row in pipeline/models/families/table.py.",
            )
        if isinstance(entry, Fused):
            yield from entry.places(stored, config)
        else:
            yield stored, entry.role, None


def _is_sparse(config: Config, layer: int) -> bool:
    """Whether a layer has experts, by the entries that Qwen's configs have for it."""
    every = config.get("decoder_sparse_step") or 1
    dense_layers = config.get("mlp_only_layers") or ()
    return num_experts(config) > 0 and layer not in dense_layers and (layer + 1) % every == 0


def require_like_layers(first: int, first_names: Iterable[str], layer: int, names: Iterable[str]) -> None:
    """Checks that two layers have the same tensors. A new layer made from several layers requires it.

    Raises:
        UserError: the layers have different tensors.
    """
    if differing := sorted(set(first_names) ^ set(names)):
        raise _unexpected(
            f"layers {first} and {layer}",
            f"they differ in {', '.join(differing)}, and new layers can only be made from layers that are alike",
        )


def _unexpected(value: str, rule: str) -> UserError:
    remedy = "Choose a model whose layers are all alike and have the names that save_pretrained gives them."
    return UserError(setting="model.path", value=value, rule=rule, remedy=remedy)
