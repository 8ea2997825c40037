"""The bundled tasks on the real small model: they are neither too easy nor too hard to show a change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance

from pipeline.config import Evaluate
from pipeline.data.chat import ChatTokenizer, chat_template
from pipeline.data.records import Drops, Example, single_turn
from pipeline.data.templates import TemplateProcess
from pipeline.data.tokenizer import TextTokenizer
from pipeline.evaluation.harness import ScoringJob, read_evaluation, score
from pipeline.evaluation.lm import LanguageModel
from pipeline.evaluation.questions import build_questions
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
        rescore=False,
        backend="hf",
        processes="auto",
        sample_answers=0,
    )
    placement = Placement(device="cpu", processes=1, threads=detect_machine().cores)
    job = ScoringJob("evaluate/load", model, out, out, placement)
    score(job, settings)
    (row,) = read_evaluation(job, settings)["rows"]
    return float(row["value"])


def test_the_base_model_prefers_grammatical_sentences(smollm2_dir: Path, tmp_path: Path) -> None:
    assert 0.65 <= _accuracy("minimal_pairs", None, smollm2_dir, tmp_path) <= 0.92


def test_the_base_model_knows_the_standard_library_partially(smollm2_dir: Path, tmp_path: Path) -> None:
    """A hundred questions. Chance is 25 %."""
    assert 0.35 <= _accuracy("python_docs_mcq", 100, smollm2_dir, tmp_path) <= 0.85


def test_choices_in_bfloat16_are_those_of_a_float32_softmax(smollm2_dir: Path) -> None:
    """The first 25 questions. With the log-softmax in bfloat16, two answers change and two tie for the best."""
    lm = LanguageModel(smollm2_dir, torch.bfloat16, "cpu", 32)
    asked = [(f"{name}\n   ", f" {question.summary}") for question in build_questions()[:25] for name in question.names]
    requests = [Instance("loglikelihood", {}, arguments=pair, idx=0) for pair in asked]
    batches: list[tuple[torch.Tensor, torch.Tensor]] = []
    call = lm._model_call

    def spy(ids: torch.Tensor, **details: Any) -> torch.Tensor:
        logits = call(ids, **details)
        batches.append((ids, logits.float().log_softmax(-1)))
        return logits

    lm._model_call = spy  # type: ignore[method-assign]
    found = [value for value, _ in lm.loglikelihood(requests)]
    expected = []
    for context, continuation in asked:
        ids = lm.tok_encode(context + continuation)
        first = len(lm.tok_encode(context.rstrip()))
        scores = next(
            score[row]
            for batch, score in batches
            for row, line in enumerate(batch.tolist())
            if line[: len(ids) - 1] == ids[:-1]
        )
        expected.append(sum(scores[at - 1, ids[at]].item() for at in range(first, len(ids))))
    assert found == pytest.approx(expected, rel=1e-5)
    choices, wanted = (np.reshape(values, (25, 4)).argmax(1).tolist() for values in (found, expected))
    assert choices == wanted
    assert all(np.unique(np.reshape(found, (25, 4))[row]).size == 4 for row in range(25))  # no ties


def test_answers_in_the_chat_template_of_the_model_are_trained_up_to_the_end_of_turn(smollm2_dir: Path) -> None:
    """The template adds a system message. Only the answer and its end-of-turn token have a loss."""
    tokenizer = TextTokenizer(smollm2_dir)
    conversation = single_turn("What does gc.collect do?", "Run the garbage collector.")
    with TemplateProcess(chat_template(tokenizer, "model"), tokenizer.special_tokens) as template:
        (rendered,) = ChatTokenizer(tokenizer, template, 512, Drops()).tokenize(Example(conversation, None))
    text = tokenizer.inner.decode(rendered.input_ids)
    assert text.startswith("<|im_start|>system\n") and text.endswith("<|im_end|>\n")
    trained = [id_ for id_, in_loss in zip(rendered.input_ids, rendered.loss_mask, strict=True) if in_loss]
    assert tokenizer.inner.decode(trained) == "Run the garbage collector.<|im_end|>"
    assert json.dumps(rendered.loss_mask).count("1, 0") == 1  # the trained tokens are contiguous
