"""results.json, which other programs read."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from pipeline.report import write_report
from pipeline.report.results import collect_results
from pipeline.report.scores import Scores
from pipeline.report.tables import artifact_table, score_table
from tests.report.finished_runs import MEASURED_BLOCKS, SCORES, STAGES, finished_run

FIELDS = [
    "run",
    "method",
    "target",
    "task",
    "metric",
    "value",
    "stderr",
    "n",
    "higher_is_better",
    "scores_of",
    "backend",
]


def _rows_of(rows: list, task: str, target: str) -> dict[str, float]:
    return {row["metric"]: row["value"] for row in rows if (row["task"], row["target"]) == (task, target)}


def test_every_result_has_the_documented_fields_and_json_values(tmp_path: Path) -> None:
    rows = collect_results([finished_run(tmp_path)])
    assert all(list(row) == FIELDS for row in rows)
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows


def test_every_score_of_every_target_is_a_result(tmp_path: Path) -> None:
    rows = collect_results([finished_run(tmp_path, name="q", method="lesa")])
    for (task, metric), (n, stderr, values) in SCORES.items():
        for target, value in values.items():
            known = ["q", "lesa", target, task, metric, value, stderr, n, None, None, None]
            wanted = dict(zip(FIELDS, known, strict=True))
            assert rows.count(wanted) == 1


def test_scores_that_are_those_of_another_model_say_so(tmp_path: Path) -> None:
    run = finished_run(tmp_path)
    file = run.directories["evaluate/expand"] / "evaluation.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "scores_of": "load"}))
    rows = write_report([run], tmp_path)
    marked = {(row["target"], row["scores_of"]) for row in rows if row["task"] == "held_out_text"}
    assert marked == {("load", None), ("expand", "load"), ("pretrain", None), ("sft", None)}
    assert "The expanded model was not scored itself" in (tmp_path / "report.md").read_text()


def test_scores_say_which_program_computed_them(tmp_path: Path) -> None:
    run = finished_run(tmp_path)
    file = run.directories["evaluate/sft"] / "evaluation.json"
    evaluation = json.loads(file.read_text())
    file.write_text(
        json.dumps({**evaluation, "rows": [{**row, "backend": "vllm 0.33.0"} for row in evaluation["rows"]]})
    )
    rows = [row for row in collect_results([run]) if row["stderr"] is not None and "loss" not in row["task"]]
    assert {(row["target"], row["backend"]) for row in rows} >= {("sft", "vllm 0.33.0"), ("load", None)}


def test_held_out_losses_come_with_perplexity_tokens_flops_and_seconds(tmp_path: Path) -> None:
    rows = collect_results([finished_run(tmp_path, losses=[4.0, 3.0, 2.0], seconds_per_step=3.0)])
    assert _rows_of(rows, "held_out_loss", "pretrain@50%") == {
        "loss": 3.0, "perplexity": math.exp(3.0), "tokens": 500, "flops": 0.5e12, "seconds": 15.0,
    }  # fmt: skip
    targets = {row["target"] for row in rows if row["task"] == "held_out_loss"}
    assert targets == {"pretrain@0%", "pretrain@50%", "pretrain@100%"}


def test_held_out_losses_and_perplexities_have_standard_errors_over_blocks(tmp_path: Path) -> None:
    rows = collect_results([finished_run(tmp_path, blocks=MEASURED_BLOCKS)])
    for target, loss, stderr in (("pretrain@0%", 3.0, 0.3), ("pretrain@100%", 2.0, 0.2), ("sft@100%", 2.0, 0.2)):
        found = {row["metric"]: (row["stderr"], row["n"]) for row in rows if row["target"] == target}
        assert found["loss"] == (pytest.approx(stderr), 2)
        assert found["perplexity"] == (pytest.approx(math.exp(loss) * stderr), 2)
        assert found["tokens"] == (None, None)


@pytest.mark.parametrize("ended", [True, False])
def test_the_final_loss_is_that_of_the_averages_where_they_are_the_result(tmp_path: Path, ended: bool) -> None:
    """Also if the loss of the weights was not measured at the end."""
    run = finished_run(tmp_path, stages=["pretrain"], blocks=MEASURED_BLOCKS, averages=2.5)
    if not ended:
        file = run.directories["pretrain"] / "training.json"
        training = json.loads(file.read_text())
        file.write_text(json.dumps({**training, "held_out": training["held_out"][:1]}))
    rows = collect_results([run])
    assert _rows_of(rows, "held_out_loss", "pretrain@0%")["loss"] == 3.0
    assert _rows_of(rows, "held_out_loss", "pretrain@100%") == {
        "loss": 2.5, "perplexity": pytest.approx(math.exp(2.5)), "tokens": 1000, "flops": 1e12, "seconds": 20.0,
        **({"unaveraged_loss": 2.0} if ended else {}),
    }  # fmt: skip
    errors = {row["metric"]: (row["stderr"], row["n"]) for row in rows if row["target"] == "pretrain@100%"}
    assert errors["loss"] == errors["perplexity"] == (None, None)
    assert not ended or errors["unaveraged_loss"] == (pytest.approx(0.2), 2)


def test_losses_on_conversations_and_on_the_corpus_are_different_tasks(tmp_path: Path) -> None:
    rows = collect_results([finished_run(tmp_path)])
    tasks = {row["task"] for row in rows if row["target"].startswith("sft@")}
    assert tasks == {"held_out_instruction_loss"}


def test_costs_are_results_and_unknown_ones_are_left_out(tmp_path: Path) -> None:
    run = finished_run(tmp_path)
    manifest = run.directories["expand"] / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "peak_memory_bytes": None}))
    rows = collect_results([run])
    assert _rows_of(rows, "cost", "expand") == {"seconds": 16.0}
    assert _rows_of(rows, "cost", "pretrain") == {
        "seconds": 18.0, "peak_memory_bytes": 3 * 2**29, "tokens": 1000, "flops": 1e12,
    }  # fmt: skip


def test_a_run_without_training_or_without_scores_has_the_remaining_results(tmp_path: Path) -> None:
    rows = collect_results([finished_run(tmp_path, stages=["load", "evaluate/load"])])
    assert {row["target"] for row in rows} == {"load"}
    rows = collect_results([finished_run(tmp_path / "b", stages=["load", "expand", "pretrain"])])
    assert {row["task"] for row in rows} == {"held_out_loss", "cost"}


def test_a_missing_file_in_a_finished_artifact_is_an_error(tmp_path: Path) -> None:
    run = finished_run(tmp_path)
    (run.directories["evaluate/sft"] / "evaluation.json").unlink()
    with pytest.raises(FileNotFoundError):
        collect_results([run])


def test_scores_do_not_include_held_out_losses_and_costs(tmp_path: Path) -> None:
    runs = [finished_run(tmp_path, name="a"), finished_run(tmp_path, name="b", stages=STAGES[:-1])]
    scores = Scores(collect_results(runs))
    assert scores.task_metrics() == list(SCORES)
    assert scores.targets("b") == ["load", "expand", "pretrain"]
    assert scores.get("b", "sft", ("minimal_pairs", "acc")) is None
    assert scores.shared_base(["a", "b"])


def test_runs_with_different_bases_have_no_shared_base(tmp_path: Path) -> None:
    other = {key: (n, e, {**values, "load": 0.5}) for key, (n, e, values) in SCORES.items()}
    runs = [finished_run(tmp_path / "1", name="a"), finished_run(tmp_path / "2", name="b", scores=other)]
    assert not Scores(collect_results(runs)).shared_base(["a", "b"])


def test_snapshots_are_listed_between_their_stages(tmp_path: Path) -> None:
    by_target = {
        "load": 35.0,
        "expand": 50.0,
        "pretrain@20%": 40.0,
        "pretrain@80%": 30.0,
        "pretrain": 26.0,
        "sft": 27.0,
    }
    values = {("held_out_text", "word_perplexity"): (40, 0.4, by_target)}
    stages = [*STAGES, "evaluate/pretrain-at-80", "evaluate/pretrain-at-20"]
    run = finished_run(tmp_path, stages=stages, scores=values)
    rows = collect_results([run])
    scored = {row["target"]: row["value"] for row in rows if row["task"] == "held_out_text"}
    assert list(scored.items()) == list(by_target.items())
    scores = Scores(rows)
    assert scores.targets(run.name) == ["load", "expand", "pretrain", "sft"]
    assert score_table(scores, run.name).columns[3:] == [
        "base", "expanded", "pre-trained, 20 %", "pre-trained, 80 %", "pre-trained", "tuned"
    ]  # fmt: skip
    assert [row[0] for row in artifact_table([run]).rows][-2:] == ["evaluate/pretrain-at-20", "evaluate/pretrain-at-80"]
    out = tmp_path / "report"
    out.mkdir()
    assert write_report([run], out) == rows
    assert (out / "scores.png").exists()
