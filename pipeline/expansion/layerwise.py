"""Runs the decoder layers of a model one at a time, on any device, with the model in memory or streamed from disk.

The rest of the model is run by transformers' own code: in a first pass, in which every layer returns its input, the
arguments of each layer are recorded (masks, rotary embeddings, whatever the family passes); in a last one, the top
layer returns given hidden states, so that the final norm, the head and all scales and caps are the family's. Everything
is computed in float32, so that results do not depend on where a model fits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.errors import UserError
from pipeline.files import read_json
from pipeline.models.families import shape_of
from pipeline.models.family_inference.decoder import NotUnderstoodError, decoder_of
from pipeline.models.forward import packed_mask
from pipeline.models.loading import load_language_model

Form = Callable[[Tensor], Any]  # hidden states -> what a layer returns
FORMS: tuple[Form, ...] = (lambda x: x, lambda x: (x,), lambda x: (x, None), lambda x: (x, None, None))
RunLayer = Callable[[int, Tensor], Tensor]  # (block, its input [tokens, hidden]) -> output [tokens, hidden]


@dataclass(frozen=True)
class Blocks:
    """Token blocks, all ``[blocks, tokens]``.

    Attributes:
        targets: True where a token is predicted from the one before it.
    """

    ids: Tensor
    positions: Tensor
    targets: Tensor


@dataclass(frozen=True)
class _Call:
    """The arguments of a layer, without the hidden states ``[1, tokens, hidden]``."""

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class LayerwiseModel:
    """A model whose layers are run one at a time on some token blocks.

    Args:
        directory: the model directory.
        blocks: the token blocks.
        device: where everything is computed.
        fits: whether the model is loaded whole. If not, each layer is read from disk when it is run, and freed.
        work_dir: a folder for weights that transformers stores in another layout.

    Raises:
        UserError: the layers of this model cannot be run one at a time.
    """

    def __init__(self, directory: Path, blocks: Blocks, device: torch.device, fits: bool, work_dir: str) -> None:
        self._device = device
        streamed: dict[str, Any] = {} if fits else {"device_map": {"": "disk"}, "offload_folder": work_dir}
        self._model: PreTrainedModel = load_language_model(directory, torch.float32, **streamed)
        try:
            self._layers = decoder_of(self._model).layers
        except NotUnderstoodError as error:
            raise _not_layerwise(directory, str(error)) from error
        if fits:
            self._model.to(device)
        else:
            inside = {id(module) for layer in self._layers for module in layer.modules()}
            _read((module for module in self._model.modules() if id(module) not in inside), device)
        # Some families separate packed documents only by a mask. Those that cannot be trained may accept none.
        self._accepts_mask = not shape_of(read_json(directory / "config.json")).not_trained
        self._blocks = Blocks(blocks.ids.to(device), blocks.positions.to(device), blocks.targets.to(device))
        self._form = self._find_form(directory)
        self._calls = [self._record(self._form, block) for block in range(len(blocks.ids))]

    @property
    def num_layers(self) -> int:
        """The number of decoder layers."""
        return len(self._layers)

    def inputs(self) -> Tensor:
        """Returns the input of the first layer ``[blocks, tokens, hidden]``, on the CPU."""
        return torch.cat([calls[0].hidden.cpu() for calls in self._calls])

    @contextmanager
    def layer(self, index: int) -> Iterator[RunLayer]:
        """Yields the function that runs a layer. A layer that is streamed can be run only once."""
        layer = self._layers[index]
        was_read = _read(layer.modules(), self._device)

        @torch.inference_mode()
        def run(block: int, hidden: Tensor) -> Tensor:
            call = self._calls[block][index]
            output = layer(hidden[None].to(self._device), *call.args, **call.kwargs)
            first: Tensor = output if isinstance(output, Tensor) else output[0]
            return first[0].cpu()

        yield run
        if was_read:
            layer.to("meta")

    @torch.inference_mode()
    def losses(self, outputs: Tensor) -> Tensor:
        """Returns the loss in nats of every target, for outputs of the last layer ``[blocks, tokens, hidden]``."""
        losses = []
        for block, output in enumerate(outputs):
            with self._replaced(partial(self._top_returns, output[None].to(self._device))):
                logits = self._forward(block)
            wanted = self._blocks.targets[block, 1:]
            tokens = self._blocks.ids[block, 1:][wanted]
            losses.append(nn.functional.cross_entropy(logits[0, :-1][wanted].float(), tokens, reduction="none").cpu())
        return torch.cat(losses)

    def _top_returns(self, output: Tensor, index: int, call: _Call) -> Tensor:
        return output if index == self.num_layers - 1 else call.hidden

    def _forward(self, block: int) -> Tensor:
        ids, positions = self._blocks.ids[block : block + 1], self._blocks.positions[block : block + 1]
        mask = packed_mask(self._model, positions) if self._accepts_mask else None
        logits: Tensor = self._model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        return logits

    def _find_form(self, directory: Path) -> Form:
        """Returns what the layers of this model return. With anything else, the model fails or changes the shape."""
        failures = []
        for form in FORMS:
            try:
                calls = self._record(form, 0)
                if len({call.hidden.shape for call in calls}) == 1 and len(calls) == self.num_layers:
                    return form
                failures.append("the hidden states change their shape")
            except Exception as error:  # noqa: BLE001 - a wrong form raises whatever the model's code leads to
                failures.append(f"{type(error).__name__}: {error}")
        raise _not_layerwise(directory, failures[0])

    @torch.inference_mode()
    def _record(self, form: Form, block: int) -> list[_Call]:
        calls: list[_Call] = []

        def pass_on(index: int, call: _Call) -> Tensor:
            calls.append(call)
            return call.hidden

        with self._replaced(pass_on, form):
            self._forward(block)
        return calls

    @contextmanager
    def _replaced(self, compute: Callable[[int, _Call], Tensor], form: Form | None = None) -> Iterator[None]:
        """Lets layers return the hidden states that ``compute`` makes of their index and call."""
        wrap = form or self._form

        def forward_of(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden, *rest = args or (kwargs.pop("hidden_states"),)
                return wrap(compute(index, _Call(hidden, tuple(rest), kwargs)))

            return forward

        own = [layer.__dict__.get("forward") for layer in self._layers]  # accelerate sets some
        for index, layer in enumerate(self._layers):
            layer.forward = forward_of(index)
        try:
            yield
        finally:
            for layer, forward in zip(self._layers, own, strict=True):
                del layer.__dict__["forward"]
                if forward is not None:
                    layer.forward = forward


def _read(modules: Iterable[nn.Module], device: torch.device) -> bool:
    """Reads the weights of modules that accelerate would read whenever they are called, to stay until they are freed.

    Returns:
        Whether there were any.
    """
    was_read = False
    for module in [*modules]:
        hook: Any = getattr(module, "_hf_hook", None)
        if hook is None:
            continue
        for part in getattr(hook, "hooks", [hook]):
            if getattr(part, "offload", False):
                part.execution_device, part.tied_params_map, part.tied_params_names = device, None, set()
                part.pre_forward(module)
                was_read = True
        remove_hook_from_module(module)
        for name, buffer in module.named_buffers(recurse=False):  # not among the weights: tables of rotary embeddings
            module._buffers[name] = buffer.to(device)
    return was_read


def _not_layerwise(directory: Path, why: str) -> UserError:
    return UserError(
        setting="expand.position",
        value="a ranking of the layers",
        rule=f"the layers of the model in {directory} cannot be run one at a time ({why})",
        remedy="Set expand.position=interleaved, or a list of gaps.",
    )
