"""Cross entropy computed from hidden states in chunks, without storing the logits of the batch.

With a vocabulary of 128,000, the float32 logits of 8,192 tokens take four gigabytes, and their gradient another four.
The loss is therefore computed in chunks of tokens. The gradient of a chunk's logits is computed in their memory in the
forward pass, so that only one chunk of logits exists at any time. This is the fused linear cross entropy of Liger
(arXiv 2410.10989, section 3.2). The head is not applied to tokens without a target. ``torch.compile`` can fuse the
pointwise operations of a chunk.

Shape suffixes: N supervised tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from pipeline.models.forward import LogitTransform, packed_mask
from pipeline.training.attention import (
    BOUNDS_KEYWORD,
    DOCUMENTS,
    FLEX,
    FLOAT32_KEYWORD,
    MASKS_KEYWORD,
    block_masks,
    window_sizes,
)
from pipeline.training.batches import TokenIndices
from pipeline.training.compilation import compile_function
from pipeline.training.precision import chunk_rows
from pipeline.training.sequence_parallel import ALONE, SequenceGroup

ChunkLoss = Callable[[torch.Tensor, torch.Tensor, LogitTransform, bool], tuple[torch.Tensor, torch.Tensor | None]]


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Computes the sum over tokens of -log softmax(x_NH w_VHᵀ + b_V)[target].

    The forward pass computes the gradients as well, while a chunk's logits exist. The backward pass only scales them by
    the incoming gradient, which is a scalar, in place. It can therefore run only once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_NH: torch.Tensor,
        w_VH: torch.Tensor,
        b_V: torch.Tensor | None,
        targets_N: torch.Tensor,
        transform: LogitTransform,
        training: bool,
        chunk_loss: ChunkLoss,
    ) -> torch.Tensor:
        needs_x, needs_w, needs_b = (training and needed for needed in ctx.needs_input_grad[:3])
        dx_NH = torch.empty_like(x_NH) if needs_x else None
        # The weight's gradient is summed over chunks, which bfloat16 would round each time.
        dw_VH = torch.zeros_like(w_VH, dtype=_accumulation_dtype(w_VH.dtype)) if needs_w else None
        db_V = torch.zeros_like(b_V, dtype=_accumulation_dtype(b_V.dtype)) if needs_b and b_V is not None else None
        total = torch.zeros((), dtype=_accumulation_dtype(x_NH.dtype), device=x_NH.device)
        for chunk in _chunks(x_NH, w_VH, transform):
            x, targets = x_NH[chunk], targets_N[chunk]
            loss, dlogits = chunk_loss(linear(x, w_VH, b_V), targets, transform, needs_x or needs_w or needs_b)
            total += loss.sum()
            if dlogits is None:
                continue
            if db_V is not None:
                db_V += dlogits.sum(dim=0)
            dlogits = dlogits.to(x.dtype)  # the products below run in the dtype of compute
            if dx_NH is not None:
                dx_NH[chunk] = dlogits @ w_VH
            if dw_VH is not None:
                _add_product(dw_VH, dlogits.T, x)
        ctx.save_for_backward(dx_NH, dw_VH, db_V)
        ctx.weight_dtype = w_VH.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grad_outputs
        dx_NH, dw_VH, db_V = ctx.saved_tensors
        dx = None if dx_NH is None else dx_NH.mul_(grad.to(dx_NH.dtype))
        dw = None if dw_VH is None else dw_VH.mul_(grad).to(ctx.weight_dtype)
        db = None if db_V is None else db_V.mul_(grad).to(ctx.weight_dtype)
        return dx, dw, db, None, None, None, None


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Adds ``left @ right`` to ``total``, which may be wider. On GPUs the product is not stored."""
    if total.device.type != "cuda":
        total += left @ right  # addmm_ would add in another order than earlier versions did
    elif total.dtype == left.dtype:
        total.addmm_(left, right)
    elif _adds_to_float32(total.device):
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += torch.mm(left, right, out_dtype=total.dtype)


@cache
def _adds_to_float32(device: torch.device) -> bool:
    """Returns whether torch can add a product in bfloat16 to a matrix in float32, which older versions refuse."""
    total, part = torch.zeros(16, 16, device=device), torch.zeros(16, 16, dtype=torch.bfloat16, device=device)
    try:
        torch.addmm(total, part, part, out_dtype=total.dtype, out=total)
    except RuntimeError:
        return False
    return True


