"""The report's tables."""

from __future__ import annotations

import math
from pathlib import Path

from pipeline.config import MODEL_TARGETS
from pipeline.files import read_json, write_json
from pipeline.report import tables
from pipeline.report.curves import curves
from pipeline.report.findings import lead_findings
from pipeline.report.markup import Table
from pipeline.report.results import collect_results
from pipeline.report.scores import Scores
from tests.report.finished_runs import MEASURED_BLOCKS, SCORES, finished_run


def _cells(content: Table, row: int) -> dict[str, str]:
    return dict(zip(content.columns, content.rows[row], strict=True))


def _scaled(factor: float) -> dict:
    """The default scores, with the values of every target but the base multiplied by ``factor``."""
    return {
        key: (n, stderr, {t: v if t == "load" else v * factor for t, v in values.items()})
        for key, (n, stderr, values) in SCORES.items()
    }


def test_scores_by_target_have_marks_that_compare_them_with_the_base(tmp_path: Path) -> None:
    scores = Scores(collect_results([finished_run(tmp_path)]))
    content = tables.score_table(scores, "quickstart")
    assert _cells(content, 0) == {
        "task": "held_out_text", "metric": "word_perplexity", "n": "40", "base": "35.00 ± 0.40",
        "expanded": "50.00 ± 0.40 ▼", "pre-trained": "26.60 ± 0.40 ▲", "tuned": "27.00 ± 0.40 ▲",
    }  # fmt: skip
    assert _cells(content, 2)["pre-trained"] == "80.9 ± 1.5 % ≈"


def test_only_a_value_that_beats_all_others_is_bold(tmp_path: Path) -> None:
    runs = [finished_run(tmp_path, name, name, scores=_scaled(f)) for name, f in (("lesa", 1.0), ("copy", 1.2))]
    content = tables.method_table(Scores(collect_results(runs)), runs, "pretrain")
    assert list(content.columns) == ["task", "metric", "n", "base", "LESA", "copying"]
    assert _cells(content, 0)["LESA"] == "**26.60 ± 0.40** ▲"  # lowest perplexity by far
    assert "**" not in _cells(content, 0)["copying"]
    assert _cells(content, 1)["copying"] == "**56.4 ± 2.0 %** ▲"


def test_nothing_is_bold_if_the_best_two_are_within_noise(tmp_path: Path) -> None:
    runs = [finished_run(tmp_path, name, name, scores=_scaled(f)) for name, f in (("lesa", 1.0), ("copy", 1.01))]
    content = tables.method_table(Scores(collect_results(runs)), runs, "pretrain")
    assert "**" not in "".join(content.rows[0])


def test_a_lead_over_all_others_is_one_over_each_of_them(tmp_path: Path) -> None:
    """By 2.15 standard errors, which are significant for two given methods, but not for the best and worst of three."""
    task_metric, ahead = ("quiz", "acc"), 2.15 * 0.015 * math.sqrt(2)
    values = {"lesa": 0.5 + ahead, "copy": 0.5, "solar": 0.5}
    runs = [
        finished_run(tmp_path, name, name, scores={task_metric: (500, 0.015, dict.fromkeys(MODEL_TARGETS, value))})
        for name, value in values.items()
    ]
    scores = Scores(collect_results(runs))
    assert lead_findings(scores, runs, "pretrain")[0].endswith("significantly ahead of all others.")
    cells = _cells(tables.lead_table(scores, runs, "pretrain"), 0)
    assert cells["LESA"] == "54.6 % leads" and cells["copying"] == "−4.6 ± 2.1 points, worse"
    file = runs[2].directories["evaluate/pretrain"] / "evaluation.json"
    write_json(file, {**(evaluation := read_json(file)), "rows": [{**evaluation["rows"][0], "value": 0.51}]})
    scores = Scores(collect_results(runs))  # one of them is no longer worse
    assert lead_findings(scores, runs, "pretrain")[0].endswith("but within noise of copying, SOLAR.")
    cells = _cells(tables.lead_table(scores, runs, "pretrain"), 0)
    assert cells["copying"] == "*−4.6 ± 2.1 points, within noise*"


def test_methods_with_different_bases_are_shown_without_a_base_column(tmp_path: Path) -> None:
    other = {key: (n, e, {**values, "load": values["load"] * 2}) for key, (n, e, values) in SCORES.items()}
    runs = [finished_run(tmp_path / "1", "a", "lesa"), finished_run(tmp_path / "2", "b", "copy", scores=other)]
    content = tables.method_table(Scores(collect_results(runs)), runs, "pretrain")
    assert "base" not in content.columns
    assert _cells(content, 2)["LESA"].endswith("≈")  # each against its own base
    assert _cells(content, 2)["copying"].endswith("▼")


def test_differences_are_followed_by_their_verdict(tmp_path: Path) -> None:
    content = tables.difference_table(Scores(collect_results([finished_run(tmp_path)])), "quickstart")
    assert _cells(content, 0)["pre-training"] == "−46.80 +0.91 −0.90 %, better"
    assert _cells(content, 0)["base to pre-trained"] == "−24.0 ± 1.4 %, better"
    assert _cells(content, 2)["base to pre-trained"] == "*−0.5 ± 2.1 points, within noise*"


def test_equal_scores_are_called_the_same(tmp_path: Path) -> None:
    same = {key: (n, e, {**values, "expand": values["load"]}) for key, (n, e, values) in SCORES.items()}
    content = tables.difference_table(Scores(collect_results([finished_run(tmp_path, scores=same)])), "quickstart")
    assert {_cells(content, row)["expansion"] for row in range(3)} == {"*the same*"}


