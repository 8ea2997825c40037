"""From typed settings to DeepSpeed's configuration dictionary. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.config import DeepSpeed, Train
from pipeline.training.precision import Precision


def deepspeed_config(train: Train, precision: Precision, ranks: int) -> dict[str, Any]:
    """The whole dictionary for ``deepspeed.initialize``.

    bfloat16 is DeepSpeed's own mode from ZeRO 1 on: parameters in bfloat16, float32 master weights in the optimizer.
    At ZeRO 0 that mode would accumulate gradients in bfloat16, so there the parameters stay float32 and the forward
    pass autocasts (see ``loss.SummedLoss``). Gradients accumulate and are reduced in float32 unless overridden.
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
        # The optimizer is torch's AdamW: nothing is compiled on first use, and its state can be named.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }
    return merge(config, settings.overrides)


def uses_bfloat16_parameters(train: Train, precision: Precision) -> bool:
    """Whether the model itself is bfloat16, rather than float32 under autocast."""
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
    """``base`` with ``changes`` laid over it, dictionary by dictionary."""
    merged = dict(base)
    for name, value in changes.items():
        inner = merged.get(name)
        merged[name] = merge(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return merged
