"""Parameters by the names they are stored under. Transformers stacks a layer's experts into one parameter, and renames
some tensors, as it loads a model; what was trained in memory goes back to disk as it was stored.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion


def by_stored_name(model_dir: Path, stored: Collection[str], tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The same tensors by their names in a model directory, taken apart where they are stored apart.

    Args:
        stored: all names there.
        tensors: some of the model's parameters, by their names in memory; read when they are asked for.
    """
    return tensors if set(tensors) <= set(stored) else _StoredTensors(model_dir, stored, tensors)


class _StoredTensors(Mapping[str, Tensor]):
    def __init__(self, model_dir: Path, stored: Collection[str], tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        with torch.device("meta"):
            self._model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_dir))
        # A layer's experts come from two parameters, which a reader in order of stored names asks for by turns.
        self._taken_apart = lru_cache(maxsize=2)(self._take_apart)
        parameters = dict(self._model.named_parameters())
        self._parameter_of: dict[str, str] = {}
        for name in tensors:
            renamed = name not in stored and name in parameters
            parts = revert_weight_conversion(self._model, {name: parameters[name].data}) if renamed else (name,)
            self._parameter_of.update(dict.fromkeys(parts, name))

    def _take_apart(self, parameter: str) -> dict[str, Tensor]:
        parts: dict[str, Tensor] = revert_weight_conversion(self._model, {parameter: self._tensors[parameter]})
        return parts

    def __getitem__(self, name: str) -> Tensor:
        parameter = self._parameter_of[name]
        return self._tensors[name] if parameter == name else self._taken_apart(parameter)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameter_of)

    def __len__(self) -> int:
        return len(self._parameter_of)
