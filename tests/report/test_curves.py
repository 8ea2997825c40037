"""Held-out curves at equal budgets."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest

from pipeline.report.curves import base_loss, common_budget, curves, loss_at
from tests.report.finished_runs import finished_run, write


def test_the_common_budget_is_what_the_slowest_reaches_and_the_loss_there_is_interpolated(tmp_path: Path) -> None:
    fast = finished_run(tmp_path, "a", "lesa", losses=[4.0, 3.5, 3.2, 3.1], seconds_per_step=1.0)
    slow = finished_run(tmp_path, "b", "solar", losses=[5.0, 4.0, 3.0], seconds_per_step=3.0)
    found = curves([fast, slow], "pretrain")
    assert common_budget(found, "seconds") == 10.0
    for curve in found:
        xs, ys = [p["seconds"] for p in curve.points], [p["loss"] for p in curve.points]
        for budget in (0.0, 4.2, 10.0):
            assert loss_at(curve, "seconds", budget) == pytest.approx(numpy.interp(budget, xs, ys))


def test_a_budget_beyond_the_curve_is_refused(tmp_path: Path) -> None:
    (curve,) = curves([finished_run(tmp_path)], "pretrain")
    with pytest.raises(ValueError, match="2000 tokens"):
        loss_at(curve, "tokens", 2000)


def test_one_point_is_no_curve(tmp_path: Path) -> None:
    run = finished_run(tmp_path)
    training = run.training("pretrain")
    training["held_out"] = training["held_out"][:1]
    write(run.directories["pretrain"] / "training.json", training)
    assert curves([run], "pretrain") == []


def test_the_base_is_the_start_of_a_run_that_computes_what_the_base_does(tmp_path: Path) -> None:
    changed = finished_run(tmp_path, "a", "lesa", losses=[4.5, 3.0])
    same = finished_run(tmp_path, "b", "llama_pro", losses=[3.4, 3.2])
    assert base_loss([changed]) is None
    assert base_loss([changed, same]) == 3.4
    assert base_loss([finished_run(tmp_path, "c", "llama_pro", stages=["load", "pretrain"])]) is None
