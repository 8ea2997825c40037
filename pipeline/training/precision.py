"""The precision of compute, and sizes that the engine shares with the estimates of memory and disk. No torch."""

from __future__ import annotations

from typing import Literal

from pipeline.launch.machine import bfloat16_flags

Precision = Literal["bfloat16", "float32"]  # named as torch's dtypes

BYTES: dict[Precision, int] = {"bfloat16": 2, "float32": 4}  # per number
# Logits in memory at once, in elements: 64 MiB or 1 GiB in float32. A GPU reads the head, and the gradient of a trained
# head, from memory once per chunk, which takes as long as the products of some hundred rows.
CHUNK_LOGITS = {"cpu": 2**24, "cuda": 2**28}
GPU_TILE = 128  # rows; GPUs compute products in tiles
CHECKPOINT_BYTES = 12  # per trained parameter: float32 master weight and two moments
AVERAGE_BYTES = 4  # per trained parameter, in addition, if averages are kept


def resolve_precision(
    setting: Literal["auto", "bfloat16", "float32"], device_type: str, gpu_has_bfloat16: bool = True
) -> Precision:
    """Resolves ``auto`` to bfloat16 on devices with native bfloat16 matrix products, and to float32 elsewhere.

    Where a CPU's bfloat16 instructions turn out to be slow, ``choose_precision`` of the engine decides for float32.

    Args:
        setting: ``pretrain.precision`` or ``sft.precision``. Any value other than ``auto`` is returned unchanged.
        device_type: "cpu" or "cuda".
        gpu_has_bfloat16: whether the GPU supports bfloat16 natively. The plan, which cannot query it, assumes so.
    """
    if setting != "auto":
        return setting
    native = gpu_has_bfloat16 if device_type == "cuda" else bool(bfloat16_flags())
    return "bfloat16" if native else "float32"


def has_float32_units(device_type: str, zero_stage: int) -> bool:
    """Returns whether products of bfloat16 operands can be computed on float32 units: on CPUs, at ZeRO 1 and 2.

    At ZeRO 0 the parameters are in float32, and at ZeRO 3 hooks of the modules gather them.
    """
    return device_type == "cpu" and zero_stage in (1, 2)


def checkpoint_bytes(parameters: int, has_averages: bool) -> int:
    """Returns the size of a checkpoint of this many trained parameters. Muon, which has one moment, needs less."""
    return parameters * (CHECKPOINT_BYTES + AVERAGE_BYTES * has_averages)


def chunk_rows(device_type: str, vocabulary: int, is_capped: bool = False) -> int:
    """Returns for how many tokens the loss computes logits at once.

    Args:
        device_type: "cpu" or "cuda".
        vocabulary: number of logits per token.
        is_capped: whether logits are limited by a tanh, whose slope takes as much memory as they do.
    """
    if device_type != "cuda":
        return max(1, CHUNK_LOGITS["cpu"] // vocabulary)
    rows = CHUNK_LOGITS["cuda"] // (2 if is_capped else 1) // vocabulary
    return max(1, rows // GPU_TILE) * GPU_TILE
