"""Streams the tensors of the base and of a method's new layers into the weight files of a deeper model.

Memory is what the method itself needs: the base's tensors are copied from file to file, and a new tensor is written as
soon as the method yields it. An interrupted expansion resumes with the tensors that are missing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.expansion.layer_plan import LayerPlan
from pipeline.expansion.method import LayerWeights, NewTensor, Scratch, Workspace, in_memory, is_on_disk
from pipeline.files import disk_errors_as_user_errors, is_intact, read_record, seal, write_json
from pipeline.models.families import Family, LayerTensor
from pipeline.models.layer_config import complete_config
from pipeline.models.reading import ModelDirectory
from pipeline.models.tensors import TensorSpec
from pipeline.models.writing import PROGRESS_FILE, ShardWriter, remove_weights
from pipeline.progress import progress

WEIGHTS_SAVE_SECONDS = 10.0  # how much an interruption can cost, besides the current unit of work
RECORDS = ".expansion.records.json"  # about the saved tensors; exists while they can be resumed
WEIGHTS_SEAL = ".expansion.sha256"  # of the finished weights, likewise

MakeTensors = Callable[[list[LayerWeights], LayerPlan, Workspace], Iterator[NewTensor]]


class StoredLayer(Mapping[LayerTensor, Tensor]):
    """One layer of the base. Tensors are read on access, and parts of fused ones are separate tensors."""

    def __init__(self, base: ModelDirectory, names: Mapping[LayerTensor, str], device: torch.device) -> None:
        self._base, self._names, self._device = base, names, device

    def __getitem__(self, tensor: LayerTensor) -> Tensor:
        stored = self._base.read(self._names[tensor])
        part: Tensor = stored if tensor.place is None else tensor.place.read(stored)
        return part.to(self._device)

    def __iter__(self) -> Iterator[LayerTensor]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True)
class TensorNames:
    """The names of a deeper model's tensors, and which tensor of the base each comes from."""

    base: ModelDirectory
    family: Family
    plan: LayerPlan

    @cached_property
    def tensors(self) -> list[list[LayerTensor]]:
        """The tensors of every layer of the base."""
        return self.family.tensors_by_layer(self.base.specs, self.base.config)

    @cached_property
    def sources(self) -> dict[str, str]:
        """For every stored tensor of the deeper model, in order, the base's tensor with the same dtype and shape."""
        outside = {name: name for name in self.base.specs if self.family.layer_of(name) is None}
        name_of = self.family.tensor_name
        inside = {
            name_of(planned.layer, name): name_of(planned.base[0], name)
            for planned in self.plan.layers
            for name in dict.fromkeys(tensor.stored for tensor in self.tensors[planned.base[0]])
        }
        return {**outside, **inside}

    @cached_property
    def new(self) -> dict[tuple[int, LayerTensor], str]:
        """The name of every tensor of a new layer. For a part of a stored tensor it is the name of the part."""
        return {
            (planned.layer, tensor): self.family.tensor_name(planned.layer, tensor.name)
            for planned in self.plan.new_layers
            for tensor in self.tensors[planned.base[0]]
        }

    @property
    def parts(self) -> dict[str, list[str]]:
        """The names of the parts of each stored tensor of a new layer that consists of parts."""
        parts: dict[str, list[str]] = {}
        for (layer, tensor), name in self.new.items():
            if tensor.place is not None:
                parts.setdefault(self.stored(layer, tensor), []).append(name)
        return parts

    @property
    def copied(self) -> dict[str, str]:
        """The tensors that are copied from the base, and their names there."""
        layer_of, layers = self.family.layer_of, self.plan.layers
        return {
            name: source
            for name, source in self.sources.items()
            if (layer := layer_of(name)) is None or not layers[layer].new
        }

    def stored(self, layer: int, tensor: LayerTensor) -> str:
        """Returns the name of the stored tensor that contains this one."""
        return self.family.tensor_name(layer, tensor.stored)

    def spec(self, layer: int, tensor: LayerTensor) -> TensorSpec:
        """Returns dtype and shape of the stored tensor that contains this one."""
        return self.base.specs[self.sources[self.stored(layer, tensor)]]

    def base_layers(self, device: torch.device) -> list[LayerWeights]:
        """Returns the base's layers as a method reads them."""
        return [
            StoredLayer(self.base, {tensor: self.stored(layer, tensor) for tensor in self.tensors[layer]}, device)
            for layer in range(self.plan.num_base_layers)
        ]


