"""The number of training steps, and the learning rate as a pure function of the step, so resuming needs no state."""

from __future__ import annotations

import math
from collections.abc import Iterable

from pipeline.config import Train


def total_steps(train: Train, blocks: int) -> int:
    """Returns the number of optimizer steps: ``steps``, or the full global batches in ``epochs``, but at least one.

    Args:
        train: the stage's settings.
        blocks: of the stage's own data. Blocks of the corpus that ``corpus_fraction`` adds do not count in ``epochs``.
    """
    if train.steps is not None:
        return train.steps
    assert train.epochs is not None  # the settings require exactly one of the two
    steps = train.epochs * blocks / (train.global_batch * (1.0 - train.corpus_fraction))
    return max(1, int(round(steps, 9)))  # 0.29 * 100 is slightly less than 29


def evaluation_steps(train: Train, steps: int) -> dict[int, float]:
    """Maps the steps after which to compute the held-out loss to their fractions. Step 0 is before training, at 0."""
    found = {round(fraction * steps): fraction for fraction in sorted(train.evaluate_at)}
    if 0 in found:
        found[0] = 0.0  # nothing has been trained, whatever the fraction that rounds to it
    return found


def fractions_at(fractions: Iterable[float], step: int, steps: int) -> list[float]:
    """Returns those of ``fractions`` that round to this step. There may be several if steps are few."""
    return [fraction for fraction in fractions if round(fraction * steps) == step]


def learning_rate(train: Train, step: int, steps: int) -> float:
    """Returns the learning rate of optimizer step ``step`` of ``steps``, counted from 1.

    The warm-up is linear and reaches the peak at its last step. The decay ends at step ``steps`` with
    ``final_learning_rate_fraction`` of the peak. ``warmup_stable_decay`` (MiniCPM, arXiv 2404.06395, section 4) stays
    at the peak and decays linearly over the last ``decay_fraction`` of the steps.
    """
    assert 1 <= step <= steps, (step, steps)
    warmup = round(train.warmup_fraction * steps)
    if step <= warmup:
        return train.learning_rate * step / warmup
    return train.learning_rate * _decay(train, step, steps, warmup)


def _decay(train: Train, step: int, steps: int, warmup: int) -> float:
    """Returns the fraction of the peak after the warm-up."""
    final = train.final_learning_rate_fraction
    if train.schedule == "constant":
        return 1.0
    start = warmup  # the decay begins right after the warm-up, except for warmup_stable_decay
    if train.schedule == "warmup_stable_decay":
        start = max(warmup, steps - round(train.decay_fraction * steps))
    progress = max(0.0, (step - start) / max(1, steps - start))
    remaining = 0.5 * (1.0 + math.cos(math.pi * progress)) if train.schedule == "cosine" else 1.0 - progress
    return final + (1.0 - final) * remaining
