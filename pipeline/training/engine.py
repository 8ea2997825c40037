"""The context of a rank, and the DeepSpeed engine around the model: one explicit dtype and torch's AdamW."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import distributed
from transformers import PreTrainedModel
from transformers.integrations import HfDeepSpeedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from pipeline.artifacts.task import StageTask
from pipeline.config import Train
from pipeline.files import read_json
from pipeline.models.families import shape_of
from pipeline.models.loading import from_pretrained, language_config_of
from pipeline.models.matrix_products import prefers_float32_units, use_float32_products
from pipeline.models.tensors import DTYPES
from pipeline.models.vector_math import initialize_vector_math
from pipeline.training.attention import avoid_cudnn_attention, resolve_attention, share_sequences
from pipeline.training.compilation import compile_layers
from pipeline.training.deepspeed_config import deepspeed_config, uses_bfloat16_parameters
from pipeline.training.freeze import decoder_layers, lowest_trainable_layer
from pipeline.training.job import CHECKPOINTS
from pipeline.training.loss import SummedLoss
from pipeline.training.optimizer import make_optimizer, parameter_groups
from pipeline.training.precision import Precision, has_float32_units, resolve_precision
from pipeline.training.process_group import enter, join_process_group, limit_collectives
from pipeline.training.rates import Multiple
from pipeline.training.sequence_parallel import ALONE, SequenceGroup


@dataclass(frozen=True)
class RankContext:
    """A training stage on one rank: its task, device, precision and the ranks that share sequences with it."""

    task: StageTask
    settings: Train
    log_dir: Path
    device: torch.device
    precision: Precision
    rank: int
    ranks: int
    sequence: SequenceGroup = ALONE
    float32_products: bool = False

    @property
    def model_dir(self) -> Path:
        """The model to train."""
        return self.task.parents["model"]

    @property
    def data_dir(self) -> Path:
        """The token blocks to train on."""
        return self.task.parents["data"]

    @property
    def corpus_dir(self) -> Path | None:
        """The token blocks to mix in, if there are any."""
        return self.task.parents.get("corpus")

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints are saved while the stage runs."""
        return self.task.out / CHECKPOINTS

    @cached_property
    def deepspeed_config(self) -> dict[str, Any]:
        """DeepSpeed's configuration."""
        on_gpu = self.device.type == "cuda"
        largest = shape_of(read_json(self.model_dir / "config.json")).largest_layer if on_gpu else 0
        return deepspeed_config(self.settings, self.precision, self.ranks, on_gpu, largest)


def start_distributed(timeout: timedelta, log_dir: Path) -> torch.device:
    """Joins the process group of all ranks, and returns this rank's device.

    Args:
        timeout: how long a collective may take.
        log_dir: of the job.
    """
    # The moments of inactive units decay to denormal numbers, on which processors are many times slower. The setting
    # belongs to a thread and is inherited by threads started later, so it comes before the first tensor.
    torch.set_flush_denormal(True)
    initialize_vector_math()
    # Otherwise DeepSpeed would probe the compiler for all of its operators, and compile a shared-memory collective
    # that only its inference engine uses.
    deepspeed.ops.__compatible_ops__ = {}
    on_gpu = os.environ["DS_ACCELERATOR"] == "cuda"
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    join_process_group(device, timeout, log_dir)
    deepspeed.init_distributed(dist_backend=distributed.get_backend(), verbose=False)  # uses the existing group
    return device


def load_model(context: RankContext) -> PreTrainedModel:
    """Loads the causal language model on the CPU, in the dtype of its parameters during training.

    A model around it is never loaded.

    At ZeRO 3 every rank receives its partitions while loading, so no rank ever holds the full model.

    Raises:
        UserError: the model does not support the ``attention`` setting.
    """
    enter("loading the model", is_alone=True)
    config = context.deepspeed_config
    section, train, precision = context.task.name, context.settings, context.precision
    model_config = language_config_of(context.model_dir)
    attention = resolve_attention(section, train, model_config, precision, context.device)
    print(f"attention: {attention} ({section}.attention={train.attention})", flush=True)
    avoid_cudnn_attention(attention, context.device)
    share_sequences(context.sequence)
    zero3 = HfDeepSpeedConfig(dict(config)) if config["zero_optimization"]["stage"] == 3 else None
    dtype = DTYPES[precision] if uses_bfloat16_parameters(train, precision) else torch.float32
    model: PreTrainedModel = from_pretrained(context.model_dir, dtype=dtype, attn_implementation=attention)
    # transformers holds this config by a weak reference. It must exist while the model is loaded, but no longer, or it
    # would apply to the next model of this process.
    del zero3
    return model.train()


