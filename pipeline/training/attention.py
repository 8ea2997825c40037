"""Causal attention within documents, for packed blocks, without a mask over all pairs of tokens.

With a mask, every query is compared to every key of its block, and the fast kernels cannot be used. Here the kernels
receive the bounds of documents instead: torch's variable-length attention on GPUs, and torch's flash kernel on CPUs,
one document at a time (or the full batch at once if every block is a single document). The cost is then quadratic in
the lengths of documents rather than of blocks.

Shape symbols: B batch, S sequence, H query heads, G key and value heads, D head size, N documents.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

import torch
from torch import nn
from torch.library import custom_op
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AttentionInterface, PretrainedConfig

from pipeline.config import Train
from pipeline.errors import UserError
from pipeline.models.families import FAMILIES
from pipeline.training.precision import Precision

DOCUMENTS: Literal["documents"] = "documents"  # the name of ``attend_by_document`` in transformers' registry
# Keyword arguments that a model's forward passes on to its attention function.
BOUNDS_KEYWORD, FLOAT32_KEYWORD = "document_bounds", "float32_products"
Attention = Literal["documents", "sdpa", "eager"]

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def resolve_attention(
    section: str, train: Train, config: PretrainedConfig, precision: Precision, device: torch.device
) -> Attention:
    """Resolves ``auto``: attention by document on CPUs if the model allows it, and else the fastest masked attention.

    On GPUs attention by document must be requested explicitly, since the interface of torch's kernel is not yet stable.

    Raises:
        UserError: attention by document is requested, and the model or the device does not support it.
    """
    unsupported_scores = _unsupported_scores(config)
    obstacle = unsupported_scores or _obstacle(train, config.get_text_config(), precision, device)
    if train.attention == "auto":
        by_document = obstacle is None and device.type == "cpu"
        return DOCUMENTS if by_document else "sdpa" if unsupported_scores is None else "eager"
    if train.attention == DOCUMENTS and obstacle:
        raise UserError(
            setting=f"{section}.attention", value=DOCUMENTS, rule=obstacle, remedy=f"Set {section}.attention=sdpa."
        )
    return train.attention


def _unsupported_scores(config: PretrainedConfig) -> str | None:
    """Returns what the kernels do not support in the model's scores (gemma 2 caps them, gpt-oss adds sinks)."""
    if getattr(config.get_text_config(), "attn_logit_softcapping", None):
        return "the model caps its attention scores, which the kernels do not support"
    if not MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._supports_sdpa:
        return "the model's attention is not the standard one that the kernels compute"
    return None


def _obstacle(train: Train, config: Any, precision: Precision, device: torch.device) -> str | None:
    """Returns why attention by document is not available for a model with standard scores, or None if it is."""
    if config.model_type not in FAMILIES:
        return "the model's family has no row in the table of families"
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True) and window < train.sequence_length:
        return f"the model's sliding window is {window} tokens, and blocks have {train.sequence_length}"
    if device.type == "cuda" and precision != "bfloat16":
        return f"on GPUs it requires bfloat16, and precision is {precision}"
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
    from torch.nn.attention.varlen import varlen_attn

    batch, heads, length, size = q.shape
    groups = heads // k.shape[1]
    # The kernel expects [tokens, heads, size] over all documents, and as many key heads as query heads.
    flat_q = q.transpose(1, 2).flatten(0, 1)
    flat_k, flat_v = (x.transpose(1, 2).flatten(0, 1).repeat_interleave(groups, dim=1) for x in (k, v))
    # window_size (-1, 0) is causal: unlimited to the left, nothing to the right. ``length`` bounds a document's length.
    out = varlen_attn(flat_q, flat_k, flat_v, bounds, bounds, length, length, scale=scale, window_size=(-1, 0))
    assert isinstance(out, torch.Tensor)
    return out.view(batch, length, heads, size)


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
    """Returns the gradients of query, key and value as [B, S, H or G, D]."""
    batch, _, length, _ = q.shape
    gradients = tuple(x.new_empty(batch, length, x.shape[1], x.shape[3]) for x in (q, k, v))
    for rows, tokens in _documents(bounds, batch, length):
        inputs = [x[rows, :, tokens] for x in (q, k, v)]
        document_grad, *outputs = (x[rows, tokens].transpose(1, 2) for x in (grad, out, lse))
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
