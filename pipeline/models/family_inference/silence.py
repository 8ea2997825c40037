"""Finds the parameters that make a layer pass on its input unchanged when they are filled with certain values.

All parameters of a layer are silenced first: matrices and biases are filled with zeros, and the scales of norms with
the value that makes their output zero. If the layer is then not the identity, it has no such parameters: it normalizes
or scales the residual stream itself. Otherwise one module after another is restored, in the order in which they
compute, unless that changes the layer's output. What cannot be restored writes what a block adds to the residual
stream: output projections, or the norms that follow them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from pipeline.models.family_inference.decoder import LayerCall, NotUnderstoodError, Step, filled

Values = dict[str, float]  # by the name of a parameter within its layer


@dataclass(frozen=True)
class Silence:
    """What silences a layer.

    Attributes:
        values: the parameters to fill, with their values.
        writers: the parameters outside of norms that write what a block adds, possibly through a norm.
    """

    values: Values
    writers: frozenset[str]


def is_norm(module: nn.Module) -> bool:
    """Returns whether a module is a norm: it is called one, and its own parameters have one dimension.

    They may have two if the name ends in "norm": Cohere has a scale for every head, [heads, head size].
    """
    own, name = list(module.parameters(recurse=False)), type(module).__name__.lower()
    return "norm" in name and bool(own) and (name.endswith("norm") or all(tensor.dim() == 1 for tensor in own))


def norm_offset(step: Step) -> float:
    """Returns what a norm adds to its stored scale: 1 if a scale of -1 makes its output zero, and otherwise 0."""
    scale = dict(step.module.named_parameters(recurse=False)).get("weight")
    if scale is None:
        return 0.0
    own = dict(step.module.named_parameters(recurse=False))
    with filled(dict.fromkeys(own, 0.0), own):
        output = step.repeat()
    return 0.0 if output is None or not output.any() else 1.0


def silence(call: LayerCall, steps: list[Step]) -> Silence:
    """Finds what silences a layer.

    Args:
        call: a call of the layer.
        steps: its trace.

    Raises:
        NotUnderstoodError: nothing does.
    """
    parameters = dict(call.layer.named_parameters())
    zero = _zero_values(call.layer, parameters, steps)
    values = dict(zero)
    if not _is_silent(call, values, parameters):
        # A parameter that multiplies the residual stream must be one instead.
        gates = {name for name, tensor in parameters.items() if tensor.dim() <= 1 and _is_bare(call.layer, name)}
        values |= dict.fromkeys(gates, 1.0)
        if not gates or not _is_silent(call, values, parameters):
            raise NotUnderstoodError(
                f"with all outputs of its modules at zero, {type(call.layer).__name__} still changes the hidden states"
            )
    order = _order(parameters, steps)
    needed = _needed(call, values, parameters, order)
    norms = {name for name in parameters if is_norm(_owner(call.layer, name))}
    if not norms & set(needed):
        return Silence(needed, frozenset(needed))
    # Output norms stay as they are now, so that the matrices before them are found.
    without_norms = {name: value for name, value in values.items() if name not in norms}
    shifts = {name: zero[name] for name in needed if name in norms and name.endswith("bias")}
    if not _is_silent(call, without_norms | shifts, parameters):
        return Silence(needed, frozenset())
    writers = _needed(call, without_norms | shifts, parameters, [name for name in order if name not in shifts])
    return Silence(needed, frozenset(writers) - norms)


def _zero_values(layer: nn.Module, parameters: Mapping[str, Tensor], steps: list[Step]) -> Values:
    offsets = {step.name: norm_offset(step) for step in steps if is_norm(step.module)}
    values = {}
    for name in parameters:
        module, _, own = name.rpartition(".")
        values[name] = 0.0 - offsets.get(module, 0.0) if own == "weight" else 0.0
    return values


def _order(parameters: Mapping[str, Tensor], steps: list[Step]) -> list[str]:
    """Returns the parameters in the order in which their modules compute."""
    finished = {step.name: number for number, step in enumerate(steps)}
    started = {step.name: step.started for step in steps}

    def rank(name: str) -> float:
        module = name.rpartition(".")[0]
        if module in finished:
            return finished[module]
        while module not in started:  # it is not called: a module around it uses its parameters
            module = module.rpartition(".")[0]
        return started[module] - 0.5

    return sorted(parameters, key=rank)  # stable: parameters of one module keep their order


def _needed(call: LayerCall, values: Values, parameters: Mapping[str, Tensor], order: Iterable[str]) -> Values:
    """Returns the values without which the layer is not silent, given that later modules keep theirs."""
    needed = dict(values)
    for name in order:
        if name in needed:
            fewer = {other: value for other, value in needed.items() if other != name}
            if _is_silent(call, fewer, parameters):
                needed = fewer
    return needed


def _is_silent(call: LayerCall, values: Values, parameters: Mapping[str, Tensor]) -> bool:
    with filled(values, parameters):
        return call.is_identity()


def _owner(layer: nn.Module, name: str) -> nn.Module:
    return layer.get_submodule(name.rpartition(".")[0])


def _is_bare(layer: nn.Module, name: str) -> bool:
    """Returns whether a parameter belongs to a module that is neither a norm nor a linear map."""
    owner = _owner(layer, name)
    return not is_norm(owner) and not hasattr(owner, "in_features") and type(owner).__name__ != "Conv1D"
