"""The evaluate stage: scores with standard errors, one file per task, and no task scored twice."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from pipeline.artifacts.task import SAME_LOGITS, StageTask, TrackingTarget, task_from_json, task_to_json
from pipeline.config import Evaluate, EvaluateSnapshot
from pipeline.errors import UserError, WorkersFailed
from pipeline.evaluation import harness
from pipeline.evaluation.catalogue import BUNDLED
from pipeline.evaluation.minimal_pairs import build_pairs
from pipeline.evaluation.task_documents import write_documents
from pipeline.files import is_intact, read_json, write_json
from pipeline.models.reading import ModelDirectory
from pipeline.models.replacing import write_with_replaced
from pipeline.models.stored_parameters import StoredParameters
from pipeline.models.tensors import dtype_of
from pipeline.stages import evaluate
from pipeline.training.job import snapshot_dir
from pipeline.training.snapshots import save_snapshot
from tests.evaluation.custom_tasks import write_custom_tasks, write_rows
from tests.plain_settings import NO_TRACKING, cpu_launch


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Held-out text as tokenize/corpus writes it."""
    texts = [f"Return item {number} of the container.\n" * (3 + number % 7) for number in range(30)]
    return _held_out(tmp_path_factory.mktemp("corpus_artifact"), {"data.corpus": texts})


