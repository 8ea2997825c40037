"""Whether a model decodes with a cache as it does without one."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

CACHES = ("past_key_values", "cache_params", "state")  # the names under which models return and take their cache
DECODED_TOKENS = 8
CACHE_TOLERANCE = 1e-3  # of ``difference``: with a cache, sums are in another order, and depth amplifies the difference


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
