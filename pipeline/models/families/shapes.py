"""The shape of every tensor of a model, worked out from its config.json before a weight is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from math import prod

from pipeline.errors import UserError, first_few
from pipeline.models.families.family import Family
from pipeline.models.families.inferred import family_for
from pipeline.models.families.parameters import (
    Config,
    Fused,
    LinearMap,
    Parameter,
    Parameters,
    dimension,
    expert_share,
    head_size,
)
from pipeline.models.flops import matrix_entries

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class LayerShape:
    """One decoder layer.

    Attributes:
        tensors: shapes by name within the layer, such as ``self_attn.q_proj.weight``.
        experts: names of the tensors that hold all experts of the layer.
        norms: names of the scales and shifts of norms.
        linear_maps: the matrices of linear maps that a tensor holds, by name. Other tensors hold none.
        mlp_outputs: names of the matrices that write the output of the MLP or of experts.
        is_gated: whether the MLP multiplies two projections of its input.
        expert_share: the fraction of the layer's experts that a token is routed to.
        is_standard: whether it is one attention block with one output projection, and one MLP.
    """

    tensors: Shapes
    experts: frozenset[str]
    norms: frozenset[str]
    linear_maps: Mapping[str, tuple[LinearMap, ...]]
    mlp_outputs: frozenset[str]
    is_gated: bool
    expert_share: Fraction
    is_standard: bool = True

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(map(prod, self.tensors.values()))

    @property
    def active_parameters(self) -> int:
        """Number of parameters that one token uses."""
        return int(sum(map(self._active_entries, self.tensors)))

    @property
    def experts_per_token(self) -> int:
        """The experts that a token is routed to. 0 in a dense layer."""
        return int(max((self.tensors[name][0] for name in self.experts), default=0) * self.expert_share)

    def mlp_units(self, hidden_size: int) -> int:
        """The intermediate size of the MLP, or the sum over the experts that one token is routed to."""
        return int(sum(map(self._active_entries, self.mlp_outputs)) / hidden_size)

    def matrix_entries(self, names: frozenset[str] | None = None) -> int:
        """Entries of the matrices that one token is multiplied with.

        Args:
            names: of the tensors to count. By default all.
        """
        return sum(
            matrix_entries(name, shape, self.expert_share)
            for name, shape in self.tensors.items()
            if names is None or name in names
        )

    def _active_entries(self, name: str) -> Fraction:
        return prod(self.tensors[name]) * (self.expert_share if name in self.experts else Fraction(1))


@dataclass(frozen=True)
class Shape:
    """A model's tensors, and the sizes that its activations follow from."""

    layers: tuple[LayerShape, ...]
    before: Shapes  # embeddings
    after: Shapes  # final norm, and the head unless it is tied to the embeddings
    layer_prefix: str
    hidden_size: int
    heads: int
    head_size: int  # of a query, a key and a value; see the function of this name
    key_size: int  # of a token's keys in all heads, and of its values
    vocab_size: int
    inferred: bool = False  # from the model's modules, since its family has no row
    not_silenced: str = ""  # why a new layer cannot keep the logits; empty if it can
    not_trained: str = ""  # why the training stages cannot train the model; empty if they can
    depends_on_depth: bool = False  # whether a layer computes something else at another index, or in a deeper model
    fixed: frozenset[str] = frozenset()  # names, within layers or outside, of tensors that gradients do not reach

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        outside = sum(map(prod, [*self.before.values(), *self.after.values()]))
        return outside + sum(layer.parameters for layer in self.layers)

    @property
    def active_parameters(self) -> int:
        """Number of parameters that one token uses: all of them in a dense model."""
        return self.parameters - sum(layer.parameters - layer.active_parameters for layer in self.layers)

    @property
    def largest_layer(self) -> int:
        """Number of parameters of the largest layer."""
        return max(layer.parameters for layer in self.layers)

    @property
    def head(self) -> str:
        """The name of the head's matrix, which is that of the embeddings if they are tied."""
        matrices = [name for names in (self.before, self.after) for name, shape in names.items() if len(shape) == 2]
        return matrices[-1]

    @property
    def head_entries(self) -> int:
        """Number of elements of the head's matrix, whose width need not be that of the layers (OPT-350m)."""
        return prod({**self.before, **self.after}[self.head])

    @property
    def head_bias(self) -> frozenset[str]:
        """The name of the head's bias, if it has one."""
        return frozenset({self.head.removesuffix("weight") + "bias"} & self.after.keys())

    @property
    def embeddings(self) -> frozenset[str]:
        """Full names of the embeddings of tokens, and of positions if they are learned."""
        return frozenset(name for name, shape in self.before.items() if len(shape) > 1)

    @property
    def norms(self) -> frozenset[str]:
        """Full names of the scales and shifts of all norms, inside and outside of the layers."""
        outside = {name for names in (self.before, self.after) for name, shape in names.items() if len(shape) == 1}
        outside -= self.head_bias
        prefixes = [self.layer_prefix.format(layer=index) for index in range(len(self.layers))]
        inside = (prefix + name for prefix, layer in zip(prefixes, self.layers, strict=True) for name in layer.norms)
        return frozenset({*outside, *inside})

    @property
    def experts(self) -> frozenset[str]:
        """Full names of the tensors that hold all experts of a layer."""
        return frozenset(
            self.layer_prefix.format(layer=index) + name
            for index, layer in enumerate(self.layers)
            for name in layer.experts
        )

    @property
    def depth_warning(self) -> str:
        """What a user who adds layers should know; empty if the base's own layers stay what they are."""
        if not self.depends_on_depth:
            return ""
        return (
            "a layer of this model computes something else at another index or in a deeper model: added layers also "
            "change the base's own layers, whose weights stay the same"
        )

    @property
    def gaps_between_like_layers(self) -> list[int]:
        """The layers that have the same tensors as the next one."""
        return [gap for gap, (lower, upper) in enumerate(pairwise(self.layers)) if lower.tensors == upper.tensors]

    def with_layers(self, sources: Sequence[int]) -> Shape:
        """The model whose layer i is like layer ``sources[i]`` of this one."""
        return replace(self, layers=tuple(self.layers[source] for source in sources))

    def tensors(self) -> Iterator[tuple[str, int | None, tuple[int, ...]]]:
        """Yields full name, layer (None outside the layers) and shape of every tensor, from input to output."""
        yield from ((name, None, shape) for name, shape in self.before.items())
        for index, layer in enumerate(self.layers):
            prefix = self.layer_prefix.format(layer=index)
            yield from ((prefix + name, index, shape) for name, shape in layer.tensors.items())
        yield from ((name, None, shape) for name, shape in self.after.items())

    def learned(self) -> dict[str, int | None]:
        """Layer (None outside the layers) by full name of every tensor that can be trained, from input to output."""
        found = {}
        for name, layer, _ in self.tensors():
            inside = name if layer is None else name.removeprefix(self.layer_prefix.format(layer=layer))
            if inside not in self.fixed:
                found[name] = layer
        return found


