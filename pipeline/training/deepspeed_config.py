"""DeepSpeed's configuration dictionary from the training settings. No torch, so that the plan can use it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.config import DeepSpeed, Train
from pipeline.training.precision import Precision


def deepspeed_config(train: Train, precision: Precision, ranks: int) -> dict[str, Any]:
    """Returns the dictionary for ``deepspeed.initialize``, including ``deepspeed.overrides``.

    At ZeRO 1 and above, bfloat16 is DeepSpeed's own mode: parameters in bfloat16, and float32 master weights in the
    optimizer. At ZeRO 0 that mode would accumulate gradients in bfloat16, so the parameters stay float32 and the
    forward pass uses autocast (see ``loss.SummedLoss``). Gradients are accumulated and reduced in float32 unless
    overridden.
    """
    settings = train.deepspeed
    config: dict[str, Any] = {
        "train_batch_size": train.global_batch,
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": train.global_batch // (train.micro_batch * ranks),
        "gradient_clipping": train.max_grad_norm,
        "bf16": {"enabled": uses_bfloat16_parameters(train, precision)},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": _zero(settings),
        # Keep torch's AdamW when offloading. DeepSpeed's own would be compiled on first use.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,  # never; the loop logs
    }
    return merge(config, settings.overrides)


def uses_bfloat16_parameters(train: Train, precision: Precision) -> bool:
    """Returns whether the parameters are bfloat16, rather than float32 with or without autocast."""
    return precision == "bfloat16" and train.deepspeed.zero_stage > 0


def _zero(settings: DeepSpeed) -> dict[str, Any]:
    zero: dict[str, Any] = {
        "stage": settings.zero_stage,
        "reduce_bucket_size": settings.reduce_bucket_size,
        "allgather_bucket_size": settings.allgather_bucket_size,
    }
    if settings.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if settings.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    return zero


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns ``base`` updated by ``changes``. Nested dictionaries are merged recursively."""
    merged = dict(base)
    for name, value in changes.items():
        inner = merged.get(name)
        merged[name] = merge(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return merged
