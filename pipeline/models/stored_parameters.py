"""A model's parameters as they are in memory, read from a checkpoint that stores some of them in parts.

Transformers stacks the experts of a layer into one parameter and renames some tensors when it loads a model. Training
knows parameters by their names in memory; what it writes has the names and shapes of the checkpoint. A language model
inside another model is in memory alone, with the names that it has as a model of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property, reduce

import torch
from torch import Tensor

from pipeline.models.families import Family, Place, family_for, prefix_of
from pipeline.models.reading import ModelDirectory
from pipeline.models.tensors import TensorSpec


class StoredParameters:
    """Reads parameters by their names in memory, and takes them apart as they are stored.

    Args:
        directory: a model directory, in the published format of its family or in that of transformers' memory.
    """

    def __init__(self, directory: ModelDirectory) -> None:
        self._directory = directory
        self._parts: dict[str, Mapping[str, Place | None]] = {}  # by parameter

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Dtype and shape of every stored tensor by name."""
        return self._directory.specs

    def names(self, parameter: str) -> list[str]:
        """Returns the names of the stored tensors that hold a parameter.

        Args:
            parameter: its name in memory or, if it is stored as one tensor, on disk.

        Raises:
            ValueError: the directory does not have the parameter.
        """
        return list(self._places(parameter))

    def shape(self, parameter: str) -> tuple[int, ...]:
        """Returns the shape of a parameter in memory."""
        (first, place), *_ = self._places(parameter).items()
        if place is None:
            return self.specs[first].shape
        return self._family.shape_of_fused(self._prefix + parameter, self._config)

    def read(self, parameter: str) -> Tensor:
        """Reads a parameter in its shape in memory, and in its stored dtype: the widest one if its parts differ."""
        places = self._places(parameter)
        tensors = {name: self._directory.read(name) for name in places}
        (first, place), *_ = places.items()
        if place is None:
            return tensors[first]
        dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values()))
        whole = torch.empty(self.shape(parameter), dtype=dtype)
        for name, place in places.items():
            assert place is not None
            place.write(whole, tensors[name])
        return whole

    def part(self, parameter: str, name: str, value: Tensor) -> Tensor:
        """Returns what the stored tensor ``name`` holds of the value of a parameter, in its stored dtype."""
        place = self._places(parameter)[name]
        return (value if place is None else place.read(value)).to(self.specs[name].dtype)

    def _places(self, parameter: str) -> Mapping[str, Place | None]:
        if parameter in self.specs:
            return {parameter: None}
        if parameter not in self._parts:
            parts = self._family.stored_parts(self._prefix + parameter, self._config, self.specs)
            if parts is None:
                raise ValueError(f"{self._directory.path} has no tensor {parameter}")
            self._parts[parameter] = dict(parts)
        return self._parts[parameter]

    @cached_property
    def _config(self) -> dict[str, object]:
        return self._directory.config

    @cached_property
    def _prefix(self) -> str:
        return prefix_of(self._config)

    @cached_property
    def _family(self) -> Family:
        return family_for(self._config)