def shape_of(config: Config) -> Shape:
    """The model that a config.json describes.

    Raises:
        UserError: the family has no row and cannot be inferred, or an entry is missing that the sizes follow from.
    """
    family = family_for(config)
    try:
        return _shape(family, family.with_defaults(config))
    except KeyError as error:
        raise UserError(
            setting="model.path",
            value=f"a config without {error.args[0]}",
            rule="the sizes of the model follow from that entry",
            remedy="Give the model with its complete config.json.",
        ) from error


def _shape(family: Family, config: Config) -> Shape:
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    before, after = _outside(family, config)
    size = head_size(config, dimension(config, "head_dim"))
    return Shape(
        layers=tuple(_layer_shape(family, config, index) for index in range(config["num_hidden_layers"])),
        before=before,
        after=after,
        layer_prefix=family.layer_prefix,
        hidden_size=hidden,
        heads=config["num_attention_heads"],
        head_size=size,
        key_size=dimension(config, "num_key_value_heads") * size,
        vocab_size=vocabulary,
        inferred=family.inference is not None,
        not_silenced="" if family.inference is None else family.inference.not_silenced,
        not_trained=family.not_trained,
        depends_on_depth=family.inference is not None and family.inference.depends_on_depth,
        fixed=frozenset() if family.inference is None else frozenset(family.inference.fixed),
    )


