"""The quickstart on the real model, with fewer steps and questions than a user gets, but every stage and every task."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.errors import EXIT_DONE
from pipeline.files import read_json
from pipeline.report.results import CURVE_TASKS
from tests.test_pipeline import run

FEWER = [
    "pretrain.steps=6", "pretrain.global_batch=4", "pretrain.sequence_length=256", "pretrain.held_out_blocks=4",
    "pretrain.evaluate_at=[0.0,1.0]", "sft.steps=36", "sft.held_out_blocks=4", "evaluate.limit=16",
]  # fmt: skip
MEMORY_LIMIT = 10 * 2**30
PROMPTS, LONGEST_ANSWER = 32, 256  # tokens; the prompts' own answers are all shorter


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run's directory."""
    place = tmp_path_factory.mktemp("quickstart")
    status, output = run("+experiment=quickstart", *FEWER, cwd=place, threads=2)
    assert status == EXIT_DONE, output
    return place / "outputs" / "quickstart"


def _rows(quickstart: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    rows = json.loads((quickstart / "report" / "results.json").read_text())
    return {(row["target"], row["task"], row["metric"]): row for row in rows}


def test_every_target_is_scored_on_every_task_with_its_standard_error(quickstart: Path) -> None:
    rows = _rows(quickstart)
    metrics = {"held_out_text": "word_perplexity", "python_docs_mcq": "acc", "minimal_pairs": "acc"}
    for target in ("load", "expand", "pretrain", "sft"):
        for task, metric in metrics.items():
            assert rows[target, task, metric]["stderr"] is not None


def test_every_difference_has_its_error_over_pairs_of_documents(quickstart: Path) -> None:
    rows = _rows(quickstart)
    pairs = json.loads((quickstart / "report" / "paired_differences.json").read_text())
    measures = {(task, metric) for _, task, metric in rows if task not in ("cost", *CURVE_TASKS.values())}
    assert len(pairs) == len(measures) * math.comb(4, 2)
    for pair in pairs:
        before, after = (rows[pair[name], pair["task"], pair["metric"]] for name in ("against_target", "target"))
        assert pair["difference"] == after["value"] - before["value"]
        if pair["metric"] == "word_perplexity":  # a text that is hard for one model is hard for the others
            assert pair["stderr"] < 0.7 * math.hypot(before["stderr"], after["stderr"])


def test_expansion_keeps_the_scores_and_training_improves_them(quickstart: Path) -> None:
    rows = _rows(quickstart)
    base, expanded, trained = (
        rows[target, "held_out_text", "word_perplexity"]["value"] for target in ("load", "expand", "pretrain")
    )
    assert expanded == pytest.approx(base, rel=1e-5)
    assert trained < base


def test_the_tuned_model_is_an_ordinary_one(quickstart: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(quickstart / "sft")
    assert model.config.num_hidden_layers == 38


def test_the_tuned_model_stops_by_itself(quickstart: Path) -> None:
    """Greedy answers to prompts of modules that neither corpus nor instructions have seen."""
    tokenizer = AutoTokenizer.from_pretrained(quickstart / "sft", padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(quickstart / "sft", dtype=torch.float32).eval()
    lines = (quickstart / "tokenize" / "instructions" / "held_out.jsonl").read_text().splitlines()
    chats = [json.loads(line)["messages"] for line in lines[:: len(lines) // PROMPTS][:PROMPTS]]
    asked = tokenizer.apply_chat_template(
        [chat[:-1] for chat in chats], add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    with torch.inference_mode():
        ids = model.generate(**asked, do_sample=False, max_new_tokens=LONGEST_ANSWER)
    answers = ids[:, asked["input_ids"].shape[1] :]
    stopped = (answers == tokenizer.convert_tokens_to_ids("<|im_end|>")).any(dim=1)
    assert stopped.float().mean() >= 0.95, tokenizer.batch_decode(answers[~stopped])


def test_no_stage_needs_more_than_ten_gibibytes(quickstart: Path) -> None:
    manifests = [Path(folder, "manifest.json") for pattern in ("*", "*/*") for folder in quickstart.glob(pattern)]
    manifests = [path for path in manifests if path.exists()]
    peaks = {path: read_json(path)["peak_memory_bytes"] for path in manifests}
    assert peaks and all(peak is None or peak < MEMORY_LIMIT for peak in peaks.values())
