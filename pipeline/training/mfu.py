"""Model FLOPs utilization (MFU): the FLOPs that a step needs, and the rate that the hardware could deliver.

On GPUs in the table of ``pipeline.config.execution``, and in bfloat16, the peak is the data sheet's dense rate.
Elsewhere it is the measured rate of a product of two square matrices, taken on all ranks at once when training starts.
``training.json`` records which of the two was used.
"""

from __future__ import annotations

import resource
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import distributed
from transformers import PreTrainedModel

from pipeline.config.execution import bfloat16_peak
from pipeline.models.families import expert_share, head_size
from pipeline.models.flops import HeadWork, LayerWork, TrainingFlops, matrix_entries
from pipeline.models.matrix_products import matrix_rate
from pipeline.models.tensors import DTYPES
from pipeline.training.freeze import decoder_layers, full_shape, lowest_trainable_layer
from pipeline.training.precision import Precision

MEASURED_SIZE = {"cuda": 8192, "cpu": 1024}  # rows; large enough to saturate the device, small enough to be quick

# ---------------------------------------------------------------------------------- FLOPs of the model


def training_flops(model: PreTrainedModel, sequence_length: int) -> TrainingFlops:
    """Counts the FLOPs per token of a model whose parameters have been frozen as needed.

    ``pipeline.models.flops`` has the formula.
    """
    config, lowest = model.config.get_text_config(), lowest_trainable_layer(model)
    share = expert_share(config.to_dict())
    layers = []
    for layer in decoder_layers(model):
        sizes = [(p, matrix_entries(name, full_shape(p), share)) for name, p in layer.named_parameters()]
        layers.append(LayerWork(sum(size for _, size in sizes), sum(size for p, size in sizes if p.requires_grad)))
    weight = model.get_output_embeddings().weight
    # The head passes gradients on only if something before it trains, even if that is only the final norm.
    passes_gradient = lowest < len(layers) or _final_norm_trains(model)
    head = HeadWork(full_shape(weight).numel(), weight.requires_grad, passes_gradient)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = config.num_attention_heads * head_size(config.to_dict(), head_dim)
    return TrainingFlops.count(layers, lowest, head, sequence_length * width)


def _final_norm_trains(model: PreTrainedModel) -> bool:
    inside = {id(p) for p in decoder_layers(model).parameters()}
    embeddings = {id(p) for p in model.get_input_embeddings().parameters()}
    return any(p.requires_grad for p in model.base_model.parameters() if id(p) not in inside | embeddings)


# -------------------------------------------------------------------------------- rates of the hardware


@dataclass(frozen=True)
class Peak:
    """The FLOP/s of all ranks together, and where the number comes from."""

    rate: float
    source: str


def peak_of(device: torch.device, precision: Precision) -> Peak:
    """Returns the peak of all ranks. Collective: ranks on one node share its power and memory bandwidth."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = data_sheet_rate(name, precision)
        if known is not None:
            return Peak(known * distributed.get_world_size(), f"data sheet: {name}, dense bfloat16")
    distributed.barrier()  # so that all ranks measure at the same time
    size = MEASURED_SIZE[device.type]
    rate = torch.tensor(matrix_rate(DTYPES[precision], device, size), dtype=torch.float64, device=device)
    distributed.all_reduce(rate)
    return Peak(rate.item(), f"measured: {precision} product of two square matrices of {size}")


def data_sheet_rate(device_name: str, precision: Precision) -> float | None:
    """Returns a GPU's peak FLOP/s according to its data sheet, or None if it is not in the table."""
    return bfloat16_peak(device_name) if precision == "bfloat16" else None


def memory_in_use(device: torch.device) -> int:
    """Returns the bytes that this rank uses now: allocated on its GPU, or resident in the host's memory."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