def write_weights(
    names: TensorNames, new_tensors: MakeTensors, device: torch.device, out: Path, seed: int | None = None
) -> Workspace:
    """Writes every tensor of the deeper model into ``out``: the base's unchanged, new ones in the dtypes of the base.

    Resumes what an interrupted attempt has saved there. If that attempt had finished, nothing is written.

    Args:
        new_tensors: the bound function of that name of a method.
        device: where the method's tensors are.
        seed: the run's seed for a method that draws random numbers, else None.

    Returns:
        The method's workspace, with its records and warnings.

    Raises:
        UserError: the disk is full.
    """
    specs = {name: names.base.specs[source] for name, source in names.sources.items()}
    saved = read_record(out / RECORDS, _are_records)
    if saved is None:
        remove_weights(out)  # without its records, a saved tensor could not be described in the manifest
    elif _is_finished(out, specs):
        return Workspace(**saved)
    with ShardWriter(out, specs, names.parts) as writer:
        _copy_base(writer, names)
        made = {key for key, name in names.new.items() if name in writer.written}
        records = saved["records"] if saved is not None and made else {}
        if not made:
            remove_progress_records(out)
        with progress("expand", total=sum(_millions(names, *key) for key in names.new)) as bar:
            bar.move_to(sum(_millions(names, *key) for key in made))
            saver = _Saver(writer, out, has_saved=bool(made))
            work = Workspace(
                note=lambda note, **numbers: bar.advance(0, note=note, **numbers),
                made=made,
                save=lambda: saver.save(work),
                scratch=scratch_in(out),
                config=complete_config(names.base.path),
                records=records,
                declared_seed=seed,
            )
            for new in new_tensors(names.base_layers(device), names.plan, work):
                saver.save_if_due(work)
                # A method may yield again what an earlier attempt has written.
                if (new.layer, new.tensor) not in made:
                    _write_new(writer, names, new)
                    bar.advance(_millions(names, *new[:2]), note=names.new[new.layer, new.tensor])
            # An expansion that took only seconds is not worth waiting for the disk.
            if saver.has_saved:
                saver.save(work)
    if saver.has_saved:
        seal(out / WEIGHTS_SEAL, out.glob("model*.safetensors*"))
    return work


def remove_progress_records(out: Path) -> None:
    """Removes the records by which the weights in ``out`` can be resumed: they are verified, or known to be wrong."""
    for name in (RECORDS, WEIGHTS_SEAL):
        (out / name).unlink(missing_ok=True)


class _Saver:
    """Makes what has been written so far, and the records about it, survive an interruption."""

    def __init__(self, writer: ShardWriter, out: Path, has_saved: bool) -> None:
        self._writer, self._out = writer, out
        self._last = time.monotonic()
        self.has_saved = has_saved

    def save(self, work: Workspace) -> None:
        # The records come first: tensors without records could not be described in the manifest.
        write_json(self._out / RECORDS, {"records": work.records, "warnings": work.warnings})
        self._writer.flush()
        self._last, self.has_saved = time.monotonic(), True

    def save_if_due(self, work: Workspace) -> None:
        if time.monotonic() - self._last > WEIGHTS_SAVE_SECONDS:
            self.save(work)


def _are_records(value: Any) -> bool:
    return value.keys() == {"records", "warnings"} and hasattr(value["records"], "items")


def _is_finished(out: Path, specs: Mapping[str, TensorSpec]) -> bool:
    """Returns whether an earlier attempt that left records had saved all weights before it was interrupted."""
    if (out / PROGRESS_FILE).exists() or not is_intact(out / WEIGHTS_SEAL):
        return False
    try:
        return ModelDirectory(out, out.glob("model*.safetensors")).specs == specs
    except UserError:  # a truncated file
        return False


def _millions(names: TensorNames, layer: int, tensor: LayerTensor) -> float:
    """Returns millions of elements of a new tensor, for progress. A part counts as the tensor it is stored in."""
    return names.spec(layer, tensor).numel / 1e6


def _copy_base(writer: ShardWriter, names: TensorNames) -> None:
    copied = names.copied
    with progress("copy", total=len(copied)) as bar:
        for name, source in copied.items():
            if name not in writer.written:
                writer.copy(name, names.base.place(source))
            bar.advance(1, note=name)


def _write_new(writer: ShardWriter, names: TensorNames, new: NewTensor) -> None:
    """Writes a new tensor in the dtype of its source. A part is written to its place in the stored tensor."""
    stored = names.stored(new.layer, new.tensor)
    if new.tensor.place is None:
        writer.write(stored, new.value.to("cpu", names.spec(new.layer, new.tensor).dtype))
    else:
        name = names.new[new.layer, new.tensor]
        new.tensor.place.write(writer.part(stored, name), new.value.to("cpu"))


def scratch_in(directory: Path) -> Scratch:
    """Returns an allocator that maps large tensors from unnamed files in ``directory``, as tensors of the CPU.

    Pages of such a file stay in the host's memory as long as there is space for them.
    """

    def allocate(shape: tuple[int, ...], device: torch.device) -> Tensor:
        size = torch.Size(shape).numel() * torch.float32.itemsize  # bytes
        gpu_memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
        if not is_on_disk(size, gpu_memory):
            return in_memory(shape, device)
        path = directory / ".scratch"
        try:
            # Allocate the blocks now: writing to a mapped file on a full disk would kill the process with SIGBUS.
            with disk_errors_as_user_errors(directory, size), open(path, "wb") as file:
                os.posix_fallocate(file.fileno(), 0, size)
            return torch.from_file(str(path), shared=True, size=size // torch.float32.itemsize).view(shape)
        finally:
            path.unlink()  # the mapping outlives the name, and the kernel frees the space even after a kill

    return allocate
