"""How long training lasts, and the learning rate as a pure function of the step: resuming cannot get it wrong."""

from __future__ import annotations

import math
from collections.abc import Iterable

from pipeline.config import Train


def total_steps(train: Train, blocks: int) -> int:
    """Optimizer steps of the stage: as set, or whole global batches in so many epochs of blocks, at least one."""
    if train.steps is not None:
        return train.steps
    assert train.epochs is not None  # config: exactly one of the two
    return max(1, int(train.epochs * blocks / train.global_batch))


def evaluation_steps(train: Train, steps: int) -> dict[int, float]:
    """The steps after which the held-out loss is taken, with the fraction each stands for; 0 is before the first."""
    return {round(fraction * steps): fraction for fraction in sorted(train.evaluate_at)}


def learning_rate(train: Train, step: int, steps: int) -> float:
    """The rate of optimizer step ``step`` of ``steps``, counted from 1.

    Warm-up rises linearly and reaches the peak at its last step; the decay ends at step ``steps`` on
    ``final_learning_rate_fraction`` of the peak. ``warmup_stable_decay`` (MiniCPM, arXiv 2404.06395, section 4)
    stays at the peak and decays linearly over the last ``decay_fraction`` of the steps.
    """
    assert 1 <= step <= steps, (step, steps)
    warmup = round(train.warmup_fraction * steps)
    if step <= warmup:
        return train.learning_rate * step / warmup
    return train.learning_rate * _decay(train, step, steps, warmup)


def _decay(train: Train, step: int, steps: int, warmup: int) -> float:
    """The fraction of the peak after warm-up."""
    final = train.final_learning_rate_fraction
    if train.schedule == "constant":
        return 1.0
    start = warmup
    if train.schedule == "warmup_stable_decay":
        start = max(warmup, steps - round(train.decay_fraction * steps))
    progress = max(0.0, (step - start) / max(1, steps - start))
    remaining = 0.5 * (1.0 + math.cos(math.pi * progress)) if train.schedule == "cosine" else 1.0 - progress
    return final + (1.0 - final) * remaining


def fractions_at(fractions: Iterable[float], step: int, steps: int) -> list[float]:
    """Those of ``fractions`` that stand for this step; several do where steps are few."""
    return [fraction for fraction in fractions if round(fraction * steps) == step]