def _held_out(directory: Path, texts: dict[str, list[str]]) -> Path:
    """The held-out documents of several sources, interleaved."""
    rows = [
        {"text": text, "source": source} for together in zip(*texts.values(), strict=True)
        for source, text in zip(texts, together, strict=True)
    ]  # fmt: skip
    directory.mkdir(exist_ok=True)
    (directory / "held_out.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return directory


def _task(model: Path, corpus: Path, out: Path, processes: int = 1, **changes: Any) -> StageTask:
    values = {
        "tasks": list(BUNDLED), "include_path": None, "targets": ["load"], "num_fewshot": None, "limit": 12,
        "held_out_characters": 4000, "prompt_format": "plain", "dtype": "auto", "batch_size": 8,
        "rescore": False, "backend": "hf", "sample_answers": 0,
        "processes": "auto",
    }  # fmt: skip
    out.mkdir(exist_ok=True)
    launch = cpu_launch(processes)
    tracking = TrackingTarget(NO_TRACKING, "group", "evaluate/load", "id", out)
    settings = Evaluate(**{**values, **changes})
    return StageTask("evaluate/load", settings, {"model": model, "corpus": corpus}, out, 0, launch, tracking)


def test_text_without_spaces_is_scored_by_bytes(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """A passage is one word by white space, and exp of its negative log likelihood overflows."""
    texts = [f"第{number}章" + "编辑器返回容器中的项目数量" * 20 for number in range(3)]
    corpus = _held_out(tmp_path / "corpus", {"data.corpus": texts})
    task = _task(tiny_llama_dir, corpus, tmp_path / "out", tasks=["held_out_text"])
    evaluate.run(task)
    rows = read_json(task.out / "evaluation.json")["rows"]
    assert [row["metric"] for row in rows] == ["byte_perplexity", "bits_per_byte"]
    assert all(row["value"] > 1 and row["stderr"] > 0 for row in rows)


def test_all_bundled_tasks_have_scores_with_standard_errors(tiny_llama_dir: Path, corpus: Path, tmp_path: Path) -> None:
    task = _task(tiny_llama_dir, corpus, tmp_path / "out")
    metrics = evaluate.run(task)
    evaluation = read_json(task.out / "evaluation.json")
    rows = {(row["task"], row["metric"]): row for row in evaluation["rows"]}
    assert set(rows) == {
        ("held_out_text", "word_perplexity"), ("held_out_text", "byte_perplexity"), ("held_out_text", "bits_per_byte"),
        ("python_docs_mcq", "acc"), ("minimal_pairs", "acc"),
    }  # fmt: skip
    assert all(row["stderr"] > 0 and row["n"] == 12 for row in rows.values())
    assert evaluation["dtype"] == dtype_of("auto", "cpu")
    assert (evaluation["prompt_format"], evaluation["device"]) == ("plain", "cpu")
    assert {row["backend"] for row in rows.values()} == {f"hf {transformers.__version__}"}
    assert [first["task"] for first in evaluation["first_tokens"]] == list(BUNDLED)
    assert all(first["ids"] for first in evaluation["first_tokens"])
    assert metrics["table"]["columns"] == ["task", "metric", "value", "stderr", "n"]
    assert len(metrics["table"]["rows"]) == len(rows)


@pytest.mark.parametrize("difference", [0.0, 1e-7])
def test_a_model_with_exactly_the_same_logits_has_the_scores_of_the_other(
    difference: float, tiny_llama_dir: Path, corpus: Path, tmp_path: Path
) -> None:
    """Of a model that cannot be loaded, which shows whether it was scored."""
    scored = _task(tiny_llama_dir, corpus, tmp_path / "scored", tasks=["held_out_text"])
    expected = evaluate.run(scored)
    write_json(scored.out / "manifest.json", {"stage": "evaluate/load"})
    (tmp_path / "model").mkdir()
    write_json(tmp_path / "model" / "manifest.json", {"metrics": {"check": {"logit_difference": difference}}})
    task = _task(tmp_path / "model", corpus, tmp_path / "out", tasks=["held_out_text"])
    task = replace(task, parents={**task.parents, SAME_LOGITS: scored.out})
    if difference:
        with pytest.raises(FileNotFoundError, match="config.json"):
            evaluate.run(task)
        return
    assert evaluate.run(task)["scores"] == expected["scores"]
    assert read_json(task.out / "evaluation.json")["scores_of"] == "load"
    file = Path("tasks", "held_out_text.json")
    assert (task.out / file).read_bytes() == (scored.out / file).read_bytes()


def test_bits_per_byte_follow_from_the_values_per_document(tiny_llama_dir: Path, corpus: Path, tmp_path: Path) -> None:
    task = _task(tiny_llama_dir, corpus, tmp_path / "out", tasks=["held_out_text"], limit=None)
    evaluate.run(task)
    answer = read_json(task.out / "tasks" / "held_out_text.json")
    texts = [json.loads(line)["text"] for line in (task.out / "documents" / "held_out_text.jsonl").open()]
    samples = answer["samples"]["held_out_text"]["metrics"]["bits_per_byte"]
    assert [length for _, length in samples] == [len(text.encode()) for text in texts]
    bits = {row["metric"]: row["value"] for row in answer["rows"]}["bits_per_byte"]
    nats = -sum(loglikelihood for loglikelihood, _ in samples)
    assert bits == pytest.approx(nats / 0.6931471805599453 / sum(map(len, texts)))


def test_held_out_text_of_several_sources_is_scored_in_total_and_by_source(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    """A source's score is the same as without the other sources, and every source has the same number of characters."""
    texts = {
        "data.corpus.0": [f"Return item {number} of the container.\n" * 9 for number in range(9)],
        "data.corpus.1": [f"The {number} ministers met again in spring.\n" * 5 for number in range(9)],
    }
    mixed = _held_out(tmp_path / "mixed", texts)
    settings = {"tasks": ["held_out_text"], "limit": None, "held_out_characters": 1500}
    found = evaluate.run(_task(tiny_llama_dir, mixed, tmp_path / "out", **settings))["table"]["rows"]
    expected = []
    for source, documents in texts.items():
        alone = _held_out(tmp_path / source, {"data.corpus": documents})
        rows = evaluate.run(_task(tiny_llama_dir, alone, tmp_path / f"out-{source}", **settings))["table"]["rows"]
        expected += [[f"{task}/{source}", *numbers] for task, *numbers in rows]
    assert [row[0] for row in found] == 3 * ["held_out_text"] + [row[0] for row in expected]
    assert [row[1] for row in found[3:]] == [row[1] for row in expected]
    np.testing.assert_allclose([row[2:] for row in found[3:]], [row[2:] for row in expected], rtol=1e-5)
    assert [row[4] for row in found[:3]] == 3 * [expected[0][4] + expected[3][4]]
    kept = read_json(tmp_path / "out" / "tasks" / "held_out_text.json")["samples"]
    assert {task: len(samples["metrics"]["bits_per_byte"]) for task, samples in kept.items()} == {
        task: n for task, metric, _, _, n in found if metric == "bits_per_byte"
    }


def test_a_killed_evaluation_loses_at_most_one_task(
    tiny_llama_dir: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[str] = []
    score = harness._score_task

    def dying(name: str, *rest: Any) -> dict[str, Any]:
        if name == "minimal_pairs" and len(scored) < 3:
            scored.append("died")
            raise KeyboardInterrupt
        scored.append(name)
        return score(name, *rest)

    monkeypatch.setattr(harness, "_score_task", dying)
    task = _task(tiny_llama_dir, corpus, tmp_path / "out", limit=4)
    with pytest.raises(KeyboardInterrupt):
        evaluate.run(task)
    assert sorted(path.stem for path in (task.out / "tasks").glob("*.json")) == ["held_out_text", "python_docs_mcq"]
    evaluate.run(task)
    assert scored == ["held_out_text", "python_docs_mcq", "died", "minimal_pairs"]
    assert len(rows := read_json(task.out / "evaluation.json")["rows"]) == 5
    result = task.out / "tasks" / "minimal_pairs.json"
    result.write_text(result.read_text().replace('"value": 0', '"value": 8', 1))
    evaluate.run(task)
    assert scored[4:] == ["minimal_pairs"] and read_json(task.out / "evaluation.json")["rows"] == rows


SPLIT = """
task: split
include: _base.yaml
dataset_kwargs: {data_files: {test: data/words.jsonl}}
output_type: generate_until
doc_to_text: "Repeat: {{word}}"
doc_to_target: !function failing.target
generation_kwargs: {until: ["."], max_gen_toks: 4}
num_fewshot: 2
metric_list: [{metric: exact_match}]
"""
FAILING = """
import os

def target(document):
    if os.environ.get("RANK") == "1" and document["word"] == "word 8" and os.path.exists("FAIL"):
        raise RuntimeError("a metric failed")
    return document["word"]
"""


def test_two_processes_give_exactly_the_scores_of_one_and_resume_after_a_failure(
    tiny_llama_dir: Path, corpus: Path, own_tasks: Path, tmp_path: Path
) -> None:
    """With random few-shot examples: which ones a document has depends on the documents before it."""
    (own_tasks / "split.yaml").write_text(SPLIT)
    fails = tmp_path / "fails"
    fails.touch()
    (own_tasks / "failing.py").write_text(FAILING.replace("FAIL", str(fails)))
    write_rows(own_tasks / "data" / "words.jsonl", [{"word": f"word {number}"} for number in range(9)])
    names = ["held_out_text", "capitals", "split"]
    settings = {"tasks": names, "include_path": str(own_tasks), "batch_size": 2}
    shared = _task(tiny_llama_dir, corpus, tmp_path / "shared", processes=2, **settings)
    with pytest.raises(WorkersFailed, match=r"rank 1 of 2: RuntimeError: a metric failed(.|\n)*rank-1\.log"):
        evaluate.run(shared)
    done = [is_intact(shared.out / "tasks" / f".{name}.sha256") for name in names]
    assert done == [True, True, False]
    fails.unlink()
    metrics = evaluate.run(shared)
    alone = _task(tiny_llama_dir, corpus, tmp_path / "alone", **settings)
    assert evaluate.run(alone) == metrics
    for name in names:
        first, second = (read_json(task.out / "tasks" / f"{name}.json") for task in (alone, shared))
        assert {**first, "seconds": 0} == {**second, "seconds": 0}
    assert not list(shared.out.rglob("part-*"))


def test_scores_are_deterministic(tiny_llama_dir: Path, corpus: Path, tmp_path: Path) -> None:
    rows = []
    for out in ("one", "two"):
        evaluate.run(_task(tiny_llama_dir, corpus, tmp_path / out, limit=6))
        rows.append(read_json(tmp_path / out / "evaluation.json")["rows"])
    assert rows[0] == rows[1]


def test_a_chat_format_needs_a_chat_template(tiny_llama_dir: Path, corpus: Path, tmp_path: Path) -> None:
    chat = _task(tiny_llama_dir, corpus, tmp_path / "chat", prompt_format="chat", tasks=["python_docs_mcq"], limit=2)
    evaluate.run(chat)
    first = read_json(chat.out / "evaluation.json")["first_tokens"][0]["ids"]
    assert first[0] == 1  # <|im_start|>
    shutil.copytree(tiny_llama_dir, tmp_path / "bare")
    (tmp_path / "bare" / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="prompt_format"):
        evaluate.run(_task(tmp_path / "bare", corpus, tmp_path / "out", prompt_format="chat", limit=2))


def test_the_requested_number_of_few_shot_examples_is_used(tiny_llama_dir: Path, corpus: Path, tmp_path: Path) -> None:
    """A task that fixes zero examples, as all bundled ones do, keeps zero."""
    task = _task(tiny_llama_dir, corpus, tmp_path / "out", num_fewshot={"minimal_pairs": 3}, limit=2)
    evaluate.run(task)
    assert read_json(task.out / "tasks" / "minimal_pairs.json")["num_fewshot"] == {"minimal_pairs": 0}


# --------------------------------------------------------------------------------------- documents


def _written(corpus: Path, folder: Path, characters: int) -> list[str]:
    path = write_documents("held_out_text", corpus, folder, characters)
    return [json.loads(line)["text"] for line in path.open()]


def test_held_out_text_is_a_fixed_subset_of_bounded_size(corpus: Path, tmp_path: Path) -> None:
    everything = _written(corpus, tmp_path, 10**9)
    assert len(everything) == 30
    some = _written(corpus, tmp_path, 2000)
    assert some == everything[: len(some)] and 2000 <= sum(map(len, some)) < 2400
    lines = (corpus / "held_out.jsonl").read_text().splitlines()
    (tmp_path / "held_out.jsonl").write_text("\n".join(lines[::-1]))
    assert _written(tmp_path, tmp_path, 2000) == some  # independent of the order of the lines


def test_long_documents_are_truncated_at_a_line_end(tmp_path: Path) -> None:
    text = "".join(f"line {number}\n" for number in range(2000))
    _held_out(tmp_path, {"data.corpus": [text]})
    (passage,) = _written(tmp_path, tmp_path, 10**6)
    assert text.startswith(passage) and passage.endswith("\n") and 900 < len(passage) <= 1000


def test_minimal_pairs_are_written_unchanged(corpus: Path, tmp_path: Path) -> None:
    path = write_documents("minimal_pairs", corpus, tmp_path, 1)
    assert [json.loads(line)["choices"] for line in path.open()] == [pair.choices for pair in build_pairs()]


def test_a_snapshot_is_scored_as_it_was_and_leaves_no_copy(tiny_llama_dir: Path, corpus: Path, tmp_path: Path) -> None:
    """The finished model's layer 1 is changed; the snapshot at 20 % is the untouched model."""
    base, name = ModelDirectory(tiny_llama_dir), "model.layers.1.mlp.down_proj.weight"
    artifact = tmp_path / "artifact"
    artifact.mkdir()
    save_snapshot(snapshot_dir(artifact, 0.2), StoredParameters(base), [name], iter([(name, base.read(name))]))
    write_with_replaced(tiny_llama_dir, artifact, {name: base.read(name) * 50})
    plain = _task(tiny_llama_dir, corpus, tmp_path / "plain", tasks=["held_out_text"])
    task = _task(artifact, corpus, tmp_path / "way", tasks=["held_out_text"])
    snapshot = EvaluateSnapshot(**task.settings.model_dump(), fraction=0.2)
    rows = [evaluate.run(each)["scores"] for each in (plain, replace(task, settings=snapshot))]
    assert rows[0] == rows[1]
    changed = evaluate.run(_task(artifact, corpus, tmp_path / "end", tasks=["held_out_text"]))["scores"]
    assert changed != rows[0]
    assert not (task.out / "model").exists()
    again = task_from_json(json.loads(json.dumps(task_to_json(replace(task, settings=snapshot)))))
    assert again.settings == snapshot


# ------------------------------------------------------------------------------- the user's own tasks


@pytest.fixture
def own_tasks(tmp_path: Path) -> Path:
    return write_custom_tasks(tmp_path / "own_tasks")


def test_local_tasks_groups_and_tags_are_scored(
    tiny_llama_dir: Path, corpus: Path, own_tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # data paths are relative to the YAML files, not to the working directory
    requested = ["capitals", "repeat", "minimal_pairs"]
    task = _task(tiny_llama_dir, corpus, tmp_path / "out", tasks=requested, include_path=str(own_tasks), limit=None)
    rows = {row[0]: row for row in evaluate.run(task)["table"]["rows"]}
    assert {name: (row[1], row[4]) for name, row in rows.items() if name in ("capitals", "repeat")} == {
        "capitals": ("acc", 4), "repeat": ("exact_match", 3),
    }  # fmt: skip
    assert all(first["ids"] for first in read_json(task.out / "evaluation.json")["first_tokens"])
    for name, members in {"own_suite": ["capitals", "repeat"], "geography": ["capitals"]}.items():
        task = _task(tiny_llama_dir, corpus, tmp_path / name, tasks=[name], include_path=[str(own_tasks)], limit=2)
        assert [row[0] for row in evaluate.run(task)["table"]["rows"]] == members


def test_a_template_that_does_not_fit_the_data_is_refused_before_a_model_is_loaded(
    corpus: Path, own_tasks: Path, tmp_path: Path
) -> None:
    (own_tasks / "capitals.yaml").write_text((own_tasks / "capitals.yaml").read_text().replace("country", "state"))
    task = _task(tmp_path / "no model", corpus, tmp_path / "out", tasks=["capitals"], include_path=str(own_tasks))
    with pytest.raises(UserError, match=r"capitals.yaml: lm-eval cannot build capitals .*'state' is undefined"):
        evaluate.run(task)


def test_a_cluster_that_is_not_a_field_of_the_data_is_refused_before_a_model_is_loaded(
    corpus: Path, own_tasks: Path, tmp_path: Path
) -> None:
    with open(own_tasks / "capitals.yaml", "a") as file:
        file.write("metadata: {version: 1, cluster: continent}\n")
    task = _task(tmp_path / "no model", corpus, tmp_path / "out", tasks=["capitals"], include_path=str(own_tasks))
    with pytest.raises(UserError, match=r"lm-eval cannot build capitals from it \(KeyError: 'continent'\)"):
        evaluate.run(task)
