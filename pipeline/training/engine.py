"""From a model directory to a DeepSpeed engine: one explicit dtype, torch's AdamW, compiled only where asked."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations import HfDeepSpeedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from pipeline.config import Train
from pipeline.models.tensors import DTYPES
from pipeline.models.vector_math import settle_vector_math
from pipeline.training.attention import resolve_attention
from pipeline.training.deepspeed_config import uses_bfloat16_parameters
from pipeline.training.float32_products import use_float32_products
from pipeline.training.freeze import decoder_layers, lowest_trainable_layer
from pipeline.training.loss import SummedLoss
from pipeline.training.optimizer import make_adamw, parameter_groups
from pipeline.training.precision import Precision


def start_distributed() -> torch.device:
    """Joins the process group that torchrun describes and returns this rank's device."""
    # Moments of silent units decay into numbers so small that processors take many times as long over them. Before
    # the first tensor, for the setting is a thread's own and later threads inherit it.
    torch.set_flush_denormal(True)
    settle_vector_math()
    # DeepSpeed would compile a shared-memory collective here that only its inference uses.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    on_gpu = os.environ["DS_ACCELERATOR"] == "cuda"
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    # While rank 0 hashes, saves or writes a large model on a slow disk the others wait in a collective; DeepSpeed gives
    # them ten minutes. A dead rank is found by the launcher and the driver, within a minute.
    patience = timedelta(hours=6)
    deepspeed.init_distributed(dist_backend="nccl" if on_gpu else "gloo", verbose=False, timeout=patience)
    return device


def load_model(
    section: str, model_dir: Path, train: Train, precision: Precision, device: torch.device, config: Mapping[str, Any]
) -> PreTrainedModel:
    """The causal language model in the dtype that its parameters will have, on the CPU still.

    At ZeRO 3 every rank gets its slices while loading, so that no rank ever holds the whole model.

    Raises:
        UserError: ``attention`` is one that the model cannot have.
    """
    attention = resolve_attention(section, train, AutoConfig.from_pretrained(model_dir), precision, device)
    print(f"attention: {attention} ({section}.attention={train.attention})", flush=True)
    zero3 = HfDeepSpeedConfig(dict(config)) if config["zero_optimization"]["stage"] == 3 else None
    dtype = DTYPES[precision] if uses_bfloat16_parameters(train, precision) else torch.float32
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, attn_implementation=attention)
    del zero3  # transformers holds it weakly; it must live until here and not touch the next model
    return model.train()


def start_engine(
    section: str, model: PreTrainedModel, train: Train, precision: Precision, config: Mapping[str, Any]
) -> deepspeed.DeepSpeedEngine:
    """Wraps the model, frozen as it is to stay, into the engine that computes ``SummedLoss``."""
    if train.activation_checkpointing:
        _checkpoint_activations(model)
    if train.float32_products:
        use_float32_products(decoder_layers(model))
    if train.compile:
        _compile_layers(model)
    autocast = None if uses_bfloat16_parameters(train, precision) else DTYPES[precision]
    autocast = None if autocast == torch.float32 else autocast
    module = SummedLoss(model, autocast, train.compile, train.float32_products)
    optimizer = make_adamw(parameter_groups(section, model, train), train)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=dict(config))
    return engine


def _compile_layers(model: PreTrainedModel) -> None:
    """Compiles layers one by one; they share their variants: frozen or not, reached by gradients or not."""
    torch._dynamo.config.recompile_limit = 32  # all layers count together, in training and in evaluation
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # it would go on uncompiled, and say nothing
    for layer in decoder_layers(model):
        layer.compile(dynamic=False)


def _checkpoint_activations(model: PreTrainedModel) -> None:
    """Recomputes layers in the backward pass, but only those that it reaches; below, nothing is stored anyway."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.disable_input_require_grads()  # transformers lets embeddings ask for gradients, which only reentrant needs
    for layer in decoder_layers(model)[: lowest_trainable_layer(model)]:
        assert isinstance(layer, GradientCheckpointingLayer)
        layer.gradient_checkpointing = False
