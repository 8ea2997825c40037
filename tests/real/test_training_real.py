"""Layers of SmolLM2 under DeepSpeed: two ranks match one rank, and runs on two threads resume bitwise."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.artifacts.task import StageTask, task_to_json
from pipeline.launch.workers import run_workers
from pipeline.training.job import TRAINING_FILE
from tests.plain_settings import cpu_launch
from tests.training.small import logged, train_settings, training_task, write_blocks

LAYERS, NEW_LAYERS = 4, (2, 3)
STEPS, LENGTH = 5, 32
LENGTH_OF_TWO_THREADS = 128


@pytest.fixture(scope="module")
def grown_dir(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real model's first four layers, the last two marked as new: real sizes, and little to load and compile."""
    directory = tmp_path_factory.mktemp("grown")
    AutoModelForCausalLM.from_pretrained(smollm2_dir, num_hidden_layers=LAYERS).save_pretrained(directory)
    AutoTokenizer.from_pretrained(smollm2_dir).save_pretrained(directory)
    layers = [{"layer": layer, "new": layer in NEW_LAYERS, "from": [layer]} for layer in range(LAYERS)]
    (directory / "expansion.json").write_text(json.dumps({"method": "copy", "layers": layers}))
    return directory


def blocks(model: Path, directory: Path, length: int) -> Path:
    """Writes blocks of real text."""
    text = AutoTokenizer.from_pretrained(model)(topics["assert"] + topics["del"] + topics["if"]).input_ids
    return write_blocks(directory, length=length, text=text)


@pytest.fixture(scope="module")
def tasks(grown_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], StageTask]:
    """Finished runs by (ranks, ZeRO stage). In bfloat16, Adam's first steps would amplify rounding errors to 1e-3."""
    data = blocks(grown_dir, tmp_path_factory.mktemp("data"), LENGTH)
    made = {}
    for ranks, zero in ((2, 2), (2, 3), (1, 2)):
        settings = train_settings(
            steps=STEPS, sequence_length=LENGTH, learning_rate=2e-4, precision="float32", deepspeed={"zero_stage": zero}
        )
        made[ranks, zero] = training_task(settings, grown_dir, data, tmp_path_factory.mktemp("out"), ranks)
    for ranks in (2, 1):
        mine = [task for task in made.values() if task.launch.processes == ranks]
        work(tmp_path_factory.mktemp("logs"), *((task, None) for task in mine))
    return made


def work(logs: Path, *tasks: tuple[StageTask, int | None]) -> None:
    """Runs tasks in one set of worker processes, each to its end or until the given step."""
    plan = [{"task": task_to_json(task), "stop_after": stop_after} for task, stop_after in tasks]
    (logs / "plan.json").write_text(json.dumps(plan))
    run_workers("tests.training.many_tasks", logs / "plan.json", tasks[0][0].launch, logs)


@pytest.mark.parametrize("zero", [2, 3])
def test_two_ranks_have_the_losses_of_one(tasks: dict[tuple[int, int], StageTask], zero: int):
    single = tasks[1, 2]
    before, after = logged(single, "held_out_loss")
    assert len(logged(single, "loss")) == STEPS and after < before
    for name in ("loss", "held_out_loss"):
        assert logged(tasks[2, zero], name) == pytest.approx(logged(single, name), rel=1e-5)


def test_frozen_tensors_are_bitwise_unchanged(tasks: dict[tuple[int, int], StageTask], grown_dir: Path):
    base = load_file(grown_dir / "model.safetensors")
    for task in tasks.values():
        trained = load_file(task.out / "model.safetensors")
        assert trained.keys() == base.keys()
        changed = {name for name in base if not torch.equal(trained[name], base[name])}
        assert changed == {name for name in base if any(f".layers.{layer}." in name for layer in NEW_LAYERS)}


@pytest.fixture(scope="module")
def resumed(grown_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, tuple[StageTask, StageTask]]:
    """By ``compile``, a run on two threads, and one that was stopped and resumed in another process."""
    data = blocks(grown_dir, tmp_path_factory.mktemp("data"), LENGTH_OF_TWO_THREADS)
    made = {}
    for compiled in (False, True):
        # Products in float32, since some processors have none in bfloat16 that end within minutes.
        precision = {"precision": "float32"} if compiled else {"precision": "bfloat16", "float32_products": True}
        settings = train_settings(
            steps=4, sequence_length=LENGTH_OF_TWO_THREADS, micro_batch=2, compile=compiled, **precision
        )
        straight, stopped = (
            replace(training_task(settings, grown_dir, data, out), launch=cpu_launch(threads=2))
            for out in (tmp_path_factory.mktemp("straight"), tmp_path_factory.mktemp("stopped"))
        )
        made[compiled] = straight, stopped
    work(
        tmp_path_factory.mktemp("first"),
        *((task, stop) for pair in made.values() for task, stop in zip(pair, (None, 2), strict=True)),
    )
    for _, stopped in made.values():
        assert not (stopped.out / TRAINING_FILE).exists() and len(logged(stopped, "loss")) == 2
    work(tmp_path_factory.mktemp("second"), *((stopped, None) for _, stopped in made.values()))
    return made


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_run_on_two_threads_resumes_to_bitwise_equal_results(
    resumed: dict[bool, tuple[StageTask, StageTask]], compiled: bool
):
    """It resumes in another process, at sizes where both threads take part in sums."""
    straight, stopped = resumed[compiled]
    for name in ("loss", "grad_norm", "held_out_loss"):
        assert logged(stopped, name) == logged(straight, name)
    ours, theirs = (load_file(task.out / "model.safetensors") for task in (stopped, straight))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
