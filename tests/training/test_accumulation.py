"""Gradients are accumulated in float32 over any number of micro-batches, at every ZeRO stage, also in bfloat16.

The mean gradient of many copies of a block equals the gradient of that block. The number of copies is a power of two,
so dividing by it is exact, while a sum in bfloat16 would be rounded at every addition.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest

from pipeline.artifacts.task import StageTask, task_to_json
from tests.training.forked import ForkedRanks
from tests.training.small import logged, train_settings, write_blocks

pytestmark = pytest.mark.xdist_group("distributed")

RANKS, ONCE, OFTEN = 2, 2, 16  # blocks per step: 1 or 8 per rank
IN_BFLOAT16 = {"data_types": {"grad_accum_dtype": "bf16"}}


@pytest.fixture(scope="module")
def norm(
    tmp_path_factory: pytest.TempPathFactory, make_task: Callable[..., StageTask], forked_ranks: ForkedRanks
) -> Callable[..., float]:
    """Returns the gradient norm of the first step by ZeRO stage, blocks per step, and DeepSpeed overrides."""
    one_block = write_blocks(tmp_path_factory.mktemp("one") / "blocks", blocks=1)

    def task(stage: int, blocks: int, overrides: Mapping[str, Any]) -> StageTask:
        deepspeed = {"zero_stage": stage, "overrides": overrides}
        settings = train_settings(
            global_batch=blocks, steps=1, precision="bfloat16", evaluate_at=[], deepspeed=deepspeed
        )
        made = make_task(settings, RANKS)
        return replace(made, parents={**made.parents, "data": one_block})

    cases = [(stage, blocks, {}) for stage in range(4) for blocks in (ONCE, OFTEN)] + [(2, OFTEN, IN_BFLOAT16)]
    tasks = [task(*case) for case in cases]
    plan = [{"task": task_to_json(task), "stop_after": None} for task in tasks]
    forked_ranks.run_plan(RANKS, plan, tmp_path_factory.mktemp("launch"))
    return lambda *case: logged(tasks[cases.index(case)], "grad_norm")[0]


@pytest.mark.parametrize("stage", range(4))
def test_many_copies_of_a_block_have_the_gradient_of_one(norm: Callable[..., float], stage: int):
    assert norm(stage, OFTEN, {}) == pytest.approx(norm(stage, ONCE, {}), rel=1e-6)


def test_accumulation_in_bfloat16_would_be_detected(norm: Callable[..., float]):
    assert norm(2, OFTEN, IN_BFLOAT16) != pytest.approx(norm(2, ONCE, {}), rel=1e-4)
