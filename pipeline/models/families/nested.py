"""Language models inside other models, such as those that also read images.

Only the language model is known here, and it can be used as a model of its own. All other tensors are copied, whatever
they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.errors import UserError
from pipeline.models.config_json import is_nested, language_config
from pipeline.models.families.parameters import Config


@dataclass(frozen=True)
class Outer:
    """What a family of outer models does with its language model.

    Attributes:
        prefix: of the names of the language model's tensors on disk, as ``save_pretrained`` writes them.
        tied: the default of ``tie_word_embeddings``, for which the outer config counts.
        inner_ties: whether that entry of the inner config counts as well.
    """

    prefix: str
    tied: bool = False
    inner_ties: bool = False


OUTER = {  # by model_type
    "gemma3": Outer("language_model.", tied=True),
    "mistral3": Outer("language_model.", tied=True),
    "llama4": Outer("language_model."),
    "llava": Outer("language_model.", inner_ties=True),
    "qwen2_5_vl": Outer("", inner_ties=True),
}
# Families without a model of their own, by the family with the same layers.
SAME_LAYERS = {"qwen2_5_vl_text": "qwen2"}


def inner_config(config: Config) -> dict[str, object]:
    """Returns the config of a nested language model as if it were a model of its own, and other configs unchanged.

    Args:
        config: of the outer model.

    Raises:
        UserError: the family of the outer model is not known.
    """
    if not is_nested(config):
        return dict(config)
    outer, inner = _outer(config), language_config(config)
    tied = config.get("tie_word_embeddings")
    tied = (outer.tied if tied is None else tied) or (outer.inner_ties and inner.get("tie_word_embeddings"))
    family = inner["model_type"]
    ropes = {name: _of_text(inner[name]) for name in ("rope_parameters", "rope_scaling") if inner.get(name)}
    return {**inner, **ropes, "model_type": SAME_LAYERS.get(family, family), "tie_word_embeddings": bool(tied)}


def _of_text(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Returns rotary embeddings without the sections for height and width, which are the same position in a text."""
    return {name: value for name, value in rope.items() if name != "mrope_section" and value != "mrope"}


def prefix_of(config: Config) -> str:
    """Returns the prefix of the names of the language model's tensors on disk; empty if it is not nested.

    Args:
        config: of the outer model.

    Raises:
        UserError: the family of the outer model is not known.
    """
    return _outer(config).prefix if is_nested(config) else ""


def _outer(config: Config) -> Outer:
    family = config.get("model_type")
    if family not in OUTER:
        raise UserError(
            setting="model.path",
            value=f"a model of the family {family!r}",
            rule="its config has a text_config, and where its language model is stored is not known",
            remedy=f"Use a model of one of the families {', '.join(OUTER)}, or add the family to OUTER in "
            "pipeline/models/families/nested.py.",
        )
    return OUTER[str(family)]
