"""Standard errors of held-out losses over blocks, compared with the bootstrap."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.training.block_losses import BlockLosses

BLOCKS, RESAMPLED = 60, 4000


def _measured() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the targets of every block, and its losses before and after training, in which blocks differ alike."""
    random = np.random.default_rng(1)
    targets = random.integers(5, 120, BLOCKS)
    level = (
        random.normal(3.0, np.where(targets < 60, 0.9, 0.4)) - targets / 100
    )  # short blocks are hard and differ most
    gain = random.normal(0.3, 0.05, BLOCKS)
    return targets, targets * level, targets * (level - gain)


def test_standard_errors_equal_those_of_the_bootstrap_over_blocks() -> None:
    targets, first, second = _measured()
    chosen = np.random.default_rng(2).integers(0, BLOCKS, (RESAMPLED, BLOCKS))
    before, after = (losses[chosen].sum(axis=1) / targets[chosen].sum(axis=1) for losses in (first, second))
    earlier, later = (BlockLosses(losses.tolist(), targets.tolist()) for losses in (first, second))
    assert earlier.mean == pytest.approx(first.sum() / targets.sum())
    assert earlier.stderr == pytest.approx(before.std(), rel=0.05)
    assert later.stderr == pytest.approx(after.std(), rel=0.05)
    assert later.change_stderr(earlier) == pytest.approx((after - before).std(), rel=0.05)
    assert later.change_stderr(earlier) < later.stderr / 5  # what the blocks have in common cancels
    per_block = first / targets
    assert earlier.stderr != pytest.approx(per_block.std(ddof=1) / BLOCKS**0.5, rel=0.1)  # as if all were equally long


def test_one_block_has_no_standard_error() -> None:
    one = BlockLosses([12.0], [4])
    assert one.mean == 3.0 and one.stderr is None and one.change_stderr(one) is None


def test_blocks_without_targets_have_no_loss() -> None:
    none = BlockLosses([0.0, 0.0], [0, 0])
    assert none.mean == 0.0 and none.stderr is None
    assert BlockLosses([12.0, 0.0, 8.0], [4, 0, 2]).mean == pytest.approx(20 / 6)
