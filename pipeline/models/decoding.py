"""How a model is called: masks for packed documents, decoding with a cache, and what follows the output of its head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import create_masks_for_generate

CACHES = ("past_key_values", "cache_params", "state")  # the names under which models return and take their cache
DECODED_TOKENS = 8
CACHE_TOLERANCE = 1e-3  # of ``difference``: with a cache, sums are in another order, and depth amplifies the difference


@dataclass(frozen=True)
class LogitTransform:
    """What a model family applies to the head's output: a scale (cohere, granite), then a soft cap (gemma)."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def from_config(cls, config: Any) -> LogitTransform:
        """Reads it from a model's text config, in which families name it differently."""
        divisor = getattr(config, "logits_scaling", None) or 1.0
        scale = (getattr(config, "logit_scale", None) or 1.0) / divisor
        return cls(scale, getattr(config, "final_logit_softcapping", None))


def packed_mask(model: PreTrainedModel, position_ids: Tensor) -> Any:
    """Returns the attention mask of blocks that hold several documents, none of which attends to another.

    Most models create it themselves if they get no mask, from positions that restart at 0. Some do so without the
    positions (gpt_oss, falcon), but all of them accept a finished mask.

    Args:
        model: its config decides about sliding windows, and its attention implementation about the mask's format.
        position_ids: [batch, sequence].

    Returns:
        What the model takes as ``attention_mask``: a mask [batch, 1, sequence, sequence], one for each kind of layer,
        or None where ``is_causal`` is sufficient.
    """
    # Only the shape of the embeddings without their width, their dtype and their device are used.
    like_embeddings = model.get_input_embeddings().weight.new_empty((*position_ids.shape, 0))
    return create_masks_for_generate(model.config, like_embeddings, None, None, position_ids=position_ids)


def cache_difference(model: PreTrainedModel, prompt: Tensor) -> float:
    """Decodes greedily with a cache, then computes the same positions in one forward pass without one.

    A router whose experts are almost tied chooses another one after rounding, so that the logits of a correct mixture
    can differ by any amount. A difference that is too large is therefore computed again in float64.

    Args:
        model: in float32. It is the same afterwards.
        prompt: token ids ``[prompts, tokens]``.

    Returns:
        The largest difference of the logits, see ``difference``.
    """
    found = _cache_difference(model, prompt)
    if found <= CACHE_TOLERANCE:
        return found
    try:
        return _cache_difference(model.double(), prompt)
    except RuntimeError:  # some operators have no version in float64
        return found
    finally:
        model.float()


@torch.inference_mode()
def _cache_difference(model: PreTrainedModel, prompt: Tensor) -> float:
    step = model(prompt, use_cache=True)
    cache = next(name for name in CACHES if name in step)
    tokens, cached = prompt, [step.logits[:, -1]]
    for _ in range(DECODED_TOKENS):
        token = cached[-1].argmax(dim=-1, keepdim=True)
        tokens = torch.cat([tokens, token], dim=1)
        step = model(token, use_cache=True, **{cache: step[cache]})
        cached.append(step.logits[:, -1])
    uncached = model(tokens, use_cache=False).logits[:, prompt.shape[1] - 1 :]
    return difference(uncached, torch.stack(cached, dim=1))


def difference(expected: Tensor, actual: Tensor) -> float:
    """Returns the largest difference relative to the largest logit, or absolute if that is below one."""
    return float((expected - actual).abs().max() / expected.abs().max().clamp(min=1.0))