def _outside(family: Family, config: Config) -> tuple[Shapes, Shapes]:
    """The tensors before and after the layers."""
    if family.inference is not None:
        return family.inference.before, family.inference.after
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    final_norm = {family.final_norm: (hidden,)}
    if family.norm_bias:
        final_norm[family.final_norm.removesuffix("weight") + "bias"] = (hidden,)
    head = {} if config.get("tie_word_embeddings") else {family.lm_head: (vocabulary, hidden)}
    return {family.embeddings: (vocabulary, hidden)}, {**final_norm, **head}


def _layer_shape(family: Family, config: Config, layer: int) -> LayerShape:
    parameters = family.parameters(config, layer)
    matrices = {name: entry.matrix_roles for name, entry in parameters.items()}
    return LayerShape(
        tensors={k: shape for name, entry in parameters.items() for k, shape in entry.shapes(name, config).items()},
        experts=frozenset(name for name, entry in parameters.items() if isinstance(entry, Fused) and entry.stacked),
        norms=frozenset(
            tensor
            for name, entry in parameters.items()
            if isinstance(entry, Parameter) and entry.role.kind == "norm"
            for tensor in entry.shapes(name, config)
        ),
        linear_maps={name: maps for name, entry in parameters.items() if (maps := entry.linear_maps(config))},
        mlp_outputs=frozenset(name for name, roles in matrices.items() if "down" in roles),
        is_gated=any("gate" in roles for roles in matrices.values()),
        expert_share=expert_share(config),
        is_standard=_is_standard(parameters),
    )


def _is_standard(parameters: Parameters) -> bool:
    roles = [
        entry.role for parameter in parameters.values()
        for entry in (parameter.parts.values() if isinstance(parameter, Fused) else [parameter])
    ]  # fmt: skip
    outputs = [role for role in roles if (role.kind, role.side) == ("matrix", "output")]
    attention = [role for role in outputs if role.block == "attention"]
    return len(attention) == 1 and len(outputs) > 1 and not any(role.kind == "other" for role in roles)


def check_stored(config: Config, stored: Shapes, where: object) -> None:
    """Checks the names and shapes of all stored tensors. The load stage checks them again, by transformers' own rules.

    Args:
        config: the content of config.json.
        stored: shape by name on disk.
        where: the model, for the message.

    Raises:
        UserError: tensors are missing, or are not in the model, or have another shape.
    """
    family = family_for(config)
    stored = {name: stored[on_disk] for name, on_disk in family.stored_as(stored).items() if family.has(name)}
    expected = {name: shape for name, _, shape in shape_of(config).tensors()}
    tied = {} if family.lm_head in expected else {family.lm_head: family.embeddings}
    found: dict[str, set[str]] = {}  # names on disk by name in memory
    for name in stored:
        if not family.is_derived(name) and "rotary_emb" not in name:
            parameter = family.parameter_of(name)
            found.setdefault(tied.get(parameter, parameter), set()).add(name)
    faults = [f"{name} is missing" for name in expected if name not in found]
    for name, on_disk in found.items():
        if name not in expected:
            faults += [f"{stored_name} is not in the model" for stored_name in sorted(on_disk)]
        elif name in on_disk and tuple(stored[name]) != expected[name]:
            faults.append(f"{name} has the shape {list(stored[name])}, but {list(expected[name])} by the config")
        elif name not in on_disk and not on_disk.isdisjoint(parts := family.parts_of(name, config)):
            faults += [f"{part} is missing" for part in sorted(parts - on_disk)]
    if faults:
        raise weights_disagree(where, first_few(faults, separator="; "))


def weights_disagree(where: object, faults: str) -> UserError:
    """Returns the error for weights that are not those of the config's model."""
    return UserError(
        setting="model.path",
        value=where,
        rule=f"its weights and its config.json disagree: {faults}",
        remedy="Use the config.json and the weight files that were saved together, for a causal language model.",
    )
