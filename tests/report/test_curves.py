"""Curves of the held-out loss, and the loss at equal budgets."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest

from pipeline.report.curves import base_loss, common_budget, curves, loss_at
from pipeline.training.block_losses import BlockLosses
from tests.report.finished_runs import MEASURED_BLOCKS, finished_run, write


def test_the_common_budget_is_the_smallest_final_one_and_losses_are_interpolated(tmp_path: Path) -> None:
    fast = finished_run(tmp_path, "a", "lesa", losses=[4.0, 3.5, 3.2, 3.1], seconds_per_step=1.0)
    slow = finished_run(tmp_path, "b", "solar", losses=[5.0, 4.0, 3.0], seconds_per_step=3.0)
    found = curves([fast, slow], "pretrain")
    assert common_budget(found, "seconds") == 10.0
    for curve in found:
        xs, ys = [p["seconds"] for p in curve.points], [p["loss"] for p in curve.points]
        for budget in (0.0, 4.2, 10.0):
            assert loss_at(curve, "seconds", budget) == pytest.approx(numpy.interp(budget, xs, ys))


def test_a_budget_beyond_the_curve_raises(tmp_path: Path) -> None:
    (curve,) = curves([finished_run(tmp_path)], "pretrain")
    with pytest.raises(ValueError, match="2000 tokens"):
        loss_at(curve, "tokens", 2000)


def test_a_single_measurement_is_not_a_curve(tmp_path: Path) -> None:
    run = finished_run(tmp_path)
    training = run.training("pretrain")
    training["held_out"] = training["held_out"][:1]
    write(run.directories["pretrain"] / "training.json", training)
    assert curves([run], "pretrain") == []


def test_the_base_loss_is_the_first_loss_of_a_run_whose_expansion_keeps_the_logits(tmp_path: Path) -> None:
    changed = finished_run(tmp_path, "a", "lesa", losses=[4.5, 3.0])
    same = finished_run(tmp_path, "b", "llama_pro", losses=[3.4, 3.2])
    assert base_loss([changed]) is None
    assert base_loss([changed, same]) == 3.4
    assert base_loss([finished_run(tmp_path, "c", "llama_pro", stages=["load", "pretrain"])]) is None


def test_the_change_of_a_curve_is_paired_over_blocks(tmp_path: Path) -> None:
    (curve,) = curves([finished_run(tmp_path, blocks=MEASURED_BLOCKS)], "pretrain")
    change = curve.change
    assert (change.value, change.stderr, change.blocks) == (pytest.approx(-1.0), pytest.approx(0.1), 2)


def test_the_change_has_no_error_without_recorded_blocks_or_with_one(tmp_path: Path) -> None:
    one = [BlockLosses([30.0], [10]), BlockLosses([20.0], [10])]
    runs = [finished_run(tmp_path, "earlier version"), finished_run(tmp_path, "one block", blocks=one)]
    assert [curve.change for curve in curves(runs, "pretrain")] == [None, None]
