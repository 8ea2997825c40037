"""DeepSpeed's configuration dictionary from the training settings. No torch, so that the plan can use it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.config import DeepSpeed, Train
from pipeline.errors import UserError
from pipeline.files import merge_nested
from pipeline.training.precision import Precision

BUCKET_SIZE = 50_000_000  # elements
_DEEPSPEED_NAMES = {"float32": "fp32", "bfloat16": "bf16"}
_DTYPES = frozenset({"fp32", "bf16", "fp16"})
_OFFLOAD: dict[str, Any] = {
    "device": frozenset({"none", "cpu", "nvme"}), "nvme_path": str, "buffer_count": int, "pin_memory": bool,
}  # fmt: skip

# Keys of DeepSpeed's configuration that have an effect on this training loop: their types, the values of an
# enumeration, or the keys of a section. DeepSpeed ignores unknown keys outside zero_optimization and bf16.
OVERRIDES: dict[str, Any] = {
    "communication_data_type": _DTYPES,
    "data_types": {"grad_accum_dtype": _DTYPES},
    "gradient_clipping": float,
    "bf16": {"immediate_grad_update": bool, "check_grad_overflow": bool},
    "zero_optimization": {
        **dict.fromkeys((
            "contiguous_gradients", "reduce_scatter", "use_multi_rank_bucket_allreduce", "allgather_partitions",
            "overlap_comm", "ignore_unused_parameters", "round_robin_gradients", "parameter_alignment",
            "zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients",
            "memory_efficient_linear", "override_module_apply", "log_trace_cache_warnings", "enable_sanity_checks",
            "stage3_use_all_reduce_for_fetch_params", "stage3_allgather_sequential",
        ), bool),
        **dict.fromkeys((
            "sub_group_size", "stage3_prefetch_bucket_size",
            "stage3_param_persistence_threshold", "stage3_model_persistence_threshold", "stage3_max_live_parameters",
            "stage3_max_reuse_distance", "stage3_module_granularity_threshold",
        ), int),
        "offload_param": {**_OFFLOAD, "buffer_size": int, "max_in_cpu": int},
        "offload_optimizer": {
            **_OFFLOAD, "pipeline_read": bool, "pipeline_write": bool, "fast_init": bool, "ratio": float,
        },
    },
    "aio": {
        "block_size": int, "queue_depth": int, "intra_op_parallelism": int, "single_submit": bool,
        "overlap_events": bool, "use_gds": bool,
    },
    "steps_per_print": int,
    "log_level": str,
    "dump_state": bool,
    "disable_python_gc": bool,
    "wall_clock_breakdown": bool,
    "memory_breakdown": bool,
    "comms_logger": {"enabled": bool, "prof_all": bool, "prof_ops": list, "verbose": bool, "debug": bool},
    "flops_profiler": {
        "enabled": bool, "recompute_fwd_factor": float, "profile_step": int, "module_depth": int, "top_modules": int,
        "detailed": bool, "output_file": str,
    },
}  # fmt: skip

# Keys that follow from other settings, and would be ignored or contradict them.
DETERMINED = {
    "train_batch_size": "global_batch",
    "train_micro_batch_size_per_gpu": "micro_batch",
    "gradient_accumulation_steps": "global_batch or micro_batch",
    "optimizer": "learning_rate, beta1, beta2, epsilon or weight_decay",
    "scheduler": "schedule and warmup_fraction",
    "fp16": "precision",
    "bf16.enabled": "precision",
    # Master weights and optimizer states are float32: checkpoints and averages rely on it.
    "bf16.bf16_master_weights_and_grads": "precision",
    "bf16.bf16_optimizer_states": "precision",
    "torch_autocast": "precision",
    "zero_optimization.stage": "deepspeed.zero_stage",
    "zero_force_ds_cpu_optimizer": "deepspeed.offload_optimizer",
    # They keep sums over ranks within the range of float16, and ZeRO 2 and 3 do not support them.
    "prescale_gradients": "deepspeed.reduce_dtype",
    "gradient_predivide_factor": "deepspeed.reduce_dtype",
    # The loop multiplies losses by the number of ranks, so that the mean of the gradients is their sum.
    "gradient_allreduce_op": "max_grad_norm or learning_rate",
    "zero_optimization.reduce_bucket_size": "deepspeed.reduce_bucket_size",
    "zero_optimization.allgather_bucket_size": "deepspeed.allgather_bucket_size",
    "zero_optimization.zero_hpz_partition_size": "deepspeed.hpz_partition_size",
    "activation_checkpointing": "activation_checkpointing",
    "compile": "compile",
}
_TYPE_NAMES = {bool: "true or false", int: "a non-negative integer", float: "a finite number", str: "a string"}


def override_faults(section: str, overrides: Mapping[str, Any]) -> Iterator[UserError]:
    """Yields an error for each override that DeepSpeed would ignore or reject, or that contradicts other settings.

    Args:
        section: "pretrain" or "sft", for the messages.
        overrides: ``deepspeed.overrides``.
    """
    yield from _override_faults(section, overrides, OVERRIDES, "")


def _override_faults(section: str, values: Mapping[str, Any], known: Mapping[str, Any], at: str) -> Iterator[UserError]:
    for name, value in values.items():
        key, expected = f"{at}{name}", known.get(name)
        if isinstance(expected, dict) and isinstance(value, Mapping):
            yield from _override_faults(section, value, expected, f"{key}.")
            continue
        if key in DETERMINED:
            rule = "the training loop does not use this key of DeepSpeed, or sets it itself"
            remedy = f"Remove it, and set {DETERMINED[key]} of {section} instead."
        elif expected is None:
            names = ", ".join(sorted(known))
            rule = f"DeepSpeed has no such key, or it has no effect here. Keys of this level are {names}"
            remedy = "Remove it, or correct its spelling."
        elif _has_type(value, expected):
            continue
        else:
            rule, remedy = f"it must be {_described(expected)}, not {value!r}", "Correct it."
        yield UserError(setting=f"{section}.deepspeed.overrides", value=key, rule=rule, remedy=remedy)


def _has_type(value: Any, expected: Any) -> bool:
    if isinstance(expected, frozenset):
        return isinstance(value, str) and value in expected
    if isinstance(expected, dict):
        return isinstance(value, Mapping)
    if expected is bool or isinstance(value, bool):
        return expected is bool and isinstance(value, bool)
    if expected is float:
        return isinstance(value, (int, float)) and math.isfinite(value)
    return isinstance(value, expected) and (expected is not int or value >= 0)


def _described(expected: Any) -> str:
    if isinstance(expected, frozenset):
        return "one of " + ", ".join(sorted(expected))
    if isinstance(expected, dict):
        return "a section with keys of " + ", ".join(sorted(expected))
    return _TYPE_NAMES.get(expected, "a list")


def deepspeed_config(
    train: Train, precision: Precision, ranks: int, on_gpu: bool = False, largest_layer: int = 0
) -> dict[str, Any]:
    """Returns the dictionary for ``deepspeed.initialize``, including ``deepspeed.overrides``.

    At ZeRO 1 and above, bfloat16 is DeepSpeed's own mode: parameters in bfloat16, and float32 master weights in the
    optimizer. At ZeRO 0 that mode would accumulate gradients in bfloat16, so the parameters stay float32 and the
    forward pass uses autocast (see ``loss.SummedLoss``). Gradients are accumulated in float32, and reduced in
    ``reduce_dtype``, unless overridden.

    Args:
        train: the settings.
        precision: of compute.
        ranks: number of ranks.
        on_gpu: reductions overlap the backward pass, and offloaded tensors are in page-locked memory. On CPUs neither
            has an effect, but the order of sums would change.
        largest_layer: parameters of the model's largest decoder layer, for buckets of size ``auto`` on GPUs.
    """
    settings, parts = train.deepspeed, train.sequence_parallel
    config: dict[str, Any] = {
        # To DeepSpeed, all ranks are data-parallel, and parts of sequences are sequences.
        "train_batch_size": train.global_batch * parts,
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": train.global_batch * parts // (train.micro_batch * ranks),
        "gradient_clipping": train.max_grad_norm,
        # The loop checks the gradient norm before every step, so DeepSpeed need not look for overflows as well.
        "bf16": {"enabled": uses_bfloat16_parameters(train, precision), "check_grad_overflow": False},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": _DEEPSPEED_NAMES[settings.reduce_dtype],
        "zero_optimization": _zero(settings, on_gpu, largest_layer),
        # Keep torch's AdamW when offloading. DeepSpeed's own would be compiled on first use.
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,  # DeepSpeed knows torch's AdamW, but not the classes derived from it
        "steps_per_print": 2**31,  # never; the loop logs
        "timers": {"throughput": {"enabled": False}},  # it synchronizes with the device twice per micro-batch
    }
    return merge_nested(config, settings.overrides)


def uses_bfloat16_parameters(train: Train, precision: Precision) -> bool:
    """Returns whether the parameters are bfloat16, rather than float32 with or without autocast."""
    return precision == "bfloat16" and train.deepspeed.zero_stage > 0


def _zero(settings: DeepSpeed, on_gpu: bool, largest_layer: int) -> dict[str, Any]:
    # A matrix that does not fit a bucket is reduced alone, and only while the backward pass waits.
    automatic = max(BUCKET_SIZE, largest_layer) if on_gpu else BUCKET_SIZE
    zero: dict[str, Any] = {
        "stage": settings.zero_stage,
        "reduce_bucket_size": automatic if settings.reduce_bucket_size == "auto" else settings.reduce_bucket_size,
        "allgather_bucket_size": (
            automatic if settings.allgather_bucket_size == "auto" else settings.allgather_bucket_size
        ),
        "contiguous_gradients": True,
    }
    if on_gpu:
        zero["overlap_comm"] = True
    if settings.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    if settings.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": on_gpu}
    if settings.hpz_partition_size > 1:
        zero["zero_hpz_partition_size"] = settings.hpz_partition_size
    return zero
