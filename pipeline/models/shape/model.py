"""A causal language model as names and shapes of tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import prod

from pipeline.models.flops import matrix_entries

Tensors = Mapping[str, tuple[int, ...]]

EXPERTS = ".experts."  # in the names of tensors that hold all experts of a layer
MLP_OUTPUTS = ("down_proj", "down_proj.weight", "c_proj.weight", "dense_4h_to_h.weight")


@dataclass(frozen=True)
class Layer:
    """One decoder layer.

    Attributes:
        tensors: shapes by name within the layer, such as ``self_attn.q_proj.weight``.
        expert_share: of its experts, those that one token meets.
    """

    tensors: Tensors
    expert_share: Fraction

    @property
    def parameters(self) -> int:
        """Of all tensors."""
        return sum(map(prod, self.tensors.values()))

    @property
    def active_parameters(self) -> int:
        """Those that one token meets."""
        return int(sum(prod(shape) * self._share(name) for name, shape in self.tensors.items()))

    def mlp_units(self, hidden_size: int) -> int:
        """Units of the MLP, or of the experts that one token meets."""
        outputs = (item for item in self.tensors.items() if item[0].endswith(MLP_OUTPUTS))
        return int(sum(prod(shape) * self._share(name) for name, shape in outputs) / hidden_size)

    @property
    def is_gated(self) -> bool:
        """Whether the MLP multiplies two projections of its input."""
        return any("gate_proj" in name or "gate_up_proj" in name for name in self.tensors)

    def matrix_entries(self, names: frozenset[str] | None = None) -> int:
        """Entries of the matrices that one token is multiplied with; of all tensors, or of those named."""
        return sum(
            matrix_entries(name, shape, self.expert_share)
            for name, shape in self.tensors.items()
            if names is None or name in names
        )

    def _share(self, name: str) -> Fraction:
        return self.expert_share if EXPERTS in name else Fraction(1)


@dataclass(frozen=True)
class Shape:
    """A model's tensors, and the sizes that its activations follow from."""

    layers: tuple[Layer, ...]
    before: Tensors  # embeddings
    after: Tensors  # final norm, and the head where it is not the embeddings
    layer_prefix: str
    hidden_size: int
    heads: int
    head_size: int
    key_size: int  # of one token's keys in all their heads, as of its values
    vocab_size: int

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        outside = sum(map(prod, [*self.before.values(), *self.after.values()]))
        return outside + sum(layer.parameters for layer in self.layers)

    @property
    def active_parameters(self) -> int:
        """Those that one token meets: all, where there are no experts."""
        return self.parameters - sum(layer.parameters - layer.active_parameters for layer in self.layers)

    @property
    def head(self) -> str:
        """The name of the head's tensor; where it is tied, that of the embeddings."""
        matrices = [name for names in (self.before, self.after) for name, shape in names.items() if len(shape) == 2]
        return matrices[-1]

    def with_layers(self, sources: Sequence[int]) -> Shape:
        """The model whose layer i is like this one's layer ``sources[i]``."""
        return replace(self, layers=tuple(self.layers[source] for source in sources))

    def tensors(self) -> Iterator[tuple[str, int | None, tuple[int, ...]]]:
        """Full name, layer (None outside of them) and shape of every tensor, from input to output."""
        yield from ((name, None, shape) for name, shape in self.before.items())
        for index, layer in enumerate(self.layers):
            prefix = self.layer_prefix.format(layer=index)
            yield from ((prefix + name, index, shape) for name, shape in layer.tensors.items())
        yield from ((name, None, shape) for name, shape in self.after.items())
