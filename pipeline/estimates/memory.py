"""Estimates the memory that training takes on one device, by component.

What the backward pass needs of one decoder layer, in bytes per token, with h the hidden size, a = heads · head size,
f the MLP's units, S the sequence length and c the bytes of a number in compute:

    each norm             4·h  its input in float32, and c·h twice if weights train: before and after its scale
    attention             4·c·a  queries, keys, values and output, 4·heads  the softmax's sums; keys and values are
                          repeated for every head, except by document on CPUs (on GPUs torch 2.11 repeats them
                          there too); with sdpa also c·S  the mask
    MLP                   3·c·f  gate, its activation and up (1 without a gate), and c·f their product if weights train
    k experts per token   c·k·h  their outputs, and c·k·h their inputs, which are sorted by expert, if weights train

Ranks that share sequences divide the tokens. Their attention stores keys and values of at least one head per rank, and
its output once more if weights train, c·a, since before the all-to-all it is the output for other tokens.

Layers below the lowest one that trains store nothing. With activation checkpointing a layer stores only its input, c·h,
and one layer at a time stores everything. The gradients of the current layer take as much as it stores. What a ZeRO
stage partitions is divided by the number of devices. At ZeRO 3, the second copy of the parameters that hpZ keeps is
divided by ``hpz_partition_size``.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from pipeline.config import Train
from pipeline.estimates.sizes import Trained
from pipeline.models.families import LayerShape, Shape
from pipeline.training.deepspeed_config import deepspeed_config, uses_bfloat16_parameters
from pipeline.training.precision import BYTES, Precision, checkpoint_bytes, chunk_rows

FLOAT32_BYTES = 4
ZERO3_LIVE = 1_000_000_000  # DeepSpeed's default number of parameters that stay gathered
ZERO3_PREFETCH = 50_000_000


@dataclass(frozen=True)
class Setup:
    """How a model is trained, as far as it affects memory.

    Attributes:
        ranks: devices, all nodes together.
        on_gpu: whether training runs on GPUs, where buffers take memory even before they are used.
    """

    train: Train
    precision: Precision
    ranks: int
    on_gpu: bool

    @property
    def deepspeed(self) -> dict[str, Any]:
        """DeepSpeed's configuration, overrides included."""
        return deepspeed_config(self.train, self.precision, self.ranks, self.on_gpu)

    @property
    def zero(self) -> dict[str, Any]:
        """DeepSpeed's configuration of ZeRO."""
        zero: dict[str, Any] = self.deepspeed["zero_optimization"]
        return zero

    @property
    def tokens(self) -> int:
        """Tokens per micro-batch that one rank computes."""
        return self.train.micro_batch * self.train.sequence_length // self.train.sequence_parallel

    @property
    def groups(self) -> int:
        """Groups of ranks that share sequences."""
        return self.train.groups_of(self.ranks)

    @property
    def width(self) -> int:
        """Bytes per number in compute."""
        return BYTES[self.precision]

    @property
    def weight_width(self) -> int:
        """Bytes per weight."""
        return BYTES[self.precision] if uses_bfloat16_parameters(self.train, self.precision) else FLOAT32_BYTES

    def with_train(self, **changes: Any) -> Setup:
        """Returns a copy with changed settings of the training section."""
        return replace(self, train=self.train.model_copy(update=changes))


@dataclass(frozen=True)
class Memory:
    """Peak memory of one device in bytes, by component."""

    weights: int
    gradients: int
    optimizer: int  # float32 master weights, two moments, averages, multiples of the learning rate
    activations: int
    logits: int  # with the loss and the gradient of the head
    buckets: int
    staging: int  # what a rank writes of a checkpoint; in the host's memory, so that it only counts on CPUs

    @property
    def total(self) -> int:
        """The sum of all components."""
        return sum(getattr(self, field.name) for field in fields(self))


def memory_of(trained: Trained, setup: Setup) -> Memory:
    """Estimates the peak memory of one device during training."""
    return Memory(
        weights=_weights(trained, setup),
        gradients=_gradients(trained, setup),
        optimizer=_optimizer(trained, setup),
        activations=_activations(trained, setup),
        logits=_logits(trained, setup),
        buckets=_buckets(trained, setup),
        staging=_staging(trained, setup),
    )


# ------------------------------------------------------------------------------------ partitioned by ZeRO


def _weights(trained: Trained, setup: Setup) -> int:
    total = trained.shape.parameters * setup.weight_width
    if setup.zero["stage"] < 3:
        return total + _cast_copies(trained, setup)
    live = setup.zero.get("stage3_max_live_parameters", ZERO3_LIVE)
    live += setup.zero.get("stage3_prefetch_bucket_size", ZERO3_PREFETCH)
    gathered = min(trained.shape.parameters, live) * setup.weight_width
    if "offload_param" in setup.zero:
        return gathered
    copy = setup.zero.get("zero_hpz_partition_size", 1)  # ranks that hold the second copy of hpZ
    return gathered + total // setup.ranks + (total // copy if copy > 1 else 0)


