"""Cross entropy from hidden states, without the logits of the batch.

A vocabulary of 128 000 makes the float32 logits of 8 192 tokens four gigabytes, and their gradient four more. Here
the head is applied to a few hundred supervised tokens at a time and the gradient is taken at once, in place, so
that only one chunk of logits ever lives. The idea is Liger's fused linear cross entropy (arXiv 2410.10989,
section 3.2). Tokens without a target never meet the head. ``torch.compile`` fuses a chunk's small operations.

Letters in shapes: N supervised tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from pipeline.training.attention import DOCUMENTS, FLOAT32_KEYWORD, KEYWORD, document_bounds
from pipeline.training.precision import CHUNK_LOGITS


@dataclass(frozen=True)
class LogitRule:
    """What a family does to the head's output: scale it (cohere, granite), then cap it (gemma)."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of_config(cls, config: Any) -> LogitRule:
        """Reads the family's own names from a model's text config."""
        divisor = getattr(config, "logits_scaling", None) or 1.0
        scale = (getattr(config, "logit_scale", None) or 1.0) / divisor
        return cls(scale, getattr(config, "final_logit_softcapping", None))


ChunkLoss = Callable[[torch.Tensor, torch.Tensor, LogitRule, bool], tuple[torch.Tensor, torch.Tensor | None]]


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum over tokens of -log softmax(x_NH w_VHᵀ)[target]; gradients are computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x_NH: torch.Tensor,
        w_VH: torch.Tensor,
        targets_N: torch.Tensor,
        rule: LogitRule,
        training: bool,
        chunk_loss: ChunkLoss,
    ) -> torch.Tensor:
        wants_x, wants_w = (training and needed for needed in ctx.needs_input_grad[:2])
        dx_NH = torch.empty_like(x_NH) if wants_x else None
        # Weight gradients add up over chunks, so they do that in float32 at least.
        dw_VH = torch.zeros_like(w_VH, dtype=_wide(w_VH.dtype)) if wants_w else None
        total = torch.zeros((), dtype=_wide(x_NH.dtype), device=x_NH.device)
        size = max(1, CHUNK_LOGITS // w_VH.shape[0])
        for start in range(0, x_NH.shape[0], size):
            x, targets = x_NH[start : start + size], targets_N[start : start + size]
            loss, dlogits = chunk_loss(linear(x, w_VH), targets, rule, wants_x or wants_w)
            total += loss
            if dlogits is None:
                continue
            dlogits = dlogits.to(x.dtype)
            if dx_NH is not None:
                dx_NH[start : start + size] = dlogits @ w_VH
            if dw_VH is not None:
                dw_VH += dlogits.T @ x
        ctx.save_for_backward(dx_NH, dw_VH)
        ctx.weight_dtype = w_VH.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grad_outputs
        dx_NH, dw_VH = ctx.saved_tensors
        dx = None if dx_NH is None else dx_NH * grad.to(dx_NH.dtype)
        dw = None if dw_VH is None else (dw_VH * grad).to(ctx.weight_dtype)
        return dx, dw, None, None, None, None


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def loss_and_gradient(
    logits: torch.Tensor, targets: torch.Tensor, rule: LogitRule, wants_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The summed loss of one chunk and its gradient with respect to the head's output, both [n, V] wide.

    ``logits`` is fresh from the head and used up: the loss, the softmax and the gradient take turns in its memory.
    """
    logits = logits.to(_wide(logits.dtype))
    if rule.scale != 1.0:
        logits.mul_(rule.scale)
    slope = None
    if rule.softcap is not None:
        logits.div_(rule.softcap).tanh_()
        slope = 1.0 - logits.square() if wants_gradient else None
        logits.mul_(rule.softcap)
    logits.sub_(logits.amax(dim=1, keepdim=True))
    picked = logits.gather(1, targets[:, None])
    exponentials = logits.exp_()
    sums = exponentials.sum(dim=1, keepdim=True)
    loss = (sums.log() - picked).sum()
    if not wants_gradient:
        return loss, None
    gradient = exponentials.mul_(rule.scale / sums)
    gradient.scatter_add_(1, targets[:, None], torch.full_like(picked, -rule.scale))
    return loss, gradient if slope is None else gradient.mul_(slope)


def compiled_chunk_loss() -> ChunkLoss:
    """The same by ``torch.compile``: a chunk's logits are read and written fewer times."""
    compiled: ChunkLoss = torch.compile(loss_and_gradient, dynamic=True)
    return compiled


def chunked_cross_entropy(
    x_NH: torch.Tensor,
    w_VH: torch.Tensor,
    targets_N: torch.Tensor,
    rule: LogitRule | None = None,
    chunk_loss: ChunkLoss = loss_and_gradient,
) -> torch.Tensor:
    """The summed cross entropy of N tokens, a scalar in float32 (float64 for float64 input).

    Equal to ``cross_entropy(x_NH @ w_VH.T, targets_N, reduction="sum")`` in value and gradients.
    """
    training = torch.is_grad_enabled()  # always off inside a Function's forward, and leaves still say they need it
    rule = rule or LogitRule()
    total: torch.Tensor = _ChunkedCrossEntropy.apply(x_NH, w_VH, targets_N, rule, training, chunk_loss)
    return total


class SummedLoss(nn.Module):
    """A causal language model whose output is the summed loss of its supervised tokens.

    Args:
        model: a transformers causal language model.
        autocast: compute in this dtype over parameters of another one; None computes in the parameters' own.
        compiled: the model's layers are, and a chunk's loss and gradient are to be.
        float32_products: the head's and attention's products are taken by the float32 units (see ``linear``).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        autocast: torch.dtype | None = None,
        compiled: bool = False,
        float32_products: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self._compiled = compiled
        self._chunk_loss = compiled_chunk_loss() if compiled else loss_and_gradient
        self._float32_products = float32_products
        config = model.config.get_text_config()
        self._rule = LogitRule.of_config(config)
        self._by_document = config._attn_implementation == DOCUMENTS
        self._autocast = autocast
        assert model.get_output_embeddings().bias is None

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, loss_mask: torch.Tensor) -> torch.Tensor:
        """All arguments are [batch, sequence]; see ``Batch``. Returns a scalar.

        Positions restart at every document. Attention by document is told where; for any other, transformers sees
        it in the positions, with no mask given and no cache, and builds the mask that keeps documents apart.
        """
        told: dict[str, Any] = {}
        if self._by_document:
            bounds = document_bounds(position_ids)
            if self._compiled:  # the number of documents differs by batch; each would be compiled anew
                torch._dynamo.mark_dynamic(bounds, 0)
            told = {KEYWORD: bounds, FLOAT32_KEYWORD: self._float32_products}
        kind = input_ids.device.type
        with torch.autocast(kind, dtype=self._autocast, enabled=self._autocast is not None):
            output = self.model.base_model(
                input_ids=input_ids, position_ids=position_ids, attention_mask=None, use_cache=False, **told
            )
            supervised = loss_mask[:, 1:]
            x_NH = output.last_hidden_state[:, :-1][supervised]
            weight = self.model.get_output_embeddings().weight
            if self._float32_products:
                x_NH, weight = x_NH.float(), weight.float()
            return chunked_cross_entropy(x_NH, weight, input_ids[:, 1:][supervised], self._rule, self._chunk_loss)
