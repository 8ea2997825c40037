"""What the hardware could do: the rate that model FLOPs utilisation is measured against.

On a GPU in the table it is the data sheet's dense bfloat16 peak; anywhere else, and for float32, it is the rate of a
square matrix product, taken on all ranks at once when training starts. ``training.json`` says which of the two.
"""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from transformers import PreTrainedModel

from pipeline.config.execution import bfloat16_peak
from pipeline.models.families import expert_share
from pipeline.models.flops import HeadWork, LayerWork, TrainingFlops, matrix_entries
from pipeline.models.tensors import DTYPES
from pipeline.training.freeze import decoder_layers, full_shape, lowest_trainable_layer
from pipeline.training.precision import Precision

MEASURED_SIZE = {"cuda": 8192, "cpu": 1024}  # rows; large enough to be fast, small enough to take no time


@dataclass(frozen=True)
class Peak:
    """Floating-point operations a second of all ranks together, and where the number comes from."""

    rate: float
    source: str


def sheet_rate(device_name: str, precision: Precision) -> float | None:
    """One device's peak by its data sheet; None where the table has no answer."""
    return bfloat16_peak(device_name) if precision == "bfloat16" else None


def peak_of(device: torch.device, precision: Precision) -> Peak:
    """The peak of all ranks. Collective, for a measurement is only fair while every rank measures."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = sheet_rate(name, precision)
        if known is not None:
            return Peak(known * distributed.get_world_size(), f"data sheet: {name}, dense bfloat16")
    distributed.barrier()
    rate = torch.tensor(
        matrix_rate(DTYPES[precision], device, MEASURED_SIZE[device.type]), dtype=torch.float64, device=device
    )
    distributed.all_reduce(rate)
    return Peak(rate.item(), f"measured: {precision} product of two square matrices of {MEASURED_SIZE[device.type]}")


def matrix_rate(dtype: torch.dtype, device: torch.device, size: int = 1024, repeats: int = 3) -> float:
    """Measures the FLOP/s of one square matrix product, as the best of ``repeats`` runs."""
    left, right = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))  # zeros would draw less power
    seconds = []
    for _ in range(repeats + 1):  # the first run is a warm-up and the slowest
        _synchronize(device)
        started = time.perf_counter()
        left @ right
        _synchronize(device)
        seconds.append(time.perf_counter() - started)
    return float(2 * size**3 / min(seconds))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def best_matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Measures the best FLOP/s over square products of several sizes, each large enough to saturate the device."""
    sizes = (4096, 8192, 16384) if device.type == "cuda" else (1024, 2048, 3072)
    return max(matrix_rate(dtype, device, size, repeats=5) for size in sizes)


def slow_bfloat16_note(section: str) -> str | None:
    """Measures both precisions on this processor, and returns a note to the user if bfloat16 is the slower one."""
    cpu = torch.device("cpu")
    bfloat16, float32 = (matrix_rate(dtype, cpu) / 1e9 for dtype in (torch.bfloat16, torch.float32))
    if bfloat16 >= float32:
        return None
    return (
        f"bfloat16 matrix products run at {bfloat16:.0f} GFLOP/s on this processor and float32 at {float32:.0f}; "
        f"{section}.precision=float32 would be faster, as would {section}.float32_products=true in bfloat16"
    )


def memory_in_use(device: torch.device) -> int:
    """Bytes that this rank uses now: allocated on its GPU, or resident in the host's memory."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


# --------------------------------------------------------------------------------------------------
# What the engine's model asks of the formula in ``pipeline.models.flops``.


def training_flops(model: PreTrainedModel, sequence_length: int) -> TrainingFlops:
    """Operations a token; counted once, after the choice of what trains."""
    config, lowest = model.config.get_text_config(), lowest_trainable_layer(model)
    share = expert_share(config.to_dict())
    layers = []
    for layer in decoder_layers(model):
        sizes = [(p, matrix_entries(name, full_shape(p), share)) for name, p in layer.named_parameters()]
        layers.append(LayerWork(sum(size for _, size in sizes), sum(size for p, size in sizes if p.requires_grad)))
    weight = model.get_output_embeddings().weight
    reaches_below = lowest < len(layers) or _final_norm_trains(model)
    head = HeadWork(full_shape(weight).numel(), weight.requires_grad, reaches_below)
    return TrainingFlops.count(layers, lowest, head, sequence_length * _attention_size(config))


def _attention_size(config: Any) -> int:
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(config.num_attention_heads * head_size)


def _final_norm_trains(model: PreTrainedModel) -> bool:
    inside = {id(p) for p in decoder_layers(model).parameters()}
    embeddings = {id(p) for p in model.get_input_embeddings().parameters()}
    return any(p.requires_grad for p in model.base_model.parameters() if id(p) not in inside | embeddings)
