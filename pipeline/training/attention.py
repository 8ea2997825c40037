"""Causal attention within documents, for packed blocks, without a mask over all pairs of tokens.

With a mask, every query is compared to every key of its block, and the fast kernels cannot be used. There are two ways
without one, whose cost is quadratic in the lengths of documents rather than of blocks:

- ``documents``: the kernels receive the bounds of documents. These are torch's variable-length attention on GPUs, and
  torch's flash kernel on CPUs, one document at a time (or the full batch at once if every block is a single document).
- ``flex``: ``torch.nn.attention.flex_attention`` receives the pairs of blocks of 128 queries and keys that see each
  other. It supports sliding windows, capped scores and attention sinks too. On CPUs it has no backward pass.

Only these two can be computed by ranks that share sequences (``share_sequences``): a mask over all pairs of tokens of a
long sequence would not fit.

Shape symbols: B batch, S sequence, H query heads, G key and value heads, D head size, N documents.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Collection, Mapping
from functools import cache
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import nn
from torch.library import custom_op
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from torch.nn.attention.varlen import varlen_attn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AttentionInterface, PretrainedConfig

from pipeline.config import Train
from pipeline.errors import UserError
from pipeline.launch.environment import missing_for_compilation
from pipeline.models.families import FAMILIES
from pipeline.training.attention_support import (
    NO_BACKWARD_PASS,
    UNKNOWN_FAMILY,
    dropout_obstacle,
    needs_no_mask,
    obstacle_to_documents,
)
from pipeline.training.precision import Precision
from pipeline.training.sequence_parallel import ALONE, SequenceGroup

# The names of ``attend_by_document`` and ``attend_by_block`` in transformers' registry.
DOCUMENTS: Literal["documents"] = "documents"
FLEX: Literal["flex"] = "flex"
# Keyword arguments that a model's forward passes on to its attention function.
BOUNDS_KEYWORD, FLOAT32_KEYWORD, MASKS_KEYWORD = "document_bounds", "float32_products", "block_masks"
Attention = Literal["documents", "flex", "sdpa", "eager"]
AttentionFunction = Callable[..., tuple[torch.Tensor, None]]  # with the signature that transformers expects
# Whether several query heads may share a key head, which torch 2.11 does not support.
VARLEN_SHARES_KEYS = "enable_gqa" in inspect.signature(varlen_attn).parameters
LARGEST_HEAD = 256  # of the flash kernels on GPUs
BLOCK = 128  # queries, and keys, that flex_attention skips together

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def resolve_attention(
    section: str, train: Train, config: PretrainedConfig, precision: Precision, device: torch.device
) -> Attention:
    """Resolves ``auto``: by document, or else with flex_attention on GPUs, or else the fastest masked attention.

    Raises:
        UserError: an attention without a mask is requested, or needed to share sequences, and the model or the device
            does not support it.
    """
    text = config.get_text_config()
    obstacles: dict[Attention, str | None] = {
        DOCUMENTS: obstacle_to_documents(text.to_dict(), train.sequence_length)
        or _gpu_obstacle(text, precision, device),
        FLEX: _flex_obstacle(config, device),
    }
    masked: Attention = "sdpa" if _has_plain_scores(config) else "eager"
    if train.attention == "auto":
        chosen = next((name for name, obstacle in obstacles.items() if obstacle is None), masked)
        if chosen == masked and train.sequence_parallel > 1:
            raise UserError(
                setting=f"{section}.sequence_parallel",
                value=train.sequence_parallel,
                rule=needs_no_mask(obstacles),
                remedy=f"Set {section}.sequence_parallel=1.",
            )
        if chosen == masked and device.type == "cuda":
            print(f"attention compares all pairs of tokens, since flex_attention does not work: {obstacles[FLEX]}")
        return chosen
    obstacle = obstacles.get(train.attention)
    if obstacle is not None:
        raise UserError(
            setting=f"{section}.attention",
            value=train.attention,
            rule=obstacle,
            remedy=f"Set {section}.attention={masked}.",
        )
    return train.attention


def _flex_obstacle(config: PretrainedConfig, device: torch.device) -> str | None:
    """Returns why flex_attention is not available for a model, or None if it is."""
    if device.type != "cuda":
        return NO_BACKWARD_PASS
    if config.get_text_config().model_type not in FAMILIES:
        return UNKNOWN_FAMILY
    if (obstacle := dropout_obstacle(config.get_text_config().to_dict())) is not None:
        return obstacle
    if not MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._supports_flex_attn:
        return "the model's attention is not one that flex_attention computes"
    missing = missing_for_compilation(device.type, os.environ)
    return None if missing is None else missing[0]


def avoid_cudnn_attention(attention: Attention, device: torch.device) -> None:
    """Excludes cuDNN from the kernels of sdpa where sdpa may get a mask.

    Its backward pass can then return NaN (https://github.com/pytorch/pytorch/issues/196678).
    """
    if attention == "sdpa" and device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)


def _has_plain_scores(config: PretrainedConfig) -> bool:
    """Returns whether sdpa computes a model's scores: Gemma 2 caps them, gpt-oss adds sinks."""
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    return not capped and MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._supports_sdpa


def _gpu_obstacle(config: Any, precision: Precision, device: torch.device) -> str | None:
    """Returns why attention by document is not available on a GPU, or None if it is."""
    if device.type != "cuda":
        return None
    if precision != "bfloat16":
        return f"on GPUs it requires bfloat16, and precision is {precision}"
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if size > LARGEST_HEAD:
        return f"on GPUs, heads may have {LARGEST_HEAD} numbers, and the model's have {size}"
    return None


def document_bounds(position_ids: torch.Tensor) -> torch.Tensor:
    """Returns the start of every document in the flattened batch, and the batch's end, as int32 [N + 1].

    Args:
        position_ids: [B, S]. They are 0 at the first token of every document.
    """
    starts = (position_ids.flatten() == 0).nonzero().flatten()
    return torch.nn.functional.pad(starts, (0, 1), value=position_ids.numel()).to(torch.int32)


def attend_by_document(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Computes attention by document, with the signature of transformers' attention functions.

    Args:
        module: the attention layer; unused.
        query: [B, H, S, D].
        key: [B, G, S, D].
        value: [B, G, S, D].
        attention_mask: None; documents are separated by their bounds.
        scaling: of the scores; 1 / sqrt(D) by default.
        dropout: must be 0.
        others: ``BOUNDS_KEYWORD`` with [N + 1] bounds, or else ``position_ids``; ``FLOAT32_KEYWORD``; and options of
            other families, which ``resolve_attention`` has checked to have no effect.

    Returns:
        The output [B, S, H, D], and None in place of the attention weights.
    """
    assert attention_mask is None and dropout == 0.0
    assert others.get("softcap") is None and others.get("s_aux") is None
    assert (window := others.get("sliding_window")) is None or window >= query.shape[2]
    bounds = others.get(BOUNDS_KEYWORD)
    if bounds is None:  # stablelm's layers do not pass on unknown keyword arguments
        bounds = document_bounds(others["position_ids"])
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast, rotary embeddings return float32
    if query.device.type == "cuda":
        return _on_gpu(query, key, value, bounds, scale), None
    dtype = value.dtype
    if others.get(FLOAT32_KEYWORD, False):
        query, key, value = query.float(), key.float(), value.float()
    out, _ = _attend(query, key, value, bounds, scale)
    return out.to(dtype), None


AttentionInterface.register(DOCUMENTS, attend_by_document)


def _on_gpu(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor, scale: float) -> torch.Tensor:
    batch, heads, length, size = q.shape
    # The kernel expects [tokens, heads, size] over all documents.
    flat_q, flat_k, flat_v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    grouped: dict[str, Any] = {}
    if k.shape[1] < heads:
        if VARLEN_SHARES_KEYS:
            grouped = {"enable_gqa": True}
        else:
            flat_k, flat_v = (x.repeat_interleave(heads // k.shape[1], dim=1) for x in (flat_k, flat_v))
    # window_size (-1, 0) is causal: unlimited to the left, nothing to the right. ``length`` bounds a document's length.
    out = varlen_attn(
        flat_q, flat_k, flat_v, bounds, bounds, length, length, scale=scale, window_size=(-1, 0), **grouped
    )
    assert isinstance(out, torch.Tensor)
    return out.view(batch, length, heads, size)


# ---------------------------------------------------------------------------------- shared sequences


def share_sequences(group: SequenceGroup) -> None:
    """Makes attention without a mask compute with all ranks of a group, from now on in this process.

    The functions keep their names, since models are built, and inputs prepared, by these names.
    """
    for name, attend in ((DOCUMENTS, attend_by_document), (FLEX, attend_by_block)):
        AttentionInterface.register(name, attend if group == ALONE else _by_heads(attend, group))


def _by_heads(attend: AttentionFunction, group: SequenceGroup) -> AttentionFunction:
    """Returns an attention function whose inputs are a part of the tokens, and that computes a part of the heads."""

    def attend_together(
        module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: None, **others: Any
    ) -> tuple[torch.Tensor, None]:
        query, key = query.to(value.dtype), key.to(value.dtype)  # as ``attend`` does, but before they are exchanged
        sinks: torch.Tensor | None = others.get("s_aux")
        if sinks is not None:
            others["s_aux"] = sinks.chunk(group.ranks)[group.rank]
        if BOUNDS_KEYWORD not in others and MASKS_KEYWORD not in others:  # see ``attend_by_document``
            others["position_ids"] = group.gather(others["position_ids"])
        out, _ = attend(module, *map(group.to_heads, (query, key, value)), mask, **others)
        return group.to_tokens(out), None

    return attend_together


# ---------------------------------------------------------------------------------------------- flex


def window_sizes(config: PretrainedConfig) -> set[int | None]:
    """Returns the sliding windows, in tokens, that layers of a model may use. None is attention without a window."""
    return {None, getattr(config.get_text_config(), "sliding_window", None)}


def block_masks(position_ids: torch.Tensor, windows: Collection[int | None]) -> dict[int | None, BlockMask]:
    """Returns the blocks of queries and keys that see each other, for every sliding window.

    Neither a tensor over all pairs of tokens is created, nor does the host wait for the device.

    Args:
        position_ids: [B, S]. They are 0 at the first token of every document.
        windows: in tokens; None for none.
    """
    return {window: _block_mask(position_ids, window) for window in windows}


def _block_mask(position_ids: torch.Tensor, window: int | None) -> BlockMask:
    length = position_ids.shape[1]
    tokens = torch.arange(length, device=position_ids.device)
    lowest = tokens - position_ids  # the lowest key that a query sees, [B, S]: where its document begins
    if window is not None:
        lowest = torch.maximum(lowest, tokens - window + 1)

    def is_visible(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (k <= q) & (k >= lowest[b, q])

    # ``lowest`` never decreases, so the first query of a block sees the lowest key, and the last one the fewest. A last
    # block that is not complete never counts as completely visible.
    blocks = torch.arange(-(-length // BLOCK), device=position_ids.device)
    of_first = lowest[:, ::BLOCK, None]
    of_last = nn.functional.pad(lowest, (0, -length % BLOCK), value=length)[:, BLOCK - 1 :: BLOCK, None]
    visible = (blocks <= blocks[:, None]) & ((blocks + 1) * BLOCK > of_first)  # [B, blocks of queries, of keys]
    complete = (blocks < blocks[:, None]) & (blocks * BLOCK >= of_last)
    return BlockMask.from_kv_blocks(
        *_as_lists(visible & ~complete), *_as_lists(complete), BLOCK, is_visible, seq_lengths=(length, length)
    )


def _as_lists(pairs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns how many blocks of keys each block of queries sees [B, 1, n], and their numbers first in [B, 1, n, n]."""
    order = pairs.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return pairs.sum(-1, dtype=torch.int32)[:, None], order.to(torch.int32)[:, None]


def attend_by_block(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Computes attention with flex_attention, with the signature of transformers' attention functions.

    Args:
        module: the attention layer; unused.
        query: [B, H, S, D].
        key: [B, G, S, D].
        value: [B, G, S, D].
        attention_mask: None; documents are separated by the block masks.
        scaling: of the scores; 1 / sqrt(D) by default.
        dropout: must be 0.
        softcap: scores are limited to ±softcap by a tanh; None for no limit.
        s_aux: attention sinks [H]: scores of a key without a value, which only takes part in the softmax.
        sliding_window: how many keys a query sees, itself included; None for all of its document.
        others: ``MASKS_KEYWORD`` with the result of ``block_masks``, or else ``position_ids``.

    Returns:
        The output [B, S, H, D], and None in place of the attention weights.
    """
    assert attention_mask is None and dropout == 0.0
    masks: Mapping[int | None, BlockMask] | None = others.get(MASKS_KEYWORD)
    mask = _block_mask(others["position_ids"], sliding_window) if masks is None else masks[sliding_window]
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast, rotary embeddings return float32

    limit = softcap or 1.0

    def cap(score: torch.Tensor, b: Any, h: Any, q: Any, k: Any) -> torch.Tensor:
        return limit * torch.tanh(score / limit)

    out, statistics = _flex_kernel(query.device.type)(
        query, key, value, block_mask=mask, score_mod=None if softcap is None else cap, scale=scaling,
        enable_gqa=key.shape[1] < query.shape[1], return_aux=AuxRequest(lse=s_aux is not None),
    )  # fmt: skip
    if s_aux is not None:
        # The sink adds exp(s) to the sum of exponentials, whose logarithm is lse.
        share = torch.sigmoid(statistics.lse - s_aux.to(statistics.lse.dtype)[:, None])
        out = (out * share[..., None]).to(value.dtype)
    return out.transpose(1, 2), None


AttentionInterface.register(FLEX, attend_by_block)


def _flex_kernel(device_type: str) -> Callable[..., Any]:
    # Uncompiled, flex_attention computes all scores. In a compiled layer it is compiled with it.
    if torch.compiler.is_compiling() or device_type == "cpu":
        plain: Callable[..., Any] = flex_attention
        return plain
    return _compiled_flex_attention()


@cache
def _compiled_flex_attention() -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(flex_attention, dynamic=False)
    return compiled


# --------------------------------------------------------------------------------------------- CPU


def _documents(bounds: torch.Tensor, batch: int, length: int) -> list[tuple[slice, slice]]:
    """Returns (rows, tokens) of every call to the kernel: all rows at once if each is a single document."""
    # Every row starts a document, so as many documents as rows means one per row.
    if len(bounds) == batch + 1:
        return [(slice(0, batch), slice(0, length))]
    # Bounds count tokens of the flattened batch; tokens are counted within their row. No document crosses rows.
    rows = [(start // length, start, end) for start, end in pairwise(bounds.tolist())]
    return [(slice(row, row + 1), slice(a - row * length, b - row * length)) for row, a, b in rows]


# These are custom operators because torch.compile cannot trace loops whose length depends on data.


@custom_op("pipeline::attend_by_document", mutates_args=(), device_types="cpu")
def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the output [B, S, H, D] and the log-sum-exp of the scores [B, S, H], which the backward pass needs."""
    batch, heads, length, size = q.shape
    out = q.new_empty(batch, length, heads, size)
    # The kernel returns the log-sum-exp in at least float32, also for bfloat16 inputs.
    lse = q.new_empty(batch, length, heads, dtype=torch.promote_types(q.dtype, torch.float32))
    for rows, tokens in _documents(bounds, batch, length):
        part = [x[rows, :, tokens] for x in (q, k, v)]  # [rows, heads, tokens, D]; the kernel supports G < H
        document_out, document_lse = _flash(*part, is_causal=True, scale=scale)
        out[rows, tokens] = document_out.transpose(1, 2)
        lse[rows, tokens] = document_lse.transpose(1, 2)
    return out, lse


@_attend.register_fake
def _(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, length, size = q.shape
    lse = q.new_empty(batch, length, heads, dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(batch, length, heads, size), lse


@custom_op("pipeline::attend_by_document_backward", mutates_args=(), device_types="cpu")
def _attend_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    out: torch.Tensor, lse: torch.Tensor, bounds: torch.Tensor, scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Returns the gradients of query, key and value as [B, S, H or G, D].

    They are computed in at least float32. In bfloat16, the kernel's many small products are oneDNN's, which compiles
    code for every new length of a document. That takes longer (scripts/benchmarks/attention.py).
    """
    batch, _, length, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    gradients = tuple(x.new_empty(batch, length, x.shape[1], x.shape[3]) for x in (q, k, v))
    for rows, tokens in _documents(bounds, batch, length):
        inputs = [x[rows, :, tokens].to(wide) for x in (q, k, v)]
        document_grad, *outputs = (x[rows, tokens].transpose(1, 2).to(wide) for x in (grad, out, lse))
        # 0.0 and True: no dropout, causal.
        document_gradients = _flash_backward(document_grad, *inputs, *outputs, 0.0, True, scale=scale)
        for gradient, document_gradient in zip(gradients, document_gradients, strict=True):
            gradient[rows, tokens] = document_gradient.transpose(1, 2)
    return gradients[0], gradients[1], gradients[2]


@_attend_backward.register_fake
def _(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    out: torch.Tensor, lse: torch.Tensor, bounds: torch.Tensor, scale: float,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    return tuple(x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]) for x in (q, k, v))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, bounds, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, bounds, *output)


def _backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    q, k, v, bounds, out, lse = ctx.saved_tensors
    gradients = _attend_backward(grad, q, k, v, out, lse, bounds, ctx.scale)
    # From [B, S, heads, D] to the inputs' [B, heads, S, D]. The bounds and the scale have no gradients.
    return (*(gradient.transpose(1, 2) for gradient in gradients), None, None)


_attend.register_autograd(_backward, setup_context=_setup_context)
