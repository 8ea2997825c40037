"""Standard errors over pairs of documents, compared with resampling pairs."""

from __future__ import annotations

import json
import math
import random
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.evaluation.scores import Samples, value_of
from pipeline.report import RunArtifacts, write_report
from pipeline.report.differences import PairedDifference, Verdict, compared_models, paired_differences
from pipeline.report.results import collect_results
from pipeline.report.scores import Scores
from tests.report.finished_runs import finished_run, write

DOCUMENTS = 200


def _texts(seed: int, gain: float) -> list[list[float]]:
    """Draws (log likelihood, words) per document. Models share the difficulty but not ``gain``, in nats per word."""
    shared, own = random.Random(0), random.Random(seed)
    return [
        [-words * (shared.gauss(3.0, 0.5) - gain + own.gauss(0, 0.02)), words]
        for words in (shared.randrange(20, 400) for _ in range(DOCUMENTS))
    ]


def _answers(seed: int, gain: float) -> list[float]:
    """Draws correct or incorrect answers, by a difficulty that all models share."""
    shared, own = random.Random(1), random.Random(seed)
    return [float(shared.random() + own.gauss(0, 0.05) < 0.5 + gain) for _ in range(DOCUMENTS)]


def scored(run: RunArtifacts, target: str, task: str, parts: dict[str, Samples], metric: str) -> None:
    """Writes one target's score of a task or group as an evaluation does, from the samples of its tasks."""
    directory = run.directories[f"evaluate/{target}"]
    numbers = [number for samples in parts.values() for number in samples["metrics"][metric]]
    row = {"task": task, "metric": metric, "value": value_of(metric, numbers), "stderr": 0.5, "n": len(numbers)}
    evaluation = json.loads((directory / "evaluation.json").read_text())
    write(directory / "evaluation.json", {**evaluation, "rows": [*evaluation["rows"], row]})
    write(directory / "tasks" / f"{task}.json", {"task": task, "samples": parts})


def _run(root: Path, name: str = "quickstart", gain: float = 0.05, documents: str = "same") -> RunArtifacts:
    run = finished_run(root, name, scores={})
    for seed, (target, more) in enumerate({"load": 0.0, "pretrain": gain}.items()):
        text = Samples(documents=documents, metrics={"word_perplexity": _texts(seed, more)})
        scored(run, target, "held_out_text", {"held_out_text": text}, "word_perplexity")
        answers = Samples(documents=documents, metrics={"acc": _answers(seed, more)})
        scored(run, target, "quiz", {"quiz": answers}, "acc")
    return run


def _only(found: list[PairedDifference], **values: Any) -> PairedDifference:
    (pair,) = [pair for pair in found if all(pair[name] == value for name, value in values.items())]
    return pair


@pytest.mark.parametrize(
    ("task", "metric", "make"), [("held_out_text", "word_perplexity", _texts), ("quiz", "acc", _answers)]
)
def test_the_paired_error_matches_the_bootstrap_over_pairs(tmp_path: Path, task: str, metric: str, make: Any) -> None:
    pair = _only(paired_differences([_run(tmp_path)]), task=task)
    before, after = make(0, 0.0), make(1, 0.05)
    draw = np.random.default_rng(0)
    drawn = []
    for _ in range(3000):
        chosen = draw.integers(0, DOCUMENTS, DOCUMENTS)
        drawn.append(value_of(metric, [after[i] for i in chosen]) - value_of(metric, [before[i] for i in chosen]))
    assert pair["stderr"] == pytest.approx(np.std(drawn), rel=0.1)
    assert pair["difference"] == pytest.approx(value_of(metric, after) - value_of(metric, before))
    assert (pair["n"], pair["changed"]) == (DOCUMENTS, sum(x != y for x, y in zip(before, after, strict=True)))
    assert (pair["against_target"], pair["target"]) == ("load", "pretrain")


def test_pairs_reveal_a_difference_that_independent_errors_hide(tmp_path: Path) -> None:
    """In either order of the models, and in the written report."""
    run = _run(tmp_path)
    rows = collect_results([run])
    with_pairs, without = Scores(rows, paired_differences([run])), Scores(rows)
    base, after = (with_pairs.get(run.name, target, ("quiz", "acc")) for target in ("load", "pretrain"))
    assert base is not None and after is not None
    assert without.difference(base, after).verdict is Verdict.NOISE
    assert with_pairs.difference(base, after).verdict is Verdict.BETTER
    assert with_pairs.difference(after, base).verdict is Verdict.WORSE
    assert with_pairs.best([base, after]) is after and without.best([base, after]) is None
    assert with_pairs.unpaired() == [] and without.unpaired() == with_pairs.task_metrics()
    out = tmp_path / "report"
    out.mkdir()
    write_report([run], out)
    assert json.loads((out / "paired_differences.json").read_text()) == paired_differences([run])
    assert f"{100 * after['value']:.1f} ± 50.0 %** ▲" in (out / "report.md").read_text()


