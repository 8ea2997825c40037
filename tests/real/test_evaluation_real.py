"""The bundled tasks on the real small model: neither too easy nor too hard to show a change."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from pipeline.config import Evaluate
from pipeline.data.chat import ChatTokenizer, chat_template
from pipeline.data.records import single_turn
from pipeline.data.tokenizer import TextTokenizer
from pipeline.evaluation.harness import ScoringJob, score
from pipeline.launch.machine import Placement, detect_machine


def _accuracy(task: str, limit: int | None, model: Path, out: Path) -> float:
    settings = Evaluate(
        tasks=[task],
        include_path=None,
        targets=["load"],
        num_fewshot=None,
        limit=limit,
        held_out_characters=1,
        prompt_format="plain",
        dtype="auto",
        batch_size=32,
    )
    placement = Placement(device="cpu", processes=1, threads=detect_machine().cores)
    (row,) = score(ScoringJob("evaluate/load", model, out, out, placement), settings)["rows"]
    return float(row["value"])


def test_the_base_knows_its_english(smollm2_dir: Path, tmp_path: Path) -> None:
    assert 0.65 <= _accuracy("minimal_pairs", None, smollm2_dir, tmp_path) <= 0.92


def test_the_base_has_something_to_learn_about_the_standard_library(smollm2_dir: Path, tmp_path: Path) -> None:
    """The first hundred questions, a fourth of which has the longest name right; chance is 25 %."""
    assert 0.35 <= _accuracy("python_docs_mcq", 100, smollm2_dir, tmp_path) <= 0.85


def test_its_own_chat_template_is_taught_up_to_the_end_of_turn(smollm2_dir: Path) -> None:
    """The template puts a system message of its own first; only the answer and its end are taught."""

    tokenizer = TextTokenizer(smollm2_dir)
    chat = ChatTokenizer(tokenizer, chat_template(tokenizer, "model"), 512, Counter())
    (rendered,) = chat.tokenize(single_turn("What does gc.collect do?", "Run the garbage collector."))
    text = tokenizer.inner.decode(rendered.input_ids)
    assert text.startswith("<|im_start|>system\n") and text.endswith("<|im_end|>\n")
    taught = [id_ for id_, taught in zip(rendered.input_ids, rendered.loss_mask, strict=True) if taught]
    assert tokenizer.inner.decode(taught) == "Run the garbage collector.<|im_end|>"
    assert json.dumps(rendered.loss_mask).count("1, 0") == 1  # one run of taught tokens
