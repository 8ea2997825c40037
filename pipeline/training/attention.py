"""Causal attention inside documents: packed blocks without a mask over all pairs of tokens.

A mask makes every query look at every key of its block and keeps the fast kernels away. Here the documents' bounds go
to the kernel itself: on GPUs to torch's variable-length attention, on CPUs to torch's flash kernel, one document after
another (the whole batch at once where no block holds more than one). The work is then quadratic in the lengths of
documents, not of blocks.

Letters in shapes: B batch, S sequence, H query heads, G key and value heads, D head size, N documents.
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
from pipeline.training.precision import Precision

DOCUMENTS: Literal["documents"] = "documents"  # the name under which transformers finds the function below
# How these travel from the model's forward to its attention.
KEYWORD, FLOAT32_KEYWORD = "document_bounds", "float32_products"
Attention = Literal["documents", "sdpa", "eager"]

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def resolve_attention(
    section: str, train: Train, config: PretrainedConfig, precision: Precision, device: torch.device
) -> Attention:
    """``auto`` attends by document on CPUs where the model can, else as fast as it can with a mask.

    On GPUs attention by document has to be asked for: torch's kernel for it is young, and its arguments still change.

    Raises:
        UserError: attention by document is asked for and cannot be had.
    """
    unknown_terms = _unknown_terms(config)
    obstacle = unknown_terms or _obstacle(train, config.get_text_config(), precision, device)
    if train.attention == "auto":
        by_document = obstacle is None and device.type == "cpu"
        return DOCUMENTS if by_document else "sdpa" if unknown_terms is None else "eager"
    if train.attention == DOCUMENTS and obstacle:
        raise UserError(
            setting=f"{section}.attention", value=DOCUMENTS, rule=obstacle, remedy=f"Say {section}.attention=sdpa."
        )
    return train.attention


def _unknown_terms(config: PretrainedConfig) -> str | None:
    """What the model's scores have that no kernel knows (gemma 2 caps them, gpt-oss adds sinks)."""
    if getattr(config.get_text_config(), "attn_logit_softcapping", None):
        return "the model caps its attention scores, which the kernels cannot"
    if not MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._supports_sdpa:
        return "the model's attention is not the plain one that the kernels compute"
    return None


def _obstacle(train: Train, config: Any, precision: Precision, device: torch.device) -> str | None:
    """Why attention by document cannot be had where the scores are plain."""
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True) and window < train.sequence_length:
        return f"the model's layers see {window} tokens back, and blocks have {train.sequence_length}"
    if device.type == "cuda" and precision != "bfloat16":
        return f"on GPUs it computes in bfloat16, and precision is {precision}"
    return None


def document_bounds(position_ids: torch.Tensor) -> torch.Tensor:
    """Where documents start in the flattened batch, and its end: int32 [N + 1]. Positions are [B, S]."""
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
    """transformers' attention interface: query [B, H, S, D], key and value [B, G, S, D], result [B, S, H, D]."""
    assert attention_mask is None and dropout == 0.0
    assert others.get("softcap") is None and others.get("s_aux") is None
    assert (window := others.get("sliding_window")) is None or window >= query.shape[2]
    bounds = others.get(KEYWORD)
    if bounds is None:  # stablelm's layers hand on nothing that they do not know
        bounds = document_bounds(others["position_ids"])
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key = query.to(value.dtype), key.to(value.dtype)  # autocast leaves what was rotated in float32
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
    flat_q = q.transpose(1, 2).flatten(0, 1)
    flat_k, flat_v = (x.transpose(1, 2).flatten(0, 1).repeat_interleave(groups, dim=1) for x in (k, v))
    out = varlen_attn(flat_q, flat_k, flat_v, bounds, bounds, length, length, scale=scale, window_size=(-1, 0))
    assert isinstance(out, torch.Tensor)
    return out.view(batch, length, heads, size)


# --------------------------------------------------------------------------------------------- CPU


def _documents(bounds: torch.Tensor, batch: int, length: int) -> list[tuple[slice, slice]]:
    """(rows, tokens) of every call to the kernel: all rows at once where each is a single document."""
    if len(bounds) == batch + 1:
        return [(slice(0, batch), slice(0, length))]
    places = bounds.tolist()
    rows = [(start // length, start, end) for start, end in pairwise(places)]
    return [(slice(row, row + 1), slice(a - row * length, b - row * length)) for row, a, b in rows]


@custom_op("pipeline::attend_by_document", mutates_args=(), device_types="cpu")
def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the result [B, S, H, D] and the logarithms of the softmax's sums [B, S, H]."""
    batch, heads, length, size = q.shape
    out = q.new_empty(batch, length, heads, size)
    sums = q.new_empty(batch, length, heads, dtype=torch.promote_types(q.dtype, torch.float32))
    for rows, tokens in _documents(bounds, batch, length):
        part = [x[rows, :, tokens] for x in (q, k, v)]
        result, logarithms = _flash(*part, is_causal=True, scale=scale)
        out[rows, tokens] = result.transpose(1, 2)
        sums[rows, tokens] = logarithms.transpose(1, 2)
    return out, sums


@_attend.register_fake
def _(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, length, size = q.shape
    sums = q.new_empty(batch, length, heads, dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(batch, length, heads, size), sums


@custom_op("pipeline::attend_by_document_backward", mutates_args=(), device_types="cpu")
def _attend_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    out: torch.Tensor, sums: torch.Tensor, bounds: torch.Tensor, scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of query, key and value, laid out as [B, S, H or G, D]."""
    batch, _, length, _ = q.shape
    gradients = tuple(x.new_empty(batch, length, x.shape[1], x.shape[3]) for x in (q, k, v))
    for rows, tokens in _documents(bounds, batch, length):
        part = [x[rows, :, tokens] for x in (q, k, v)]
        done = [x[rows, tokens].transpose(1, 2) for x in (grad, out, sums)]
        found = _flash_backward(done[0], *part, *done[1:], 0.0, True, scale=scale)
        for gradient, value in zip(gradients, found, strict=True):
            gradient[rows, tokens] = value.transpose(1, 2)
    return gradients[0], gradients[1], gradients[2]


@_attend_backward.register_fake
def _(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    out: torch.Tensor, sums: torch.Tensor, bounds: torch.Tensor, scale: float,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    return tuple(x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]) for x in (q, k, v))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, bounds, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, bounds, *output)


def _backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    q, k, v, bounds, out, sums = ctx.saved_tensors
    gradients = _attend_backward(grad, q, k, v, out, sums, bounds, ctx.scale)
    return (*(gradient.transpose(1, 2) for gradient in gradients), None, None)


_attend.register_autograd(_backward, setup_context=_save)
