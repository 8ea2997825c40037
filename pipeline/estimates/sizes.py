"""The sizes of the models before and after expansion, and what of the larger one trains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

from pipeline.config import Expand, Train
from pipeline.config.training import NEWTON_SCHULZ_STEPS
from pipeline.expansion.layer_plan import LayerPlan
from pipeline.expansion.method import Method, method_of
from pipeline.models.families import LinearMap, Shape
from pipeline.models.flops import HeadWork, LayerWork, TrainingFlops, orthogonalization_flops
from pipeline.training.selection import layers_at_learning_rate, select_parameters


@dataclass(frozen=True)
class Trained:
    """A model and its trainable parameters.

    Attributes:
        names: the full names of the tensors that train.
        at_learning_rate: the layers whose rate is ``learning_rate`` also if ``base_learning_rate`` is set.
    """

    shape: Shape
    names: frozenset[str]
    at_learning_rate: frozenset[int] = frozenset()

    @cached_property
    def parameters(self) -> int:
        """The number of trainable parameters."""
        return sum(prod(shape) for name, _, shape in self.shape.tensors() if name in self.names)

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """The decoder layers with trainable parameters."""
        return tuple(sorted({i for name, i, _ in self.shape.tensors() if i is not None and name in self.names}))

    @property
    def lowest(self) -> int:
        """The lowest layer that gradients must reach, or the number of layers if they need not reach any."""
        if self.names & set(self.shape.before):
            return 0
        return min(self.layers, default=len(self.shape.layers))

    def inside(self, layer: int) -> frozenset[str]:
        """Returns the trainable tensors of a layer by their names within the layer."""
        prefix = self.shape.layer_prefix.format(layer=layer)
        return frozenset(name for name in self.shape.layers[layer].tensors if prefix + name in self.names)

    def with_several_rates(self, role_learning_rates: Mapping[str, float]) -> int:
        """Returns the number of trainable parameters in tensors that hold matrices with different learning rates."""
        return sum(
            sum(each.entries for each in maps)
            for index, layer in enumerate(self.shape.layers)
            for name, maps in layer.linear_maps.items()
            if name in self.inside(index) and len({role_learning_rates.get(each.role, 1.0) for each in maps}) > 1
        )

    @property
    def head_trains(self) -> bool:
        """Whether the output head trains, which may be tied to the embeddings."""
        return self.shape.head in self.names

    def updated_by_muon(self, optimizer: str) -> Iterator[LinearMap]:
        """Yields the trained matrices of layers that Muon updates with a value of ``optimizer``; none for AdamW."""
        for index, layer in enumerate(self.shape.layers):
            if optimizer == "adamw" or (optimizer == "muon_new_layers" and index not in self.at_learning_rate):
                continue
            inside = self.inside(index)
            yield from (each for name, maps in layer.linear_maps.items() if name in inside for each in maps)

    def flops(
        self, sequence_length: int, optimizer: str = "adamw", newton_schulz_steps: int = NEWTON_SCHULZ_STEPS
    ) -> TrainingFlops:
        """Counts the floating-point operations by the formula that training reports."""
        shape = self.shape
        work = [
            LayerWork(layer.matrix_entries(), layer.matrix_entries(self.inside(index)))
            for index, layer in enumerate(shape.layers)
        ]
        final_norm = any(name in self.names for name in shape.after if name not in {shape.head, *shape.head_bias})
        reaches_below = self.lowest < len(shape.layers) or final_norm
        head = HeadWork(shape.head_entries, self.head_trains, reaches_below)
        flops = TrainingFlops.count(work, self.lowest, head, sequence_length * shape.heads * shape.head_size)
        matrices = self.updated_by_muon(optimizer)
        update = sum(
            each.count * orthogonalization_flops(each.rows, each.columns, newton_schulz_steps) for each in matrices
        )
        return replace(flops, update=update)


def trained_part(section: str, trainable: str, shape: Shape, expansion: Mapping[str, Any]) -> Trained:
    """Applies ``pretrain.trainable`` or ``sft.trainable`` to a model.

    Args:
        expansion: "method", "trains" and "layers" as in ``expansion.json``.

    Raises:
        UserError: nothing would train.
    """
    names = select_parameters(section, trainable, shape, expansion)
    return Trained(shape, frozenset(names), frozenset(layers_at_learning_rate(trainable, expansion)))


@dataclass(frozen=True)
class Sizes:
    """A base model and the model that ``expand`` makes of it."""

    base: Shape
    grown: Shape
    layers: LayerPlan
    method: Method

    def trained(self, section: str, train: Train) -> Trained:
        """Applies the ``trainable`` of a training section to the expanded model.

        Raises:
            UserError: nothing would train.
        """
        expansion: dict[str, Any] = {
            "method": self.method.method,
            "trains": self.method.trains,
            "layers": self.layers.to_json(),
        }
        if "matched" in train.trainable_terms:
            expansion["matched"] = self.method.matched_layers(len(self.base.layers))
        return trained_part(section, train.trainable, self.grown, expansion)


def sizes_of(expand: Expand, base: Shape) -> Sizes:
    """Works out the sizes of both models.

    Raises:
        UserError: the base cannot be expanded as asked.
    """
    method = method_of(expand)
    layers = method.place(len(base.layers))
    return Sizes(base, base.with_layers(layers.config_sources), layers, method)
