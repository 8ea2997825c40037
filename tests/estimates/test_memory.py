"""Properties of the memory estimate that hold for any constants."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from pipeline.config import AnyExpand
from pipeline.estimates import (
    Setup,
    Trained,
    TrainingOutputs,
    disk_of,
    memory_of,
    trained_part,
    utilization_of,
    when_out_of_memory,
)
from pipeline.expansion.method import method_of
from pipeline.models.families import Shape, shape_of
from pipeline.training.freeze import decoder_layers
from tests.tiny_families import tiny_model
from tests.training.small import train_settings

LLAMA3_8B = {
    "model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip
NEW = (28, 30)


def _trained(layers: int = 32, new: tuple[int, ...] = NEW, trainable: str = "auto") -> Trained:
    shape: Shape = shape_of({**LLAMA3_8B, "num_hidden_layers": layers})
    rows = [{"layer": layer, "new": layer in new, "from": [layer]} for layer in range(layers)]
    return trained_part("pretrain", trainable, shape, {"method": "copy", "layers": rows})


def _setup(ranks: int = 1, stage: int = 2, **changes: Any) -> Setup:
    train = train_settings(
        sequence_length=2048, global_batch=64, micro_batch=4, deepspeed={"zero_stage": stage}, **changes
    )
    return Setup(train, "bfloat16", ranks, on_gpu=True)


def test_each_zero_stage_partitions_what_deepspeed_documents() -> None:
    """ZeRO (arXiv 1910.02054, section 5): optimizer state, then gradients, then parameters."""
    trained = _trained()
    shares = {stage: memory_of(trained, _setup(ranks=8, stage=stage)) for stage in (0, 1, 2, 3)}
    assert shares[1].optimizer == trained.parameters * 12 // 8
    assert (shares[1].gradients, shares[2].gradients) == (trained.parameters * 4, trained.parameters * 4 // 8)
    assert shares[2].weights == trained.shape.parameters * 2
    assert shares[3].weights < shares[2].weights
    copies = sum(layer.parameters for layer in trained.shape.layers[28:]) * 2  # autocast's
    assert shares[0].weights == trained.shape.parameters * 4 + copies


def test_the_second_copy_of_hpz_is_divided_by_its_own_number_of_ranks() -> None:
    trained, setup = _trained(), _setup(ranks=16, stage=3)
    deepspeed = setup.train.deepspeed.model_copy(update={"hpz_partition_size": 8})
    more = memory_of(trained, setup.with_train(deepspeed=deepspeed)).weights - memory_of(trained, setup).weights
    assert more == trained.shape.parameters * 2 // 8


def test_tensors_with_several_rates_take_eight_bytes_more_per_parameter() -> None:
    """The multiples, and the old weights during a step. Llama's tensors have one role each, and Phi-3's several."""
    rates = {"role_learning_rates": {"q": 2.0}}
    assert memory_of(_trained(), _setup(**rates)) == memory_of(_trained(), _setup())
    shape = shape_of({**LLAMA3_8B, "model_type": "phi3"})
    fused = trained_part("pretrain", "all", shape, {})
    more = memory_of(fused, _setup(**rates)).optimizer - memory_of(fused, _setup()).optimizer
    assert more == 8 * 32 * shape.layers[0].tensors["self_attn.qkv_proj.weight"][0] * 4096


def test_averages_take_four_bytes_more_per_parameter_in_memory_and_checkpoints() -> None:
    trained = _trained()
    more = memory_of(trained, _setup(ranks=8, ema_decay=0.99)).optimizer - memory_of(trained, _setup(ranks=8)).optimizer
    assert more == trained.parameters * 4 // 8
    with_averages, without = (
        disk_of(
            {"pretrain": "pretrain"}, trained.shape, trained.shape, "bfloat16",
            {"pretrain": TrainingOutputs(trained.parameters, 2, 0, has_averages)}, {},
        ).checkpoints
        for has_averages in (True, False)
    )  # fmt: skip
    assert (with_averages, without) == (3 * 16 * trained.parameters, 3 * 12 * trained.parameters)


@pytest.mark.parametrize(
    "family, entries",
    [
        ("mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 448}),
        ("qwen3_moe", {"num_experts": 16, "num_experts_per_tok": 8, "moe_intermediate_size": 48}),
        ("qwen2_moe", {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 88,
                       "shared_expert_intermediate_size": 352}),
        ("gpt2", {"activation_function": "gelu", "resid_pdrop": 0.0, "attn_pdrop": 0.0}),  # norms called ln_1 and ln_2
    ],
)  # fmt: skip
def test_what_a_layer_stores_is_what_autograd_saves(family: str, entries: dict[str, Any]) -> None:
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    model = tiny_model(family, num_hidden_layers=1, **{**sizes, **entries}).train()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    tokens = torch.arange(128)[None]
    hidden = torch.randn(1, 128, 128, requires_grad=True)
    rotary = getattr(model.base_model, "rotary_emb", None)
    positions = {"position_embeddings": rotary(hidden, tokens), "position_ids": tokens} if rotary else {}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        decoder_layers(model)[0](hidden, attention_mask=None, **positions)
    expected = sum(storage.nbytes() for place, storage in saved.items() if place not in weights)
    trained = trained_part("pretrain", "all", shape_of(json.loads(model.config.to_json_string(use_diff=False))), {})
    setup = Setup(train_settings(sequence_length=128, micro_batch=1), "float32", 1, on_gpu=True)
    # The gradients of the only layer take as much as it stores. A fused layer norm stores less than an RMS norm.
    assert memory_of(trained, setup).activations / 2 == pytest.approx(expected, rel=0.1 if rotary else 0.15)


def test_the_copy_for_checkpoints_counts_where_the_device_is_the_host() -> None:
    trained = _trained()
    assert memory_of(trained, _setup(ranks=8)).staging == 0
    on_cpu = replace(_setup(ranks=8, ema_decay=0.99, steps=20, checkpoint_every_steps=10), on_gpu=False)
    assert memory_of(trained, on_cpu).staging == 16 * trained.parameters // 8
    assert memory_of(trained, on_cpu.with_train(checkpoint_every_steps=20)).staging == 0  # only one, at the end


def test_frozen_layers_below_the_lowest_trained_one_store_nothing() -> None:
    setup = _setup()
    deeper = memory_of(_trained(layers=40, new=(36, 38)), setup)
    assert deeper.activations == memory_of(_trained(), setup).activations


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_grow_with_the_micro_batch_and_shrink_with_checkpointing(checkpointing: bool) -> None:
    trained, setup = _trained(), _setup(activation_checkpointing=checkpointing)
    half = memory_of(trained, setup.with_train(micro_batch=2)).activations
    assert memory_of(trained, setup).activations == 2 * half
    if checkpointing:
        assert memory_of(trained, setup).activations < memory_of(trained, _setup()).activations / 2


def test_ranks_that_share_sequences_divide_activations_but_not_weights() -> None:
    trained = _trained()
    alone, shared = (memory_of(trained, _setup(ranks=8, sequence_parallel=parts)) for parts in (1, 4))
    exchanged = len(NEW) * 2 * 4 * 2048 // 4 * 4096  # the outputs of attention in the trained layers, in bfloat16
    current = exchanged // len(NEW)  # and the gradients of one layer
    assert shared.activations == alone.activations // 4 + exchanged + current
    assert shared.logits < alone.logits
    for part in ("weights", "gradients", "optimizer", "buckets"):
        assert getattr(shared, part) == getattr(alone, part)


def test_training_everything_stores_more_than_training_the_top() -> None:
    top, whole = (memory_of(_trained(trainable=choice), _setup()) for choice in ("auto", "all"))
    for part in ("gradients", "optimizer", "activations", "logits"):
        assert getattr(whole, part) > getattr(top, part)


@pytest.mark.parametrize(
    "gibibytes, changes",
    [
        (26, {"micro_batch": 2}),
        (23, {"micro_batch": 1, "activation_checkpointing": True}),
        (18, {"micro_batch": 1, "activation_checkpointing": True, "zero_stage": 3}),
    ],
)
def test_out_of_memory_names_the_mildest_change_that_fits(gibibytes: int, changes: dict[str, Any]) -> None:
    trained, setup, there = _trained(), _setup(ranks=2), gibibytes * 2**30
    said = when_out_of_memory("pretrain", trained, setup, there)
    assert "28.7 GiB per device" in said and f"{gibibytes}.0 GiB are available" in said
    typed = re.findall(r"pretrain\.(?:deepspeed\.)?(\w+)=(\w+)", said)
    assert typed == [(name, str(value).lower()) for name, value in changes.items()]
    sharing = setup.train.deepspeed.model_copy(update={"zero_stage": changes.pop("zero_stage", 2)})
    assert memory_of(trained, setup.with_train(**changes, deepspeed=sharing)).total <= there


def test_out_of_memory_reports_that_nothing_fits_or_that_it_should_have_fitted() -> None:
    assert "more devices" in when_out_of_memory("pretrain", _trained(), _setup(ranks=2), 2**30)
    assert "To save memory, add any of pretrain.micro_batch=2" in when_out_of_memory(
        "pretrain", _trained(), _setup(), 2**40
    )


def test_an_offloaded_optimizer_is_not_on_the_device() -> None:
    setup = _setup(stage=3)
    offloaded = setup.train.deepspeed.model_copy(update={"offload_optimizer": True, "offload_parameters": True})
    memory = memory_of(_trained(), setup.with_train(deepspeed=offloaded))
    assert memory.optimizer == 0
    assert memory.weights < memory_of(_trained(), setup).weights


def test_overrides_of_deepspeed_settings_count() -> None:
    overrides = {"zero_optimization": {"stage": 1, "reduce_bucket_size": 1000}}
    setup = _setup()
    changed = setup.train.deepspeed.model_copy(update={"overrides": overrides})
    memory = memory_of(_trained(), replace(setup, train=setup.train.model_copy(update={"deepspeed": changed})))
    assert memory.buckets == 8000  # one is filled while the other is reduced
    assert memory.gradients == _trained().parameters * 4


def test_a_bucket_on_a_gpu_holds_a_layer() -> None:
    trained = _trained()
    layer = trained.shape.layers[0].parameters
    assert layer > 200e6
    assert [memory_of(trained, _setup(stage=stage)).buckets for stage in range(4)] == [
        0,
        8 * layer,
        8 * layer,
        4 * layer,
    ]
    on_cpu = replace(_setup(), on_gpu=False)
    assert memory_of(trained, on_cpu).buckets == 4 * 50_000_000


def test_disk_holds_every_model_and_three_checkpoints_while_one_is_written() -> None:
    trained = _trained()
    missing = {"load": "load", "expand": "expand", "tokenize/corpus": "tokenize", "pretrain": "pretrain"}
    outputs = {"pretrain": TrainingOutputs(trained.parameters, checkpoints=2, snapshots=0)}
    disk = disk_of(missing, trained.shape, trained.shape, "bfloat16", outputs, {"tokenize/corpus": 10**9})
    assert disk.checkpoints == 3 * 12 * trained.parameters
    weights = trained.shape.parameters * 2
    assert [round(disk.artifacts[name] / weights, 2) for name in ("load", "expand", "pretrain")] == [1.0, 1.0, 1.0]
    assert disk.artifacts["tokenize/corpus"] == pytest.approx(9e9, rel=0.01)
    assert disk.total == sum(disk.artifacts.values()) + disk.checkpoints


def test_disk_counts_what_the_settings_keep() -> None:
    trained = _trained()
    shapes = (trained.shape, trained.shape)
    plain, more = (
        disk_of({"pretrain": "pretrain"}, *shapes, "bfloat16", {"pretrain": outputs}, {})
        for outputs in (
            TrainingOutputs(trained.parameters, checkpoints=2, snapshots=0),
            TrainingOutputs(trained.parameters, checkpoints=4, snapshots=3),
        )
    )
    assert more.checkpoints - plain.checkpoints == 2 * 12 * trained.parameters
    assert more.artifacts["pretrain"] - plain.artifacts["pretrain"] == 3 * 2 * trained.parameters


def test_disk_counts_the_room_that_lesa_works_in_unless_checkpoints_take_more(
    expand_settings: Callable[..., AnyExpand],
) -> None:
    llama, lesa = shape_of(LLAMA3_8B), method_of(expand_settings("lesa"))
    assert lesa.scratch_bytes(llama) == 32 * 14336 * 4096 * 4
    alone = disk_of({"expand": "expand"}, llama, llama, "bfloat16", {}, {}, lesa.scratch_bytes(llama))
    assert alone.total == alone.artifacts["expand"] + lesa.scratch_bytes(llama)
    outputs = {"pretrain": TrainingOutputs(3 * 10**9, checkpoints=2, snapshots=0)}
    trained = disk_of({"pretrain": "pretrain"}, llama, llama, "bfloat16", outputs, {}, lesa.scratch_bytes(llama))
    assert trained.total == trained.artifacts["pretrain"] + trained.checkpoints
    small = shape_of({**LLAMA3_8B, "hidden_size": 1024, "intermediate_size": 4096})
    assert lesa.scratch_bytes(small) == 0  # in memory


def test_lesa_keeps_its_largest_factor_on_a_gpu_only_if_half_of_it_is_enough(
    expand_settings: Callable[..., AnyExpand],
) -> None:
    lesa, llama_8b = method_of(expand_settings("lesa")), shape_of(LLAMA3_8B)
    llama_70b = shape_of({**LLAMA3_8B, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80})
    of_8b, of_70b = 32 * 14336 * 4096 * 4, 80 * 28672 * 8192 * 4
    large, small = 80 * 2**30, 12 * 2**30
    assert [lesa.scratch_bytes(llama_8b, memory) for memory in (large, small)] == [0, of_8b]
    assert lesa.scratch_bytes(llama_70b, large) == of_70b
    # On the large GPU V of gate or up, beside which there is a copy of [out, out] twice; else the eigendecomposition.
    assert of_8b + 8 * 14336**2 < lesa.gpu_bytes(llama_8b, large) < of_8b + 10 * 14336**2 + 8 * 14336 * 4096
    assert lesa.gpu_bytes(llama_70b, large) == 32 * 28672**2
    assert lesa.gpu_bytes(llama_8b, small) == 32 * 14336**2


def test_utilization_follows_from_the_settings() -> None:
    trained = _trained(trainable="all")
    assert utilization_of(trained, _setup()) == 0.50
    assert utilization_of(trained, _setup(compile=False)) == 0.45
    assert utilization_of(trained, _setup(stage=3)) == 0.42
    assert utilization_of(trained, _setup(attention="sdpa")) == pytest.approx(0.85 * 0.50)
    # If all layers train, a third of the operations without the head, which is not repeated, is the forward pass.
    assert utilization_of(trained, _setup(activation_checkpointing=True)) == pytest.approx(0.50 * 3 / 4, rel=0.02)
    assert utilization_of(_trained(), _setup(activation_checkpointing=True)) > 0.45  # four layers of 32 are repeated
