"""Gradients accumulate in float32 over however many micro-batches, at every ZeRO stage, also in bfloat16.

The oracle is arithmetic: the same block many times over has the gradient of that block once. As many times as a power
of two, so that its share of the mean has the same digits; a sum kept in bfloat16 rounds at every addition.
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

RANKS, ONCE, OFTEN = 2, 2, 128  # blocks a step: one a rank, or 64
IN_BFLOAT16 = {"data_types": {"grad_accum_dtype": "bf16"}}


@pytest.fixture(scope="module")
def norm(
    tmp_path_factory: pytest.TempPathFactory, make_task: Callable[..., StageTask], forked_ranks: ForkedRanks
) -> Callable[..., float]:
    """The gradient's norm in the first step, by ZeRO stage, blocks a step, and DeepSpeed's overrides."""
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
def test_the_same_block_many_times_over_has_its_gradient_once(norm: Callable[..., float], stage: int):
    assert norm(stage, OFTEN, {}) == pytest.approx(norm(stage, ONCE, {}), rel=1e-6)


def test_a_sum_in_bfloat16_would_be_seen(norm: Callable[..., float]):
    assert norm(2, OFTEN, IN_BFLOAT16) != pytest.approx(norm(2, ONCE, {}), rel=1e-4)
