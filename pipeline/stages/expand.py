"""expand: plan the new layers, stream old and new tensors into a deeper model directory, check what was written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from pipeline.architecture import Architecture, LayerTensor, architecture_of
from pipeline.artifact import write_json
from pipeline.config import AnyExpand
from pipeline.expansion.layer_plan import LayerPlan, make_plan
from pipeline.expansion.layers import Journal, Layer, NewTensor
from pipeline.expansion.methods import METHODS, expand_function
from pipeline.layer_config import rebuild_config, spelled_out_config
from pipeline.model_check import check_model
from pipeline.model_dir import EXPANSION_FILE, ModelDirectory, ShardWriter, copy_side_files
from pipeline.progress import progress
from pipeline.stage import Metrics, StageTask


class StoredLayer(Mapping[LayerTensor, Tensor]):
    """One layer of the base; tensors are read when they are asked for, parts of fused ones as themselves."""

    def __init__(self, base: ModelDirectory, names: Mapping[LayerTensor, str]) -> None:
        self._base, self._names = base, names

    def __getitem__(self, tensor: LayerTensor) -> Tensor:
        stored = self._base.read(self._names[tensor])
        part: Tensor = stored if tensor.place is None else tensor.place.read(stored)
        return part

    def __iter__(self) -> Iterator[LayerTensor]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def run(task: StageTask) -> Metrics:
    """Writes the deeper model and its ``expansion.json`` into ``task.out``.

    Raises:
        UserError: the method cannot expand this base.
        CheckFailedError: what was written is not what was meant.
    """
    # Adam's moments of silent units decay into numbers so small that processors take many times as long over them.
    torch.set_flush_denormal(True)
    settings: AnyExpand = task.settings  # type: ignore[assignment]  # the stage's settings are one of these
    base = ModelDirectory(task.parents["load"])
    config = spelled_out_config(base.path)
    architecture = architecture_of(config["model_type"])
    plan = make_plan(settings, config["num_hidden_layers"])

    journal = write_weights(base, architecture, plan, settings, task.seed, task.out)
    deeper = rebuild_config(config, plan.config_sources)
    write_json(task.out / "config.json", deeper)
    copy_side_files(base.path, task.out)
    write_json(task.out / EXPANSION_FILE, describe(settings, plan))

    keeps_logits = METHODS[settings.method].keeps_logits(settings)
    outcome = check_model(task.out, deeper, base.path if keeps_logits else None)
    return {
        "num_base_layers": plan.num_base_layers,
        "num_layers": len(plan.layers),
        "new_layers": [layer.layer for layer in plan.layers if layer.new],
        "check": outcome.to_json(),
        "warnings": journal.warnings,
        "method": journal.records,
    }


def describe(settings: AnyExpand, plan: LayerPlan) -> dict[str, object]:
    """The content of ``expansion.json``: which layers are new, and what each comes from."""
    return {
        "method": settings.method,
        "settings": settings.model_dump(mode="json"),
        "source": METHODS[settings.method].source,
        "num_base_layers": plan.num_base_layers,
        "num_layers": len(plan.layers),
        "layers": plan.to_json(),
    }


def write_weights(
    base: ModelDirectory, architecture: Architecture, plan: LayerPlan, settings: AnyExpand, seed: int, out: Path
) -> Journal:
    """Streams every tensor of the deeper model to disk: the base's as they are, new ones rounded to its dtypes."""
    tensors = architecture.layer_tensors(base.specs, base.config)
    layers: list[Layer] = [
        StoredLayer(base, {tensor: architecture.tensor_name(layer, tensor.stored) for tensor in tensors})
        for layer in range(plan.num_base_layers)
    ]
    sources = _tensor_sources(base, architecture, plan, tensors)
    specs = {name: base.specs[source] for name, source in sources.items()}
    kept = {name: source for name, source in sources.items() if not _is_new(name, architecture, plan)}
    total = len(kept) + len(tensors) * len(plan.new_layers)
    with ShardWriter(out, specs) as writer, progress("expand", total=total) as bar:
        for name, source in kept.items():
            writer.write(name, base.read(source))
            bar.advance(1, note=name)
        journal = Journal(note=lambda note, **numbers: bar.advance(0, note=note, **numbers))
        for new in expand_function(settings.method)(layers, plan, settings, seed, journal):
            name = architecture.tensor_name(new.layer, new.tensor.stored)
            _write_new(writer, name, new, specs[name].dtype)
            bar.advance(1, note=architecture.tensor_name(new.layer, new.tensor.name))
    return journal


def _write_new(writer: ShardWriter, name: str, new: NewTensor, dtype: torch.dtype) -> None:
    """Rounds a new tensor to the dtype of what it came from; a part goes to its place in the stored tensor."""
    if new.tensor.place is None:
        writer.write(name, new.value.to(dtype))
    else:
        new.tensor.place.write(writer.mapped(name), new.value)


def _tensor_sources(
    base: ModelDirectory, architecture: Architecture, plan: LayerPlan, tensors: list[LayerTensor]
) -> dict[str, str]:
    """For every tensor of the deeper model, in order, the base's tensor that has its dtype and shape."""
    outside = {name: name for name in base.specs if architecture.layer_of(name) is None}
    inside = {
        architecture.tensor_name(planned.layer, name): architecture.tensor_name(planned.base[0], name)
        for planned in plan.layers
        for name in dict.fromkeys(tensor.stored for tensor in tensors)
    }
    return {**outside, **inside}


def _is_new(name: str, architecture: Architecture, plan: LayerPlan) -> bool:
    layer = architecture.layer_of(name)
    return layer is not None and plan.layers[layer].new
