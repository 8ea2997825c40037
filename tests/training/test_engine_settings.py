"""Every setting of the engine reaches DeepSpeed or the model, and training with it gives the same losses.

One launch of one rank runs all variants of a short training (see ``many_tasks``).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from pipeline.artifacts.task import StageTask, task_to_json
from pipeline.launch.workers import run_workers
from tests.training.small import logged, train_settings

pytestmark = pytest.mark.xdist_group("distributed")

STEPS = 4
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "mask": {"attention": "sdpa"},
    "eager": {"attention": "eager"},
    "small_buckets": {"deepspeed": {"reduce_bucket_size": 5000, "allgather_bucket_size": 5000}},
    "offloaded": {"deepspeed": {"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True}},
    "recomputed": {"activation_checkpointing": True, "micro_batch": 2},
    "overridden": {"deepspeed": {"overrides": {"zero_optimization": {"overlap_comm": True}, "steps_per_print": 1}}},
    # Compiling takes long, so there is one variant, without C++ (tests/real compiles that), and without the held-out
    # loss, which would be compiled separately.
    "compiled_and_recomputed": {"compile": True, "activation_checkpointing": True, "evaluate_at": []},
}
BFLOAT16: dict[str, dict[str, Any]] = {
    "native": {"precision": "bfloat16"},
    "float32_products": {"precision": "bfloat16", "float32_products": True},
}


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory, make_task: Callable[..., StageTask]) -> dict[str, list[float]]:
    tasks = {
        name: make_task(train_settings(steps=STEPS, warmup_fraction=0.0, **changes), 1)
        for name, changes in (VARIANTS | BFLOAT16).items()
    }
    directory = tmp_path_factory.mktemp("launch")
    plan = [{"task": task_to_json(task), "stop_after": None, "backend": "aot_eager"} for task in tasks.values()]
    (directory / "plan.json").write_text(json.dumps(plan))
    run_workers("tests.training.many_tasks", directory / "plan.json", tasks["default"].launch, directory)
    return {name: logged(task, "loss") for name, task in tasks.items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_equal_those_of_the_default(losses: dict[str, list[float]], variant: str):
    assert len(losses[variant]) == STEPS
    assert losses[variant] == pytest.approx(losses["default"], abs=2e-6)


def test_losses_with_float32_products_equal_the_native_ones_up_to_rounding(losses: dict[str, list[float]]):
    assert losses["float32_products"] == pytest.approx(losses["native"], rel=1e-3)
    assert losses["float32_products"] != losses["native"]  # otherwise the setting had no effect
