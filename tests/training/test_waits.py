"""Between the first and the last micro-batch of a step, the host never waits for the device."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.artifacts.task import StageTask, task_to_json
from pipeline.training.attention import DOCUMENTS, block_masks
from pipeline.training.batches import MicroBatch, TokenIndices
from pipeline.training.loss import SummedLoss
from tests.training.forked import ForkedRanks
from tests.training.small import train_settings
from tests.training.waits import Waits

pytestmark = pytest.mark.xdist_group("distributed")

META = torch.device("meta")  # its tensors have no data, so operations that depend on data fail
POSITIONS = torch.cat([torch.arange(length) for length in (9, 1, 22, 32)]).view(2, 32)


def batch() -> MicroBatch:
    ids = torch.arange(64).view(2, 32)
    indices = TokenIndices.of(ids, POSITIONS, POSITIONS > 0)
    return MicroBatch(ids, POSITIONS, indices, len(indices.targets), torch.ones_like(ids, dtype=torch.bool))


def test_the_counter_notices_waits():
    mask, values = torch.ones(3, dtype=torch.bool), torch.ones(3)
    with Waits() as waits:
        _ = values[mask], mask.nonzero(), values.sum().item(), values.to(META), values.to(META, non_blocking=True)
    operations = [name.partition(" at test_waits.py:")[0] for name in waits.counts.elements()]
    assert operations == ["aten.index", "aten.nonzero", "aten._local_scalar_dense", "aten._to_copy"]


def test_neither_copying_nor_computing_a_micro_batch_waits():
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True, attn_implementation=DOCUMENTS,
    )  # fmt: skip
    with META:
        model = SummedLoss(LlamaForCausalLM(config))
    on_host = batch()
    with Waits() as waits:
        moved = on_host.on(META)
        model(moved.input_ids, moved.position_ids, indices=moved.indices).backward()
    assert waits.operations > 100 and not waits.counts
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_without_indices_the_host_would_wait():
    """The counterpart: found on the device, the number of targets must be read from there."""
    moved = batch().on(META)
    with pytest.raises((NotImplementedError, RuntimeError)):
        TokenIndices.of(moved.input_ids, moved.position_ids, torch.ones(2, 32, dtype=torch.bool, device=META))


def test_masks_of_blocks_are_computed_without_waiting():
    with Waits() as waits:
        masks = block_masks(POSITIONS.to(META, non_blocking=True), {None, 8})
    assert not waits.counts and {mask.kv_indices.device for mask in masks.values()} == {META}


def test_no_engine_waits_within_a_step(
    tmp_path: Path, make_task: Callable[..., StageTask], forked_ranks: ForkedRanks
) -> None:
    plan, files = [], []
    for stage, precision in ((0, "float32"), (2, "float32"), (2, "bfloat16"), (3, "bfloat16")):
        settings = train_settings(
            steps=3, precision=precision, evaluate_at=[], deepspeed={"zero_stage": stage}, global_batch=8
        )
        files.append(tmp_path / f"waits-{len(files)}.json")
        plan.append({"task": task_to_json(make_task(settings, 1)), "stop_after": None, "waits": str(files[-1])})
    forked_ranks.run_plan(1, plan, tmp_path / "launch")
    for file in files:
        counted = json.loads(file.read_text())
        assert counted["steps"] == 3 and counted["operations"] > 1000
        assert counted["waits"] == {}
