"""Which models attention without a mask can compute. No torch: the checks before a run need it as well as the workers.

``documents`` and ``flex`` are described in ``pipeline.training.attention``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.config import Train
from pipeline.errors import UserError
from pipeline.models.families import FAMILIES
from pipeline.models.families.parameters import Config

UNKNOWN_FAMILY = "the model's family has no row in the table of families"
NO_BACKWARD_PASS = "on CPUs, flex_attention has no backward pass"


def obstacle_to_documents(config: Config, sequence_length: int) -> str | None:
    """Returns why attention by document cannot compute a model's attention on any device, or None if it can.

    Args:
        config: of the language model.
        sequence_length: tokens per block.
    """
    family = FAMILIES.get(config.get("model_type", ""))
    if family is None:
        return UNKNOWN_FAMILY
    config = family.with_defaults(config)
    if config.get("attn_logit_softcapping"):
        return "the model caps its attention scores, which the kernels do not support"
    if any(role.kind == "sink" for role in family.roles.values()):
        return "the model has attention sinks, which the kernels do not support"
    if (obstacle := dropout_obstacle(config)) is not None:
        return obstacle
    window = config.get("sliding_window")
    if window is not None and config.get("use_sliding_window", True) and window < sequence_length:
        return f"the model's sliding window is {window} tokens, and blocks have {sequence_length}"
    return None


def dropout_obstacle(config: Config) -> str | None:
    """Returns why attention without a mask cannot compute a model's dropout of attention weights; None without any."""
    dropout = config.get("attention_dropout")
    return f"the model's attention_dropout is {dropout}, which the kernels do not support" if dropout else None


def attention_faults(section: str, train: Train, config: Config, device: str) -> Iterator[UserError]:
    """Yields an error if the attention that the settings ask for cannot compute a model.

    Args:
        section: "pretrain" or "sft", for the messages.
        train: the stage's settings.
        config: of the language model.
        device: "cpu" or "cuda".
    """
    obstacles = {
        "documents": obstacle_to_documents(config, train.sequence_length),
        "flex": NO_BACKWARD_PASS if device == "cpu" else dropout_obstacle(config),
    }
    if (obstacle := obstacles.get(train.attention)) is not None:
        yield _cannot(f"{section}.attention", train.attention, obstacle, f"{section}.attention=auto")
    elif train.attention == "auto" and train.sequence_parallel > 1 and None not in obstacles.values():
        setting, rule = f"{section}.sequence_parallel", needs_no_mask(obstacles)
        yield _cannot(setting, train.sequence_parallel, rule, f"{setting}=1")


def needs_no_mask(obstacles: Mapping[Any, str | None]) -> str:
    """Returns the rule about ranks that share sequences, with why no attention without a mask is available."""
    reasons = (f"{name} is not available, since {obstacle}" for name, obstacle in obstacles.items())
    return f"ranks can only share sequences if attention needs no mask: {'; '.join(reasons)}"


def _cannot(setting: str, value: object, rule: str, remedy: str) -> UserError:
    return UserError(setting=setting, value=value, rule=rule, remedy=f"Set {remedy}.")
