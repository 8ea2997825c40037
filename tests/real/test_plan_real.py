"""Estimates of the plan for the real model, compared with torch's FLOP counter and the memory of workers."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from pipeline.artifacts.task import StageTask, task_to_json
from pipeline.config import Launch, Train
from pipeline.estimates import Setup, Trained, memory_of, trained_part
from pipeline.files import read_json, write_json
from pipeline.launch.workers import detect_machine, run_workers
from pipeline.models.families import shape_of
from pipeline.training.batches import TokenIndices
from pipeline.training.freeze import freeze_others
from pipeline.training.loss import SummedLoss
from tests.training.small import train_settings, training_task, write_blocks

NEW_LAYERS = (22, 24, 26, 28)
EXPANSION = {
    "method": "copy",
    "layers": [{"layer": layer, "new": layer in NEW_LAYERS, "from": [layer]} for layer in range(30)],
}


@pytest.fixture(scope="module")
def grown_dir(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real model in bfloat16, with an ``expansion.json``.

    In another dtype than that of compute, so that weights are in memory and not in files mapped into it.
    """
    directory = tmp_path_factory.mktemp("grown")
    for path in smollm2_dir.iterdir():
        if path.suffix != ".safetensors":
            os.link(path, directory / path.name)
    weights = {name: tensor.bfloat16() for name, tensor in load_file(smollm2_dir / "model.safetensors").items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    write_json(directory / "expansion.json", EXPANSION)
    return directory


def _planned(directory: Path, trainable: str) -> Trained:
    return trained_part("pretrain", trainable, shape_of(read_json(directory / "config.json")), EXPANSION)


@pytest.mark.parametrize("trainable", ["auto", "all"])
def test_estimated_flops_are_within_five_percent_of_the_counter_of_torch(smollm2_dir: Path, trainable: str) -> None:
    length, planned = 64, _planned(smollm2_dir, trainable)
    model = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32, attn_implementation="eager")
    freeze_others(model, set(planned.names))
    ids, positions = torch.randint(0, 49152, (1, length)), torch.arange(length)[None]
    with FlopCounterMode(display=False) as counter:
        SummedLoss(model)(ids, positions, TokenIndices.of(ids, positions, positions > 0)).backward()
    assert planned.flops(length).of_tokens(length, length - 1) == pytest.approx(counter.get_total_flops(), rel=0.05)


def _task(settings: Train, model: Path, place: Path, launch: dict[str, Any]) -> StageTask:
    data = write_blocks(place / "data", length=settings.sequence_length, blocks=8, held_out=2)
    (place / "out").mkdir()
    task = training_task(settings, model, data, place / "out")
    return replace(task, launch=Launch.model_validate({**task.launch.model_dump(), **launch}))


@pytest.mark.parametrize("changes", [{}, {"activation_checkpointing": True}], ids=["stored", "recomputed"])
def test_estimated_memory_is_within_a_fourth_of_the_growth_of_a_worker(
    grown_dir: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    settings = train_settings(steps=1, sequence_length=256, micro_batch=4, evaluate_at=[], **changes)
    task = _task(settings, grown_dir, tmp_path, {"threads": detect_machine().cores})
    (tmp_path / "task.json").write_text(json.dumps(task_to_json(task)))
    outcome = run_workers("tests.training.measured_task", tmp_path / "task.json", task.launch, tmp_path / "logs")
    planned = memory_of(_planned(grown_dir, settings.trainable), Setup(settings, "float32", ranks=1, on_gpu=False))
    assert planned.total == pytest.approx(outcome["growth"], rel=0.25)


@pytest.mark.skipif(detect_machine().gpus == 0, reason="no GPU to compare with")
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "recomputed"])
def test_estimated_memory_is_within_fifteen_percent_of_the_peak_of_the_gpu_allocator(
    grown_dir: Path, tmp_path: Path, stage: int, checkpointing: bool
) -> None:
    settings = train_settings(
        steps=2, sequence_length=1024, global_batch=8, micro_batch=8, precision="bfloat16", evaluate_at=[],
        activation_checkpointing=checkpointing, deepspeed={"zero_stage": stage},
    )  # fmt: skip
    task = _task(settings, grown_dir, tmp_path, {"device": "cuda"})
    (tmp_path / "task.json").write_text(json.dumps(task_to_json(task)))
    run_workers("pipeline.training.worker", tmp_path / "task.json", task.launch, tmp_path / "out" / "logs")
    planned = memory_of(_planned(grown_dir, settings.trainable), Setup(settings, "bfloat16", ranks=1, on_gpu=True))
    measured = read_json(tmp_path / "out" / "training.json")["peak_gpu_memory_bytes"]
    assert planned.total == pytest.approx(measured, rel=0.15)