def test_scores_on_different_documents_are_not_paired(tmp_path: Path) -> None:
    runs = [_run(tmp_path / name, name, documents=name) for name in ("a", "b")]
    assert {(pair["run"], pair["against_run"]) for pair in paired_differences(runs)} == {("a", "a"), ("b", "b")}
    runs = [_run(tmp_path / "shared", name) for name in ("a", "b")]
    pair = _only(paired_differences(runs), task="quiz", run="b", target="pretrain", against_target="pretrain")
    assert pair["against_run"] == "a" and pair["stderr"] == 0 and pair["changed"] == 0


def test_a_sweep_names_the_metrics_whose_differences_are_not_paired(tmp_path: Path) -> None:
    """Pairs within each run do not pair the runs with each other."""
    same = [_run(tmp_path / "same", name) for name in ("a", "b")]
    assert Scores(collect_results(same), paired_differences(same)).unpaired() == []
    other = [_run(tmp_path / name, name, documents=name) for name in ("a", "b")]
    scores = Scores(collect_results(other), paired_differences(other))
    assert scores.unpaired() == scores.task_metrics()


def test_runs_are_compared_with_one_base_only() -> None:
    models = [(run, target) for run in "abc" for target in ("load", "expand", "pretrain")]
    found = list(compared_models(models))
    assert len(found) == len(set(found)) == 3 * 3 + 2 * 3 + 2 * 3  # within runs, by target, with a's base
    assert all((one, other) in found for one, other in combinations(models[:3], 2))
    assert (("a", "load"), ("c", "pretrain")) in found and (("b", "load"), ("c", "pretrain")) not in found


def test_metrics_that_are_not_means_over_documents_are_not_paired(tmp_path: Path) -> None:
    """F1 from (gold, predicted), a mean over lists of unequal lengths, and values that are not numbers."""
    run = finished_run(tmp_path, scores={})
    samples = {
        "f1": [[1.0, 0.0]] * 9, "inst_level_acc": [[1.0], [0.0, 1.0]], "bleu": [[None, None]] * 9, "em": [1.0, None],
    }  # fmt: skip
    for target in ("load", "pretrain"):
        directory = run.directories[f"evaluate/{target}"]
        rows = [{"task": "odd", "metric": metric, "value": 0.5, "stderr": 0.1, "n": 9} for metric in samples]
        evaluation = json.loads((directory / "evaluation.json").read_text())
        write(directory / "evaluation.json", {**evaluation, "rows": rows})
        kept = {"odd": Samples(documents="same", metrics=samples)}
        write(directory / "tasks" / "odd.json", {"task": "odd", "samples": kept})
    assert paired_differences([run]) == []
    out = tmp_path / "report"
    out.mkdir()
    write_report([run], out)
    assert "Some differences in odd f1, odd inst_level_acc, odd bleu, odd em have no" in (out / "report.md").read_text()


def test_the_paired_error_of_a_perplexity_with_equally_weighted_documents(tmp_path: Path) -> None:
    """As LAMBADA's: exp of minus the mean log likelihood."""
    run = finished_run(tmp_path, scores={})
    numbers = {}
    for seed, target in enumerate(("load", "pretrain")):
        numbers[target] = [total / words for total, words in _texts(seed, 0.05 * seed)]
        parts = {"lambada": Samples(documents="same", metrics={"perplexity": numbers[target]})}
        scored(run, target, "lambada", parts, "perplexity")
    (pair,) = paired_differences([run])
    before, after = (np.exp(-np.mean(numbers[target])) for target in ("load", "pretrain"))
    assert pair["difference"] == pytest.approx(after - before)
    moved = before * np.array(numbers["load"]) - after * np.array(numbers["pretrain"])
    assert pair["stderr"] == pytest.approx(np.std(moved, ddof=1) / math.sqrt(DOCUMENTS))


def test_a_group_is_paired_over_all_its_documents_if_they_reproduce_its_score(tmp_path: Path) -> None:
    run = finished_run(tmp_path, scores={})
    sizes = {"one": 150, "two": 50}
    parts = {}
    for seed, target in enumerate(("load", "pretrain")):
        answers = _answers(seed, 0.1 * seed)
        parts[target] = {
            "one": Samples(documents="1", metrics={"acc": answers[: sizes["one"]]}),
            "two": Samples(documents="2", metrics={"acc": answers[sizes["one"] :]}),
        }
        scored(run, target, "suite", parts[target], "acc")
    pair = _only(paired_differences([run]), task="suite")
    moved = [y - x for x, y in zip(_answers(0, 0.0), _answers(1, 0.1), strict=True)]
    mean = sum(moved) / DOCUMENTS
    error = math.sqrt(sum((m - mean) ** 2 for m in moved) / (DOCUMENTS - 1) / DOCUMENTS)
    assert pair["stderr"] == pytest.approx(error) and pair["n"] == DOCUMENTS

    file = run.directories["evaluate/pretrain"] / "evaluation.json"
    evaluation = json.loads(file.read_text())
    evaluation["rows"][-1]["value"] = sum(sum(s["metrics"]["acc"]) / sizes[t] for t, s in parts["pretrain"].items()) / 2
    write(file, evaluation)  # the mean of the tasks' means differs from the mean over all documents
    assert paired_differences([run]) == []
