"""The decoder layers of a model that transformers has built, and what one of them computes by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.models.families.family import split_layer_name
from pipeline.models.family_inference.small import tokens_for


class NotUnderstoodError(Exception):
    """A model whose family cannot be inferred. The message names the module or tensor that was not understood."""


@dataclass(frozen=True)
class Decoder:
    """The list of a model's decoder layers.

    Attributes:
        prefix: of the names of parameters inside a layer, with ``{layer}`` in place of its index.
    """

    model: PreTrainedModel
    prefix: str
    layers: nn.ModuleList

    def split(self, name: str) -> tuple[int, str] | None:
        """Splits a parameter's full name into layer and name within the layer. None outside the layers."""
        return split_layer_name(self.prefix, name)

    def inside(self, layer: int) -> dict[str, Tensor]:
        """Returns the parameters and saved buffers of a layer by their names within the layer."""
        module = self.layers[layer]
        saved = module.state_dict(keep_vars=True)
        names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
        return {name: saved[name] for name in [*names, *(name for name in saved if name not in names)]}


def decoder_of(model: PreTrainedModel) -> Decoder:
    """Finds the list of decoder layers: the only outermost list with as many modules as the config has layers.

    Raises:
        NotUnderstoodError: there is no such list, or there are several.
    """
    depth = model.config.get_text_config(decoder=True).num_hidden_layers
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    }
    outermost = {
        name: module for name, module in found.items() if not any(name.startswith(f"{other}.") for other in found)
    }
    if len(outermost) != 1:
        lists = ", ".join(outermost) or "none"
        raise NotUnderstoodError(f"the model must have one list of {depth} decoder layers, and it has {lists}")
    ((name, layers),) = outermost.items()
    decoder = Decoder(model, f"{name}.{{layer}}.", layers)
    _refuse_shared(decoder)
    return decoder


def _refuse_shared(decoder: Decoder) -> None:
    owner: dict[int, int] = {}
    for index, layer in enumerate(decoder.layers):
        for name, parameter in layer.named_parameters():
            if (other := owner.setdefault(id(parameter), index)) != index:
                raise NotUnderstoodError(f"layers {other} and {index} share the parameter {name}")


@dataclass(frozen=True)
class Step:
    """One module of a layer in the order in which modules finish.

    Attributes:
        name: of the module within the layer. Empty for the layer itself.
        started: the number of modules that had finished when this one started.
        args, kwargs: its arguments.
        output: the first tensor of its result.
    """

    name: str
    module: nn.Module
    started: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor | None

    @property
    def input(self) -> Tensor | None:
        """The first tensor among its arguments."""
        return _first_tensor((self.args, self.kwargs))

    @torch.no_grad()
    def repeat(self) -> Tensor | None:
        """Returns the output that the module computes from the same arguments with its current parameters."""
        return _first_tensor(self.module(*self.args, **self.kwargs))


class LayerCall:
    """A decoder layer with the arguments of a call, which can be repeated after parameters are changed."""

    def __init__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.layer, self._args, self._kwargs = layer, args, kwargs
        first = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(first, Tensor):
            raise NotUnderstoodError(f"{type(layer).__name__} does not receive hidden states as its first argument")
        self.hidden = first.clone()

    @torch.no_grad()
    def output(self) -> Tensor:
        """Returns the hidden states that the layer passes on."""
        # A layer may change its arguments in place.
        args = (self.hidden.clone(), *self._args[1:]) if self._args else ()
        kwargs = self._kwargs if self._args else {**self._kwargs, "hidden_states": self.hidden.clone()}
        output = _first_tensor(self.layer(*args, **kwargs))
        if output is None or output.shape != self.hidden.shape:
            raise NotUnderstoodError(f"{type(self.layer).__name__} does not return hidden states of its input's shape")
        return output

    def is_identity(self) -> bool:
        """Returns whether the layer passes on its input unchanged."""
        return torch.equal(self.output(), self.hidden)

    def trace(self) -> list[Step]:
        """Runs the layer once. Returns its modules in the order in which they finish."""
        steps: list[Step] = []
        started: dict[str, int] = {}

        def start(name: str) -> Callable[..., None]:
            return lambda module, args: started.update({name: len(steps)})

        def finish(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                steps.append(Step(name, module, started[name], args, kwargs, _first_tensor(output)))

            return hook

        modules = list(self.layer.named_modules())
        handles = [module.register_forward_pre_hook(start(name)) for name, module in modules]
        handles += [module.register_forward_hook(finish(name), with_kwargs=True) for name, module in modules]
        try:
            self.output()
        finally:
            for handle in handles:
                handle.remove()
        return steps


def call_layers(decoder: Decoder) -> list[LayerCall]:
    """Runs the model on a few tokens, without a cache. Returns the call of every layer.

    Raises:
        NotUnderstoodError: a layer is not called exactly once.
    """
    calls: list[list[LayerCall]] = [[] for _ in decoder.layers]

    def record(index: int) -> Callable[..., None]:
        return lambda module, args, kwargs: calls[index].append(LayerCall(module, args, dict(kwargs)))

    handles = [
        layer.register_forward_pre_hook(record(index), with_kwargs=True) for index, layer in enumerate(decoder.layers)
    ]
    try:
        with torch.no_grad():
            decoder.model(tokens_for(decoder.model), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    for index, made in enumerate(calls):
        if len(made) != 1:
            raise NotUnderstoodError(f"layer {index} is called {len(made)} times per token")
    return [made for (made,) in calls]


@contextmanager
def filled(values: Mapping[str, float], parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """Fills parameters with values, and restores them afterwards."""
    saved = {name: parameters[name].detach().clone() for name in values}
    try:
        with torch.no_grad():
            for name, value in values.items():
                parameters[name].fill_(value)
        yield
    finally:
        with torch.no_grad():
            for name, tensor in saved.items():
                parameters[name].copy_(tensor)


def _first_tensor(value: Any) -> Tensor | None:
    """Returns the first tensor with floating-point numbers in nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        return value if value.is_floating_point() else None
    entries = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return next((tensor for entry in entries if (tensor := _first_tensor(entry)) is not None), None)
