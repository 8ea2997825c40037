"""Writing the weights of a deeper model: interruptions and scratch space."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from pipeline.config import AnyExpand
from pipeline.expansion import method, surgery
from pipeline.expansion.layer_plan import LayerPlan
from pipeline.expansion.method import LayerWeights, NewTensor, Workspace, method_of
from pipeline.expansion.surgery import TensorNames, scratch_in, write_weights
from pipeline.models.families import family_of
from pipeline.models.reading import ModelDirectory

ExpandSettings = Callable[..., AnyExpand]
CPU = torch.device("cpu")


class Interrupted(Exception):
    """Raised to interrupt a method."""


class Watched:
    """The tensors of a method, remembered as they are yielded; interrupted after ``limit`` of them."""

    def __init__(self, settings: AnyExpand, limit: int | None = None) -> None:
        self._settings, self._limit = settings, limit
        self.yielded: list[str] = []
        self.work = Workspace()

    def __call__(self, layers: list[LayerWeights], plan: LayerPlan, work: Workspace) -> Iterator[NewTensor]:
        self.work = work
        for new in method_of(self._settings).new_tensors(layers, plan, work):
            if len(self.yielded) == self._limit:
                raise Interrupted
            self.yielded.append(f"{new.layer} {new.tensor.name}")
            yield new


def _names(base: Path, settings: AnyExpand) -> TensorNames:
    model = ModelDirectory(base)
    return TensorNames(model, family_of("llama"), method_of(settings).place(model.config["num_hidden_layers"]))


@pytest.mark.parametrize("method", ["lesa", "opt_deus", "average", "llama_pro"])
def test_an_interrupted_expansion_resumes_without_repeating_finished_work(
    expand_settings: ExpandSettings,
    tiny_llama_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
) -> None:
    small = {"epochs": 1, "hidden_size": 16} if method == "lesa" else {}
    settings = expand_settings(method, new_layers=2, position=[1, 1], **small)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    whole.mkdir(), resumed.mkdir()
    uninterrupted = Watched(settings)
    write_weights(_names(tiny_llama_dir, settings), uninterrupted, CPU, whole, seed=0)

    monkeypatch.setattr(surgery, "WEIGHTS_SAVE_SECONDS", -1.0)
    with pytest.raises(Interrupted):
        write_weights(_names(tiny_llama_dir, settings), Watched(settings, limit=12), CPU, resumed, seed=0)
    second = Watched(settings)
    work = write_weights(_names(tiny_llama_dir, settings), second, CPU, resumed, seed=0)
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert work.records == uninterrupted.work.records
    # LESA saves a role when it is complete. Otherwise the twelfth tensor was being yielded.
    assert len(second.work.made) == {"lesa": 12}.get(method, 11)
    assert _weights_in(resumed) == {"model.safetensors"}
    if method == "lesa":  # its units of work are roles, the largest first
        finished = ("gate_proj", "up_proj", "down_proj")
        assert not any(name in yielded for name in finished for yielded in second.yielded)
    if method == "opt_deus":  # its units of work are layers, and here the second is made from the first
        assert work.records.keys() == second.work.records.keys()


@pytest.mark.parametrize("content", [b"", bytes(64), b'{"records": 3}'])
@pytest.mark.parametrize("limit", [3, None])
def test_expansion_restarts_if_the_records_of_an_earlier_attempt_are_unreadable(
    expand_settings: ExpandSettings,
    tiny_llama_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    limit: int | None,
    content: bytes,
) -> None:
    settings = expand_settings("average", new_layers=1)
    monkeypatch.setattr(surgery, "WEIGHTS_SAVE_SECONDS", -1.0)
    with nullcontext() if limit is None else pytest.raises(Interrupted):
        write_weights(_names(tiny_llama_dir, settings), Watched(settings, limit=limit), CPU, tmp_path, seed=0)
    (tmp_path / surgery.RECORDS).write_bytes(content)
    second = Watched(settings)
    write_weights(_names(tiny_llama_dir, settings), second, CPU, tmp_path, seed=0)
    assert not second.work.made and second.yielded
    assert _weights_in(tmp_path) == {"model.safetensors"}


def _weights_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()} - {surgery.RECORDS, surgery.WEIGHTS_SEAL}


def test_a_finished_layer_that_no_other_is_made_from_is_not_repeated(
    expand_settings: ExpandSettings, tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = expand_settings("opt_deus", new_layers=2, position=[0, 2])
    monkeypatch.setattr(surgery, "WEIGHTS_SAVE_SECONDS", -1.0)
    with pytest.raises(Interrupted):
        write_weights(_names(tiny_llama_dir, settings), Watched(settings, limit=12), CPU, tmp_path, seed=0)
    second = Watched(settings)
    write_weights(_names(tiny_llama_dir, settings), second, CPU, tmp_path, seed=0)
    assert {yielded.split()[0] for yielded in second.yielded} == {"4"}  # layer 1 was complete


def test_an_attempt_that_was_interrupted_after_the_last_tensor_is_not_repeated(
    expand_settings: ExpandSettings, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    settings = expand_settings("lesa", new_layers=2, epochs=1, hidden_size=16)
    names = _names(tiny_llama_dir, settings)
    first = write_weights(names, Watched(settings), CPU, tmp_path, seed=0)
    written = (tmp_path / "model.safetensors").stat().st_mtime_ns
    second = Watched(settings)
    again = write_weights(names, second, CPU, tmp_path, seed=0)
    assert second.yielded == [] and (tmp_path / "model.safetensors").stat().st_mtime_ns == written
    assert (again.records, again.warnings) == (first.records, first.warnings)

    surgery.remove_progress_records(tmp_path)  # as the stage does once they are verified or known to be wrong
    write_weights(names, second, CPU, tmp_path, seed=0)
    assert second.yielded


def test_damaged_weights_of_a_finished_attempt_are_written_again(
    expand_settings: ExpandSettings, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    settings = expand_settings("lesa", new_layers=2, epochs=1, hidden_size=16)
    write_weights(_names(tiny_llama_dir, settings), Watched(settings), CPU, tmp_path, seed=0)
    file = tmp_path / "model.safetensors"
    intact = file.read_bytes()
    file.write_bytes(intact[:-3] + bytes([intact[-3] ^ 1]) + intact[-2:])
    write_weights(_names(tiny_llama_dir, settings), Watched(settings), CPU, tmp_path, seed=0)
    assert file.read_bytes() == intact


def test_large_scratch_tensors_are_in_an_unnamed_file(
    expand_settings: ExpandSettings, tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = expand_settings("lesa", new_layers=2, epochs=1, hidden_size=16)
    in_memory, on_disk = tmp_path / "memory", tmp_path / "disk"
    in_memory.mkdir(), on_disk.mkdir()
    write_weights(_names(tiny_llama_dir, settings), Watched(settings), CPU, in_memory, seed=0)

    monkeypatch.setattr(method, "SCRATCH_ON_DISK_BYTES", 0)
    mapped: list[int] = []
    from_file = torch.from_file

    def remember(path: str, shared: bool, size: int) -> torch.Tensor:
        mapped.append(size)
        return from_file(path, shared=shared, size=size)

    monkeypatch.setattr(torch, "from_file", remember)
    write_weights(_names(tiny_llama_dir, settings), Watched(settings), CPU, on_disk, seed=0)
    assert len(mapped) == 7
    assert _weights_in(on_disk) == {"model.safetensors"}
    first, second = (load_file(directory / "model.safetensors") for directory in (in_memory, on_disk))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_scratch_tensors_for_a_gpu_are_in_its_memory_up_to_half_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Larger ones are tensors of the CPU, whose file has no name."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=800))
    allocated: list[torch.device] = []
    monkeypatch.setattr(surgery, "in_memory", lambda shape, device: allocated.append(device))
    gpu = torch.device("cuda", 0)
    scratch_in(tmp_path)((10, 10), gpu)
    assert allocated == [gpu]
    on_disk = scratch_in(tmp_path)((10, 11), gpu)
    assert (on_disk.device, on_disk.shape, on_disk.dtype) == (CPU, (10, 11), torch.float32)
    assert allocated == [gpu] and not list(tmp_path.iterdir())
