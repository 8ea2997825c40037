"""A second copy of the parameters (hpZ) changes no number, also after resuming from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.artifacts.task import StageTask, task_to_json
from tests.training.forked import ForkedRanks
from tests.training.small import logged, train_settings

pytestmark = pytest.mark.xdist_group("distributed")


def test_it_changes_neither_losses_nor_weights(
    make_task: Callable[..., StageTask], forked_ranks: ForkedRanks, tmp_path: Path
) -> None:
    plain, straight, resumed = (
        make_task(
            train_settings(
                steps=3,
                deepspeed={
                    "zero_stage": 3, "hpz_partition_size": size,
                    "overrides": {"zero_optimization": {"stage3_param_persistence_threshold": 0}},
                },
            ),
            2,
        )
        for size in (1, 2, 2)
    )  # fmt: skip
    # DeepSpeed creates the groups of ranks once per process, so that each launch has one task with a second copy.
    for number, launch in enumerate(([(plain, None), (straight, None)], [(resumed, 2)], [(resumed, None)])):
        plan = [{"task": task_to_json(task), "stop_after": stop} for task, stop in launch]
        forked_ranks.run_plan(2, plan, tmp_path / str(number))
    expected = load_file(plain.out / "model.safetensors")
    for task in (straight, resumed):
        assert logged(task, "loss") == pytest.approx(logged(plain, "loss"), rel=1e-6)
        assert logged(task, "held_out_loss") == pytest.approx(logged(plain, "held_out_loss"), rel=1e-6)
        found = load_file(task.out / "model.safetensors")
        assert all(torch.allclose(found[name], weight, rtol=0, atol=1e-6) for name, weight in expected.items())
