"""What a forward pass takes and what follows its head: masks for packed documents, and the transform of the logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import create_masks_for_generate


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