def test_unscored_targets_have_no_column(tmp_path: Path) -> None:
    run = finished_run(tmp_path, stages=["load", "expand", "evaluate/load", "evaluate/expand"])
    scores = Scores(collect_results([run]))
    assert list(tables.score_table(scores, run.name).columns) == ["task", "metric", "n", "base", "expanded"]
    assert list(tables.difference_table(scores, run.name).columns) == ["task", "metric", "expansion"]


def test_the_lead_table_shows_differences_from_the_best_value(tmp_path: Path) -> None:
    runs = [finished_run(tmp_path, name, name, scores=_scaled(f)) for name, f in (("lesa", 1.0), ("copy", 1.02))]
    content = tables.lead_table(Scores(collect_results(runs)), runs, "pretrain")
    assert _cells(content, 0)["LESA"] == "26.60 leads"
    assert _cells(content, 0)["copying"] == "*+2.0 +2.2 −2.1 %, within noise*"
    assert _cells(content, 1)["copying"].endswith("leads")


def test_curves_by_fraction_and_at_equal_budgets(tmp_path: Path) -> None:
    runs = [
        finished_run(tmp_path, "a", "lesa", losses=[4.0, 3.0, 2.0], seconds_per_step=1.0),
        finished_run(tmp_path, "b", "copy", losses=[5.0, 4.0, 3.0], seconds_per_step=2.0),
    ]
    found = curves(runs, "pretrain")
    assert _cells(tables.curve_table(found), 1) == {
        "trained": "50 %", "tokens": "500", "LESA": "3.000 (20.09)", "copying": "4.000 (54.60)",
    }  # fmt: skip
    budget = tables.budget_table(found)
    assert list(budget.columns) == ["method", "at 1,000 tokens", "at 1.0×10¹² FLOPs", "at 10.0 s"]
    assert list(budget.rows[1]) == ["copying", "3.000", "3.000", "4.000"]


def test_runs_of_different_lengths_have_their_own_tokens(tmp_path: Path) -> None:
    runs = [finished_run(tmp_path, m, m, losses=[4.0, 3.0, 2.0], tokens=n) for m, n in (("lesa", 512), ("copy", 1024))]
    content = tables.curve_table(curves(runs, "pretrain"))
    assert _cells(content, 0) == {
        "trained": "0 %", "tokens": "0", "LESA": "4.000 (54.60)", "copying": "4.000 (54.60)",
    }  # fmt: skip
    assert _cells(content, 1) == {
        "trained": "50 %", "tokens": "–", "LESA": "3.000 (20.09) at 256 tokens",
        "copying": "3.000 (20.09) at 512 tokens",
    }  # fmt: skip


def test_held_out_losses_have_standard_errors_where_blocks_were_recorded(tmp_path: Path) -> None:
    runs = [
        finished_run(tmp_path, "a", "lesa", blocks=MEASURED_BLOCKS),
        finished_run(tmp_path, "b", "copy", losses=[3.0, 2.0]),
    ]
    assert _cells(tables.curve_table(curves(runs, "pretrain")), 1) == {
        "trained": "100 %", "tokens": "1,000", "LESA": "2.000 ± 0.200 (7.389)", "copying": "2.000 (7.389)",
    }  # fmt: skip


def test_averages_have_a_row_and_are_the_loss_at_the_end_of_a_run(tmp_path: Path) -> None:
    runs = [
        finished_run(tmp_path, "a", "lesa", losses=[4.0, 3.0, 2.0], seconds_per_step=1.0, averages=2.5),
        finished_run(tmp_path, "b", "copy", losses=[5.0, 4.0, 3.0], seconds_per_step=0.5),
    ]
    found = curves(runs, "pretrain")
    assert _cells(tables.curve_table(found), 2)["LESA"] == "2.000 (7.389)"
    assert _cells(tables.curve_table(found), 3) == {
        "trained": "averages", "tokens": "1,000", "LESA": "2.500 (12.18)", "copying": "–",
    }  # fmt: skip
    budget = tables.budget_table(found)
    assert list(budget.rows[0]) == ["LESA", "2.500", "2.500", "3.000"]  # after half of the seconds: of the weights
    assert list(budget.rows[1]) == ["copying", "3.000", "3.000", "3.000"]


def test_the_training_table_shows_parameters_data_compute_and_speed(tmp_path: Path) -> None:
    content = tables.training_table([finished_run(tmp_path)])
    assert [row[1] for row in content.rows] == ["pretrain", "sft"]
    assert _cells(content, 0) == {
        "method": "LESA", "stage": "pretrain", "trained": "400,000", "of": "1.9 M", "steps": "10", "tokens": "1,000",
        "FLOPs": "1.0×10¹²", "time": "20.0 s", "tokens/s": "50", "ranks": "1", "ZeRO": "2", "precision": "bfloat16",
    }  # fmt: skip


def test_shared_artifacts_are_listed_once(tmp_path: Path) -> None:
    runs = [finished_run(tmp_path, name, name) for name in ("lesa", "copy")]
    used_by = [(row[0], row[1]) for row in tables.artifact_table(runs).rows]
    assert used_by.count(("load", "all")) == 1
    assert [users for stage, users in used_by if stage == "expand"] == ["LESA", "copying"]
    assert "used by" not in tables.artifact_table(runs[:1]).columns