def _chunks(x_NH: torch.Tensor, w_VH: torch.Tensor, transform: LogitTransform) -> Iterator[slice]:
    """Yields the rows of the tokens whose logits are in memory at once."""
    size = chunk_rows(x_NH.device.type, w_VH.shape[0], transform.softcap is not None)
    for start in range(0, x_NH.shape[0], size):
        yield slice(start, start + size)


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def loss_and_gradient(
    logits: torch.Tensor, targets: torch.Tensor, transform: LogitTransform, needs_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns the loss of every token of one chunk, [n], and the gradient of their sum by the head's output.

    Args:
        logits: the head's output [n, V]. It is overwritten: the softmax and the gradient are computed in its memory.
        targets: [n].
        transform: of the logits before the softmax.
        needs_gradient: whether to compute the gradient [n, V].
    """
    logits = logits.to(_accumulation_dtype(logits.dtype))
    if transform.scale != 1.0:
        logits.mul_(transform.scale)
    slope = None
    if transform.softcap is not None:
        logits.div_(transform.softcap).tanh_()
        slope = 1.0 - logits.square() if needs_gradient else None  # of cap * tanh(x / cap)
        logits.mul_(transform.softcap)
    logits.sub_(logits.amax(dim=1, keepdim=True))  # so that exp cannot overflow
    picked = logits.gather(1, targets[:, None])  # a copy, since exp_ overwrites the logits
    exponentials = logits.exp_()
    sums = exponentials.sum(dim=1, keepdim=True)
    loss = (sums.log() - picked).squeeze(1)
    if not needs_gradient:
        return loss, None
    # d loss / d logits = scale * (softmax - one_hot(target)), times the slope of the soft cap.
    gradient = exponentials.mul_(transform.scale / sums)
    gradient.scatter_add_(1, targets[:, None], torch.full_like(picked, -transform.scale))
    return loss, gradient if slope is None else gradient.mul_(slope)


def compiled_chunk_loss() -> ChunkLoss:
    """Returns ``loss_and_gradient`` compiled, which reads and writes the logits fewer times."""
    return compile_function(loss_and_gradient)


def chunked_cross_entropy(
    x_NH: torch.Tensor,
    w_VH: torch.Tensor,
    targets_N: torch.Tensor,
    transform: LogitTransform | None = None,
    chunk_loss: ChunkLoss = loss_and_gradient,
    b_V: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns the summed cross entropy of N tokens, a scalar in float32 (float64 for float64 input).

    Its value and gradients equal those of ``cross_entropy(linear(x_NH, w_VH, b_V), targets_N, reduction="sum")``.
    """
    # Inside a Function's forward, gradients are always disabled, and ``needs_input_grad`` ignores ``no_grad``.
    training = torch.is_grad_enabled()
    transform = transform or LogitTransform()
    total: torch.Tensor = _ChunkedCrossEntropy.apply(x_NH, w_VH, b_V, targets_N, transform, training, chunk_loss)
    return total


@torch.no_grad()
def cross_entropies(
    x_NH: torch.Tensor,
    w_VH: torch.Tensor,
    targets_N: torch.Tensor,
    transform: LogitTransform,
    chunk_loss: ChunkLoss,
    b_V: torch.Tensor | None,
) -> torch.Tensor:
    """Returns the cross entropy of each of N tokens, [N], computed in the chunks of ``chunked_cross_entropy``."""
    losses_N = torch.empty(len(targets_N), dtype=_accumulation_dtype(x_NH.dtype), device=x_NH.device)
    for chunk in _chunks(x_NH, w_VH, transform):
        losses_N[chunk], _ = chunk_loss(linear(x_NH[chunk], w_VH, b_V), targets_N[chunk], transform, False)
    return losses_N


class SummedLoss(nn.Module):
    """A causal language model whose output is the summed loss of its supervised tokens.

    Args:
        model: a transformers causal language model.
        autocast: the dtype of autocast, if it differs from that of the parameters.
        compiled: whether the model's layers are compiled. The loss of a chunk is then compiled too.
        float32_products: compute the products of the head and of attention on the float32 units; see
            ``pipeline.models.matrix_products``.
        sequence: the ranks that share sequences with this one. The output is then the loss of this rank's targets.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        autocast: torch.dtype | None = None,
        compiled: bool = False,
        float32_products: bool = False,
        sequence: SequenceGroup = ALONE,
    ) -> None:
        super().__init__()
        self.model = model
        self._compiled = compiled
        self._chunk_loss = compiled_chunk_loss() if compiled else loss_and_gradient
        self._float32_products = float32_products
        config = model.config.get_text_config()
        self._transform = LogitTransform.from_config(config)
        self._attention = config._attn_implementation
        self._windows = window_sizes(model.config)
        self._autocast = autocast
        self._sequence = sequence

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, indices: TokenIndices, by_sequence: bool = False
    ) -> torch.Tensor:
        """Returns the summed loss, a scalar, or that of every sequence, [batch] in float64.

        Args:
            input_ids: [batch, tokens], the sequences or this rank's part of them.
            position_ids: [batch, sequence]. Positions restart at 0 in every document.
            indices: of targets and documents. Computed from a mask on a GPU, they would make the host wait for it.
            by_sequence: sum over each sequence alone. There are no gradients then.
        """
        # Attention by document needs no mask and receives the bounds of documents instead, and flex_attention pairs of
        # blocks.
        keywords: dict[str, Any] = {"attention_mask": None}
        if self._attention == FLEX:
            keywords[MASKS_KEYWORD] = block_masks(position_ids, self._windows)
        elif self._attention == DOCUMENTS:
            if self._compiled:  # otherwise layers are recompiled for every number of documents in a batch
                torch._dynamo.mark_dynamic(indices.bounds, 0)
            keywords |= {BOUNDS_KEYWORD: indices.bounds, FLOAT32_KEYWORD: self._float32_products}
        else:
            keywords["attention_mask"] = packed_mask(self.model, position_ids)
        is_cast = self._autocast is not None
        with torch.autocast(input_ids.device.type, dtype=self._autocast) if is_cast else nullcontext():
            own = self._sequence.part(position_ids)
            output = self.model.base_model(input_ids=input_ids, position_ids=own, use_cache=False, **keywords)
            x_NH = output.last_hidden_state.flatten(0, 1).index_select(0, indices.predicting)
            head = self.model.get_output_embeddings()
            weight, bias = head.weight, getattr(head, "bias", None)
            if self._float32_products:
                x_NH, weight, bias = x_NH.float(), weight.float(), None if bias is None else bias.float()
            arguments = (x_NH, weight, indices.targets, self._transform, self._chunk_loss, bias)
            if not by_sequence:
                return chunked_cross_entropy(*arguments)
            # Not index_add, whose order of summation varies on GPUs.
            losses = torch.zeros(input_ids.numel(), dtype=torch.float64, device=input_ids.device)
            losses[indices.predicting] = cross_entropies(*arguments).double()
            return losses.view(input_ids.shape).sum(dim=1)
