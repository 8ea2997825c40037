import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipeline.artifacts.task import StageTask
from pipeline.errors import OutOfMemory, TrainingFailure, WorkersFailed
from pipeline.estimates import fitting
from pipeline.estimates.fitting import suggest_settings_that_fit
from pipeline.launch.machine import Placement, device_memory
from pipeline.training.trainer import report_out_of_memory
from pipeline.training.validate import less_memory
from tests.training.small import train_settings


def test_the_error_of_the_cpu_allocator_is_recognized():
    with pytest.raises(TrainingFailure, match="^out of memory: "), report_out_of_memory():
        torch.empty(2**55)  # raises the real error of this system's allocator


@pytest.mark.parametrize(
    "available, expected",
    [(2**20, "What fits: "), (2**40, "To save memory, add any of "), (None, "To save memory, add any of ")],
)
def test_the_stage_adds_settings_that_fit(
    available: int | None, expected: str, make_task: Callable[..., StageTask], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(fitting, "device_memory", lambda placement: available)
    task = make_task(train_settings(micro_batch=2))
    message = f"^rank 0 of 1: out of memory\n.*{expected}"
    with pytest.raises(WorkersFailed, match=message), suggest_settings_that_fit(task):
        raise OutOfMemory("rank 0 of 1: out of memory")


def test_a_process_gets_an_equal_share_of_the_nodes_memory():
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert device_memory(Placement("cpu", 2, 1)) == pytest.approx(there / 2, rel=0.02)


@pytest.mark.parametrize(
    "said, memory",
    [("81559\n40960\n", 40960 * 2**20), ("[N/A]\n", None), ("NVIDIA-SMI has failed.\n", None), (None, None)],
)
def test_the_smallest_gpu_decides_if_its_memory_can_be_told(
    said: str | None, memory: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PATH", str(tmp_path))
    if said is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '{said}'\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    assert device_memory(Placement("cuda", 2, 1)) == memory


def test_the_error_of_a_gpu_is_recognized():
    message = "CUDA out of memory. Tried to allocate 2.00 GiB"
    with pytest.raises(TrainingFailure, match=message), report_out_of_memory():
        raise torch.OutOfMemoryError(f"{message}\nGPU 0 has ...")


@pytest.mark.parametrize("kind", [RuntimeError, RecursionError, torch.distributed.DistBackendError])
def test_other_errors_are_not_changed(kind: type[RuntimeError]):
    with pytest.raises(kind, match="a defect"), report_out_of_memory():
        raise kind("a defect")


@pytest.mark.parametrize(
    "changes, processes, named",
    [
        ({"micro_batch": 1, "activation_checkpointing": True}, 1, ["deepspeed.offload_optimizer=true"]),
        ({"micro_batch": 4, "deepspeed": {"zero_stage": 0}}, 1, ["micro_batch=2", "activation_checkpointing=true"]),
        ({"micro_batch": 1, "activation_checkpointing": True, "deepspeed": {"zero_stage": 3}}, 2,
         ["deepspeed.offload_optimizer=true", "deepspeed.offload_parameters=true"]),
        ({"micro_batch": 1, "optimizer": "muon"}, 2, ["activation_checkpointing=true"]),
    ],
)  # fmt: skip
def test_only_settings_that_are_not_used_yet_are_suggested(changes: dict, processes: int, named: list[str]):
    sentence = less_memory("pretrain", train_settings(**changes), processes)
    assert [part.strip(" ;,.") for part in sentence.split() if "=" in part] == [f"pretrain.{name}" for name in named]


def test_a_shorter_sequence_is_suggested_if_all_other_settings_are_in_use():
    everything = {"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True}
    train = train_settings(micro_batch=1, activation_checkpointing=True, deepspeed=everything)
    assert "shorter pretrain.sequence_length" in less_memory("pretrain", train, 2)
