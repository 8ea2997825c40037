"""Which attention a training section gets. No torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from pipeline.config import Train
from pipeline.training.sizes import Precision

Attention = Literal["documents", "sdpa"]

DOCUMENTS: Attention = "documents"  # the name under which transformers finds ``attention.attend_by_document``


def choose(train: Train, why_not: str | None) -> Attention:
    """``auto`` attends by document wherever nothing speaks against it; anything else is obeyed."""
    if train.attention == "auto":
        return "sdpa" if why_not else DOCUMENTS
    return train.attention


def obstacle(train: Train, entry: Callable[[str, Any], Any], precision: Precision, on_gpu: bool) -> str | None:
    """Why attention by document cannot be had.

    Args:
        entry: an entry of the model's config, or the default given.
    """
    window = entry("sliding_window", None)
    if window is not None and entry("use_sliding_window", True) and window < train.sequence_length:
        return f"the model's layers see {window} tokens back, and blocks have {train.sequence_length}"
    if entry("attn_logit_softcapping", None):
        return "the model caps its attention scores, which the kernels cannot"
    if on_gpu and precision != "bfloat16":
        return f"on GPUs it computes in bfloat16, and precision is {precision}"
    return None
