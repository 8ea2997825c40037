"""The METHODS table: one row a method. Light to import; a method's own file is loaded when it is used.

A new method is one file here with a function ``expand`` (see ``layers.py``), one row in this table, its settings in
``pipeline/config/expand.py`` and one file in ``conf/expand/``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, cast

if TYPE_CHECKING:
    from pipeline.expansion.layers import ExpandFunction

Trainable = Literal["new_layers", "all"]


def _always(settings: Any) -> bool:
    return True


def _never(settings: Any) -> bool:
    return False


def _when_zeroed(settings: Any) -> bool:
    return bool(settings.zero_init)


@dataclass(frozen=True)
class Method:
    """One row.

    Attributes:
        source: where the method is published.
        trains: what continual pre-training trains unless told otherwise.
        keeps_logits: whether, with these settings, the new model computes exactly what the base does.
        linear_algebra: whether there is work for a GPU.
    """

    source: str
    trains: Trainable
    keeps_logits: Callable[[Any], bool]
    linear_algebra: bool = False


METHODS: dict[str, Method] = {
    "lesa": Method("LESA: Learnable LLM Layer Scaling-Up, arXiv 2502.13794", "new_layers", _when_zeroed,
                   linear_algebra=True),
    "llama_pro": Method("LLaMA Pro: Progressive LLaMA with Block Expansion, arXiv 2401.02415", "new_layers", _always),
    "opt_deus": Method("OpT-DeUS: Progressive Depth Up-scaling via Optimal Transport, arXiv 2508.08011",
                       "new_layers", _always, linear_algebra=True),
    "solar": Method("SOLAR 10.7B: Depth Up-Scaling, arXiv 2312.15166", "all", _never),
    "average": Method("control: mean of the two neighbours", "new_layers", _never),
    "copy": Method("control: the lower neighbour once more", "new_layers", _never),
    "none": Method("control: the base as it is", "all", _always),
}  # fmt: skip


def expand_function(method: str) -> ExpandFunction:
    """The function ``expand`` of the method's own file."""
    return cast("ExpandFunction", import_module(f"pipeline.expansion.methods.{method}").expand)


def trainable_by_default(method: str) -> Trainable:
    """What ``pretrain.trainable=auto`` means for a method."""
    return METHODS[method].trains