def _cast_copies(trained: Trained, setup: Setup) -> int:
    """Autocast's copies of float32 weights, which are kept for the layers that the backward pass reaches."""
    if setup.weight_width == setup.width:
        return 0
    return setup.width * sum(layer.parameters for layer in trained.shape.layers[trained.lowest :])


def _gradients(trained: Trained, setup: Setup) -> int:
    total = trained.parameters * FLOAT32_BYTES
    return total if setup.zero["stage"] < 2 else total // setup.ranks


def _optimizer(trained: Trained, setup: Setup) -> int:
    # Muon has one moment where AdamW has two, and the update during the step takes the place of the other.
    # Tensors with several rates also need a multiple of every element, and a copy of their weights during the step.
    numbers = 2 * trained.parameters + 2 * trained.with_several_rates(setup.train.role_learning_rates)
    if setup.train.ema_decay is not None:
        numbers += trained.parameters
    if setup.zero["stage"] == 0:
        return FLOAT32_BYTES * numbers  # the float32 weights are the master weights themselves
    return 0 if "offload_optimizer" in setup.zero else FLOAT32_BYTES * (numbers + trained.parameters) // setup.ranks


def _buckets(trained: Trained, setup: Setup) -> int:
    largest = trained.shape.largest_layer
    config = deepspeed_config(setup.train, setup.precision, setup.ranks, setup.on_gpu, largest)
    zero = config["zero_optimization"]
    if zero["stage"] == 0:
        return 0
    bucket = int(zero["reduce_bucket_size"])
    if not setup.on_gpu:
        return FLOAT32_BYTES * min(bucket, trained.parameters)
    # DeepSpeed fills one while it reduces the other. At ZeRO 2 both are in compute precision, and what is being reduced
    # is copied to float32, which takes as much.
    doubled = zero.get("overlap_comm", False) and zero["stage"] < 3
    return FLOAT32_BYTES * bucket * (2 if doubled else 1)


def _staging(trained: Trained, setup: Setup) -> int:
    steps = setup.train.steps
    if setup.on_gpu or (steps is not None and steps <= setup.train.checkpoint_every_steps):
        return 0  # the last checkpoint needs no copy
    return checkpoint_bytes(trained.parameters, setup.train.ema_decay is not None) // setup.ranks


# ------------------------------------------------------------------------ stored between forward and backward


def _activations(trained: Trained, setup: Setup) -> int:
    layers = list(enumerate(trained.shape.layers))[trained.lowest :]
    sizes = [_layer(trained, setup, layer, trained.inside(index)) for index, layer in layers]
    current = max(sizes, default=0)  # the gradients of one layer take as much as it stores
    if setup.train.activation_checkpointing:
        return len(sizes) * setup.tokens * setup.width * trained.shape.hidden_size + 2 * current
    return sum(sizes) + current


def _layer(trained: Trained, setup: Setup, layer: LayerShape, names: frozenset[str]) -> int:
    """Bytes that one layer stores for the backward pass."""
    shape, width, units = trained.shape, setup.width, layer.mlp_units(trained.shape.hidden_size)
    trains = not names <= layer.norms
    norms = sum(name.endswith("weight") and layer.tensors[name] == (shape.hidden_size,) for name in layer.norms)
    mlp = width * units * ((3 if layer.is_gated else 1) + trains)
    mlp += width * layer.experts_per_token * shape.hidden_size * (1 + trains)
    attention = _attention(shape, setup, trains)
    return setup.tokens * (norms * shape.hidden_size * (FLOAT32_BYTES + 2 * width * trains) + attention + mlp)


def _attention(shape: Shape, setup: Setup, trains: bool) -> int:
    """Bytes per token that the attention of one layer stores."""
    queries, parts = shape.heads * shape.head_size, setup.train.sequence_parallel
    without_mask = setup.train.attention in ("auto", "documents", "flex")
    keys = max(shape.key_size, parts * shape.head_size) if without_mask and not setup.on_gpu else queries
    mask = 0 if without_mask else setup.width * setup.train.sequence_length
    exchanged = queries if parts > 1 and trains else 0
    return setup.width * (2 * (queries + keys) + exchanged) + FLOAT32_BYTES * shape.heads + mask


def _logits(trained: Trained, setup: Setup) -> int:
    """Bytes of a chunk of logits in compute precision and float32, the hidden states with their gradient, and the
    gradient of the head in float32 and in compute precision."""
    shape = trained.shape
    rows = min(chunk_rows("cuda" if setup.on_gpu else "cpu", shape.vocab_size), setup.tokens)
    chunk = rows * shape.vocab_size * (FLOAT32_BYTES + (setup.width if setup.width < FLOAT32_BYTES else 0))
    hidden = setup.tokens * shape.hidden_size * (FLOAT32_BYTES + 2 * setup.width)
    head = shape.head_entries * (FLOAT32_BYTES + setup.width) if trained.head_trains else 0
    return chunk + hidden + head