def choose_precision(
    train: Train, device: torch.device, earlier: tuple[Precision, bool] | None = None
) -> tuple[Precision, bool]:
    """Resolves ``precision`` and ``float32_products``. On CPUs a measured product decides what is fastest. Collective.

    Args:
        train: the settings.
        device: where the training computes.
        earlier: what was chosen before this training was interrupted, and is chosen again if the settings allow it: a
            second measurement may decide otherwise on a busy machine.

    Returns:
        The precision, and whether bfloat16 operands are multiplied on a CPU's float32 units.
    """
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    precision, products = resolve_precision(train.precision, device.type, native), train.float32_products
    if not leaves_units_open(train, precision, device.type):
        return precision, products is True
    has_units = products == "auto" and has_float32_units(device.type, train.deepspeed.zero_stage)
    fast: tuple[Precision, bool] = (precision, False)
    slow: tuple[Precision, bool] = (precision, True) if has_units else ("float32", False)
    if earlier in (fast, slow):
        return earlier
    decision = torch.tensor(int(prefers_float32_units()))
    distributed.broadcast(decision, src=0)  # otherwise ranks could round differently
    return slow if decision else fast


def leaves_units_open(train: Train, precision: Precision, device_type: str) -> bool:
    """Returns whether the settings leave it to a measurement if bfloat16 or float32 units of a CPU compute."""
    if device_type != "cpu" or precision == "float32" or train.float32_products is True:
        return False
    has_units = has_float32_units(device_type, train.deepspeed.zero_stage)
    return train.precision == "auto" or (train.float32_products == "auto" and has_units)


def start_engine(
    context: RankContext, model: PreTrainedModel, multiples: Mapping[str, Multiple], matrices: Collection[str]
) -> deepspeed.DeepSpeedEngine:
    """Wraps a model whose parameters have been frozen as needed into the engine that computes ``SummedLoss``.

    Args:
        context: the rank's task, directories and device.
        model: the model.
        multiples: of the learning rate, by parameter name.
        matrices: the names of the parameters that Muon updates.
    """
    train, precision = context.settings, context.precision
    if train.activation_checkpointing:
        _checkpoint_activations(model)
    if context.float32_products:
        use_float32_products(decoder_layers(model))
    compiles = train.compiles(context.device.type)
    if compiles:
        compile_layers(decoder_layers(model))
    # bfloat16 is either the dtype of the parameters or that of autocast, never both. float32 needs neither.
    needs_autocast = precision == "bfloat16" and not uses_bfloat16_parameters(train, precision)
    autocast = torch.bfloat16 if needs_autocast else None
    module = SummedLoss(model, autocast, compiles, context.float32_products, context.sequence)
    has_bfloat16_units = context.device.type == "cuda" or (precision == "bfloat16" and not context.float32_products)
    muon_dtype = torch.bfloat16 if has_bfloat16_units else torch.float32
    optimizer = make_optimizer(parameter_groups(model, train, multiples, matrices), train, muon_dtype)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=dict(context.deepspeed_config))
    limit_collectives(timedelta(seconds=context.task.launch.collective_timeout_seconds))
    if context.ranks == 1 and train.deepspeed.zero_stage == 0 and train.deepspeed.reduce_dtype == "float32":
        # DeepSpeed would copy all gradients to a buffer and back, although there is nothing to add them to.
        engine.enable_backward_allreduce = False
    return engine


def _checkpoint_activations(model: PreTrainedModel) -> None:
    """Enables activation checkpointing in the layers that the backward pass reaches; the others store nothing."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    # transformers makes the embeddings require gradients, which only reentrant checkpointing needs. Left on, the
    # backward pass would run through all frozen layers.
    model.disable_input_require_grads()
    for layer in decoder_layers(model)[: lowest_trainable_layer(model)]:
        assert isinstance(layer, GradientCheckpointingLayer)
        layer.gradient_checkpointing = False
