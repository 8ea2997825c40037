"""Prints the answers of transformers and of vLLM, by model: ``python -m tests.real.vllm_answers DIRECTORY...``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pipeline.evaluation.harness  # isort: skip  # noqa: F401  # first, as in a run: it disables the bars of tqdm
import torch
from lm_eval.api.instance import Instance
from transformers import AutoTokenizer

from pipeline.evaluation.lm import LanguageModel
from pipeline.evaluation.vllm import VllmLanguageModel

QUESTIONS = ["What does json.dumps do?", "Name a color.", "Who wrote the play about the prince of Denmark?"]
SETTINGS = {"until": ["\n\n"], "max_gen_toks": 12}  # without do_sample, as many tasks


def answers(directory: Path) -> dict[str, Any]:
    """Returns by program its version, its answers to plain prompts and to chats, and the first tokens of each."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    prompts = {
        "plain": [f"Question: {question}\nAnswer:" for question in QUESTIONS],
        "chat": [tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats],
    }
    found: dict[str, Any] = {}
    for model_class in (LanguageModel, VllmLanguageModel):
        lm = model_class(directory, torch.float32, "cpu", 2)
        program = found[lm.generating_backend.partition(" ")[0]] = {}
        for kind, texts in prompts.items():
            lm.start(kind)
            requests = [Instance("generate_until", {}, arguments=(text, SETTINGS), idx=0) for text in texts]
            program[kind] = [lm.generate_until(requests), lm.first_tokens]
    return found


if __name__ == "__main__":
    print(json.dumps({path: answers(Path(path)) for path in sys.argv[1:]}))
