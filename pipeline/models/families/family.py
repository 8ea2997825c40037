"""The columns of the family table, and how a row is applied to the tensor names of a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from pipeline.errors import UserError, bad_model
from pipeline.models.families.nested import inner_config, prefix_of
from pipeline.models.families.parameters import Config, Fused, Parameter, Parameters, num_experts
from pipeline.models.families.tensors import LayerTensor, Place, Role

MEANINGFUL_NULLS = frozenset({"num_key_value_heads", "sliding_window", "attn_logit_softcapping"})


@dataclass(frozen=True)
class InferredLayers:
    """What was inferred about the model of one config. Its roles are complete.

    Attributes:
        kinds: parameters of each kind of layer.
        kind_of: the index in ``kinds`` of every layer.
        before: shapes of the tensors before the layers, by name, with the embeddings last.
        after: shapes of the tensors after the layers, with the head last unless it is tied to the embeddings.
        base_prefix: the prefix of all names but the head's, which checkpoints of the base model lack.
        ignored: patterns of stored names that transformers does not load.
        not_silenced: why no parameters make a layer pass on its input unchanged; empty if there are such parameters.
        not_trained: why the training stages cannot train the model; empty if they can.
        depends_on_depth: whether a layer computes something else at another index, or in a deeper model.
        fixed: names, within layers or outside of them, of stored tensors that gradients do not reach, such as the
            biases with which DeepSeek-V3 balances its experts.
    """

    kinds: tuple[Parameters, ...]
    kind_of: tuple[int, ...]
    before: Mapping[str, tuple[int, ...]]
    after: Mapping[str, tuple[int, ...]]
    base_prefix: str = ""
    ignored: tuple[str, ...] = ()
    not_silenced: str = ""
    not_trained: str = ""
    depends_on_depth: bool = False
    fixed: tuple[str, ...] = ()


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
        inference: what only a family without a row has, whose other columns are inferred from its modules.
        outer: the family of the model around a nested language model. All names are then those on disk.
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
    inference: InferredLayers | None = None
    outer: str = ""

    def inside(self, config: Config) -> Family:
        """The family with the names that its tensors have on disk inside an outer model.

        Args:
            config: of the outer model.

        Raises:
            UserError: the family of the outer model is not known.
        """
        prefix = prefix_of(config)
        names = {name: prefix + getattr(self, name) for name in ("layer_prefix", "embeddings", "final_norm", "lm_head")}
        # Other names, those of a layer's tensors, are relative to the layer.
        head = {names["lm_head"]: prefix + self.stored_lm_head} if self.lm_head in self.stored_names else {}
        stored_names = {name: on_disk for name, on_disk in self.stored_names.items() if name != self.lm_head}
        inference = self.inference
        if inference is not None:
            before, after = (
                {prefix + name: shape for name, shape in each.items()} for each in (inference.before, inference.after)
            )
            inference = replace(inference, before=before, after=after, base_prefix="")
        family = replace(self, **names, stored_names={**stored_names, **head}, inference=inference)
        return replace(family, outer=str(config["model_type"]))

    # ------------------------------------------------------------------ config

    def with_defaults(self, config: Config) -> Config:
        """The config with the family's defaults for entries that are absent or null.

        Some nulls mean something else than the default: that every head has its own keys and values, or that
        attention has no window or cap.
        """
        own = inner_config(config)
        given = {name: value for name, value in own.items() if value is not None or name in MEANINGFUL_NULLS}
        return {**self.defaults, **given}

    def parameters(self, config: Config, layer: int) -> Parameters:
        """The parameters of one layer of a model.

        Args:
            config: with the family's defaults, see ``with_defaults``.
            layer: index of the layer.

        Raises:
            KeyError: the number of experts is missing, which is not 0 by default.
        """
        if self.inference is not None:
            return self.inference.kinds[self.inference.kind_of[layer]]
        if self.sparse and config.get("num_local_experts") is None:
            _ = config["num_experts"]
        kind = self.sparse if _is_sparse(config, layer) else self.dense
        return {name: entry for name, entry in {**self.layer, **kind}.items() if entry.exists(config)}

    # ------------------------------------------------------------------- names

    def split(self, tensor_name: str) -> tuple[int, str] | None:
        """Splits a full name into layer and name within the layer. None outside the decoder layers."""
        return split_layer_name(self.layer_prefix, tensor_name)

    def tensor_name(self, layer: int, name: str) -> str:
        """The full name of a layer's tensor. The inverse of ``split``."""
        return self.layer_prefix.format(layer=layer) + name

    def layer_of(self, tensor_name: str) -> int | None:
        """The layer that a tensor belongs to. None outside the decoder layers."""
        split = self.split(tensor_name)
        return None if split is None else split[0]

    def has(self, stored: str) -> bool:
        """Whether a tensor on disk belongs to the language model, and not to a model around it."""
        return not self.outer or stored.startswith((self.layer_prefix.partition("layers.")[0], self.stored_lm_head))

    @property
    def not_trained(self) -> str:
        """Why the training stages cannot train the model. Empty if they can."""
        return "" if self.inference is None else self.inference.not_trained

    def is_derived(self, tensor_name: str) -> bool:
        """Whether a tensor holds nothing that was learned, so that it need not be kept."""
        split = self.split(tensor_name)
        if split is not None and split[1] in self.derived:
            return True
        if self.inference is None or self._is_in_model(tensor_name) or not self.has(tensor_name):
            return False
        return any(re.search(each, tensor_name) for each in self.inference.ignored)

    def _is_in_model(self, tensor_name: str) -> bool:
        assert self.inference is not None
        if (split := self.split(tensor_name)) is not None:
            # Layers that predict further tokens (DeepSeek-V3, GLM-4.5) are stored after those of the model, with the
            # same names.
            return split[0] < len(self.inference.kind_of) and self._entry(split[1]) is not None
        return self.parameter_of(tensor_name) in {**self.inference.before, **self.inference.after}

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
        entries = self._parameters
        fused = [whole for whole, entry in entries.items() if isinstance(entry, Fused) and part in entry.parts]
        return self.tensor_name(split[0], fused[0] if fused and name not in entries else name)

    def parts_of(self, parameter: str, config: Config) -> set[str]:
        """The full names of the tensors that a parameter is stored as if it is stored in parts. Empty if it is not."""
        split = self.split(parameter)
        entry = None if split is None else self._parameters.get(split[1])
        if split is None or not isinstance(entry, Fused):
            return set()
        return {self.tensor_name(split[0], name) for name, _, _ in entry.places(split[1], self.with_defaults(config))}

    def stored_parts(
        self, parameter: str, config: Config, stored: Collection[str]
    ) -> list[tuple[str, Place | None]] | None:
        """The tensors of a checkpoint that hold a parameter, with their places in it.

        Args:
            parameter: its full name in memory.
            config: the content of config.json.
            stored: the names of all tensors of the checkpoint.

        Returns:
            Full names on disk. A parameter that is stored as one tensor, perhaps under another name, is that tensor
            without a place. None if the checkpoint does not have the parameter.
        """
        split = self.split(parameter)
        renamed = self.stored_names.get(parameter, parameter)
        if split is not None:
            renamed = self.tensor_name(split[0], self.stored_names.get(split[1], split[1]))
        for name in (parameter, renamed):
            if name in stored:
                return [(name, None)]
        entry = None if split is None else self._entry_of_layer(*split, config)
        if split is None or not isinstance(entry, Fused):
            return None
        places = entry.places(split[1], self.with_defaults(config))
        parts: list[tuple[str, Place | None]] = [(self.tensor_name(split[0], name), place) for name, _, place in places]
        return parts if all(name in stored for name, _ in parts) else None

    def shape_of_fused(self, parameter: str, config: Config) -> tuple[int, ...]:
        """The shape in memory of a parameter of a layer that may be stored in parts."""
        split = self.split(parameter)
        assert split is not None
        entry = self._entry_of_layer(*split, config)
        assert isinstance(entry, Fused)
        return entry.shapes(split[1], self.with_defaults(config))[split[1]]

    def _entry_of_layer(self, layer: int, name: str, config: Config) -> Parameter | Fused | None:
        return self.parameters(self.with_defaults(config), layer).get(name)

    # ------------------------------------------------------------------- roles

    @cached_property
    def roles(self) -> dict[str, Role]:
        """Role by name within a layer, of all tensors and all parts of fused tensors."""
        singles = {name: entry for name, entry in self._entries.items() if isinstance(entry, Parameter)}
        return {name: self._complete_role(entry.role) for name, entry in singles.items()}

    @cached_property
    def _entries(self) -> dict[str, Parameter | Fused]:
        """All entries of the row, by every name that a tensor of a layer may have in memory or on disk."""
        return self._with_stored_names(self._parameters)

    @cached_property
    def _parameters(self) -> dict[str, Parameter | Fused]:
        """The parameters of layers of any kind, by name in memory."""
        kinds = () if self.inference is None else self.inference.kinds
        return {name: entry for kind in (self.layer, self.dense, self.sparse, *kinds) for name, entry in kind.items()}

    def _with_stored_names(self, parameters: Parameters) -> dict[str, Parameter | Fused]:
        entries = dict(parameters)
        for entry in [*entries.values()]:
            if isinstance(entry, Fused):
                entries |= entry.parts
        return entries | {stored: entries[name] for name, stored in self.stored_names.items() if name in entries}

    def _entry(self, name: str, layer: int | None = None) -> Parameter | Fused | None:
        """The entry of a tensor. Without the layer, that of a layer of any kind."""
        entries = self._entries if self.inference is None or layer is None else self._entries_of_kinds[layer]
        return entries.get(name) or entries.get(re.sub(r"\.\d+\.", ".{i}.", name))

    @cached_property
    def _entries_of_kinds(self) -> list[dict[str, Parameter | Fused]]:
        assert self.inference is not None
        kinds = [self._with_stored_names(kind) for kind in self.inference.kinds]
        return [kinds[kind] for kind in self.inference.kind_of]

    def _complete_role(self, role: Role, parallel: bool = False) -> Role:
        """The role with ``silent`` and ``after_attention``.

        A block is silenced by the tensors that write its output. Where a norm follows them (Gemma 2 and 3, OLMo 2),
        the scale of that norm is silenced instead: zero projections would keep the logits as well, but the norm of
        zero multiplies their gradient by about a thousand.
        """
        if self.inference is not None:
            return role
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

    def parts(self, tensor_name: str, config: Config) -> list[tuple[Role, Place | None]]:
        """The roles and places of what a tensor holds: one role without a place unless it is fused.

        Empty outside the decoder layers.
        """
        split = self.split(tensor_name)
        if split is None:
            return []
        # A plan asks for the layers of an expanded model with the family of its base, which may have fewer.
        has_layer = self.inference is not None and split[0] < len(self.inference.kind_of)
        entry = (self._entry(split[1], split[0]) if has_layer else None) or self._entry(split[1])
        if entry is None:
            return []
        if isinstance(entry, Parameter):
            return [(self._complete_role(entry.role), None)]
        places = entry.places(split[1], self.with_defaults(config))
        return [(self._complete_role(role), place) for _, role, place in places]

    # ------------------------------------------------------------- checkpoints

    def tensors_by_layer(self, tensor_names: Iterable[str], config: Config) -> list[list[LayerTensor]]:
        """The tensors of every layer, with fused ones split into parts, in the order of their names.

        Args:
            tensor_names: the full names of all tensors of the checkpoint.
            config: the content of its config.json.

        Raises:
            UserError: layers are not named like the family's, or hold a tensor without a role.
        """
        config = self.with_defaults(config)
        layers = self._names_by_layer(tensor_names, config["num_hidden_layers"])
        for layer, names in enumerate(layers):
            if not names:
                raise _unexpected(self.tensor_name(layer, "*"), "the model has no tensors with this name")
        return [self._tensors_of(layer, names, config) for layer, names in enumerate(layers)]

    def _tensors_of(self, layer: int, names: Iterable[str], config: Config) -> list[LayerTensor]:
        parallel = bool(config.get("use_parallel_residual"))
        return [
            LayerTensor(name, self._complete_role(role, parallel), place)
            for stored in names
            for name, role, place in self._parts(layer, stored, config)
        ]

    def _names_by_layer(self, tensor_names: Iterable[str], num_layers: int) -> list[list[str]]:
        layers: list[list[str]] = [[] for _ in range(num_layers)]
        for layer, name in filter(None, map(self.split, tensor_names)):
            if layer >= num_layers:
                raise _unexpected(self.tensor_name(layer, name), f"config.json declares only {num_layers} layers")
            if name not in self.derived:
                layers[layer].append(name)
        return layers

    def _parts(self, layer: int, stored: str, config: Config) -> Iterator[tuple[str, Role, Place | None]]:
        entry = self._entry(stored, layer)
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

    def stored_as(self, tensor_names: Iterable[str]) -> dict[str, str]:
        """Returns the names of a checkpoint's tensors by those that ``save_pretrained`` of the language model gives.

        They differ if the checkpoint is of the base model, without a head, whose names lack a prefix.
        """
        names = list(tensor_names)
        prefix = "" if self.inference is None else self.inference.base_prefix
        if not prefix or any(name.startswith(prefix) for name in names):
            return {name: name for name in names}
        return {name if name == self.stored_lm_head else f"{prefix}{name}": name for name in names}


def split_layer_name(prefix: str, name: str) -> tuple[int, str] | None:
    """Splits the full name of a tensor into layer and name within the layer. None outside the decoder layers.

    Args:
        prefix: of the names of a layer's tensors, with ``{layer}`` in place of its index.
        name: the full name.
    """
    before, after = prefix.split("{layer}")
    match = re.fullmatch(re.escape(before) + r"(\d+)" + re.escape(after) + "(.+)", name)
    return None if match is None else (int(match[1]), match[2])


def _is_sparse(config: Config, layer: int) -> bool:
    """Whether a layer has experts, by the entries that Qwen's configs have for it."""
    every = config.get("decoder_sparse_step") or 1
    dense_layers = config.get("mlp_only_layers") or ()
    return num_experts(config) > 0 and layer not in dense_layers and (layer + 1) % every == 0


def _unexpected(value: str, rule: str) -> UserError:
    remedy = "Choose a model whose layers are all alike and have the names that save_pretrained gives them."
    return bad_model(value, rule, remedy)
