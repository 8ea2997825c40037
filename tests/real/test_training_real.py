"""SmolLM2 under DeepSpeed: two ranks at ZeRO 2 and 3 train as one rank does."""

from __future__ import annotations

import json
import os
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from pipeline.launch import run_workers
from pipeline.stage import StageTask, task_to_json
from tests.training.small import logged, train_settings, training_task, write_blocks

NEW_LAYERS = (24, 28)
STEPS, LENGTH = 5, 32


@pytest.fixture(scope="module")
def grown_dir(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real model, with an ``expansion.json`` that calls two of its layers new."""
    directory = tmp_path_factory.mktemp("grown")
    for path in smollm2_dir.iterdir():
        os.link(path, directory / path.name)
    layers = [{"layer": layer, "new": layer in NEW_LAYERS, "from": [layer]} for layer in range(30)]
    (directory / "expansion.json").write_text(json.dumps({"method": "copy", "layers": layers}))
    return directory


@pytest.fixture(scope="module")
def tasks(grown_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], StageTask]:
    """Finished runs by (ranks, ZeRO stage), in float32: in bfloat16 Adam's first steps blow roundings up to 1e-3."""
    text = AutoTokenizer.from_pretrained(grown_dir)(topics["assert"] + topics["del"] + topics["if"]).input_ids
    data = write_blocks(tmp_path_factory.mktemp("data"), length=LENGTH, text=text)
    made = {}
    for ranks, zero in ((2, 2), (2, 3), (1, 2)):
        settings = train_settings(
            steps=STEPS, sequence_length=LENGTH, learning_rate=2e-4, precision="float32", deepspeed={"zero_stage": zero}
        )
        made[ranks, zero] = training_task(settings, grown_dir, data, tmp_path_factory.mktemp("out"), ranks)
    for ranks in (2, 1):
        mine = [task for task in made.values() if task.launch.processes == ranks]
        logs = tmp_path_factory.mktemp("logs")
        (logs / "plan.json").write_text(json.dumps([{"task": task_to_json(t), "stop_after": None} for t in mine]))
        run_workers("tests.training.many_tasks", logs / "plan.json", mine[0].launch, logs)
    return made


@pytest.mark.parametrize("zero", [2, 3])
def test_two_ranks_get_the_losses_of_one(tasks: dict[tuple[int, int], StageTask], zero: int):
    alone = tasks[1, 2]
    before, after = logged(alone, "held_out_loss")
    assert len(logged(alone, "loss")) == STEPS and after < before
    for name in ("loss", "held_out_loss"):
        assert logged(tasks[2, zero], name) == pytest.approx(logged(alone, name), rel=1e-5)


def test_not_one_other_tensor_changes_by_a_bit(tasks: dict[tuple[int, int], StageTask], grown_dir: Path):
    base = load_file(grown_dir / "model.safetensors")
    for task in tasks.values():
        trained = load_file(task.out / "model.safetensors")
        assert trained.keys() == base.keys()
        changed = {name for name in base if not torch.equal(trained[name], base[name])}
        assert changed == {name for name in base if any(f".layers.{layer}." in name for layer in NEW_LAYERS)}
