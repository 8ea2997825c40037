"""Loss masks of real conversations with SmolLM2's tokenizer and template, read back from the blocks."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from pipeline.artifacts.task import StageTask, TrackingTarget
from pipeline.config import Source, Tokenize
from pipeline.data.python_docs import instruction_pairs
from pipeline.data.templates import PLAIN_TEMPLATE
from pipeline.stages import tokenize
from tests.plain_settings import NO_TRACKING, cpu_launch

LENGTH = 512
SPLITS = ("train", "held_out")
LONG_CONVERSATION = [
    {"role": "system", "content": "You answer in verse – or not at all. 🙂"},
    {"role": "user", "content": "assistant\nWrite a loop."},
    {"role": "assistant", "content": "```python\nfor i in range(3):\n    print(i)\n```\n"},
    {"role": "user", "content": "  Größer, bitte.  "},
    {"role": "assistant", "content": "for i in range(30): ...\n\n  "},
    {"role": "user", "content": "user"},
    {"role": "assistant", "content": "assistant"},
]


def _rows() -> list[dict[str, Any]]:
    """Returns real question-answer pairs in all three formats, and a conversation of several turns."""
    pairs = instruction_pairs(held_out=True)[::4]
    rows: list[dict[str, Any]] = [{"messages": LONG_CONVERSATION}]
    for number, (question, answer) in enumerate(pairs):
        prompt, completion = question["content"], answer["content"]
        rows.append(
            [
                {"messages": [question, answer]},
                {"instruction": prompt, "input": "", "output": completion},
                {"prompt": prompt, "completion": completion},
            ][number % 3]
        )
    return rows


@pytest.fixture(scope="module", params=["model", "plain"])
def dataset(request: pytest.FixtureRequest, smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenized instructions."""
    out = tmp_path_factory.mktemp("instructions")
    chats = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    chats.write_text("\n".join(map(json.dumps, _rows())))
    source = Source(
        kind="files", path=str(chats), config_name=None, split=None, revision=None, text_field=None, weight=1.0
    )
    settings = Tokenize(
        purpose="instructions", sources=[source], sequence_length=LENGTH, held_out_fraction=0.1, max_tokens=None,
        forgetting=None, validation_fraction=0.0, max_forgetting_tokens=None, chat_template=request.param,
        system_messages="keep", max_dropped=0.5, max_record_bytes=2**28,
    )  # fmt: skip
    tracking = TrackingTarget(NO_TRACKING, "g", "tokenize", "i", out)
    launch = cpu_launch()
    tokenize.run(StageTask("tokenize/instructions", settings, {"load": smollm2_dir}, out, 0, launch, tracking))
    return out


def _examples(out: Path) -> list[tuple[list[int], list[int]]]:
    """Returns ids and mask of every example. In a block, position 0 marks the beginning of an example."""
    found = []
    for split in SPLITS:
        names = ("input_ids", "position_ids", "loss_mask")
        arrays = [np.load(out / f"{split}.{name}.npy", allow_pickle=False) for name in names]
        for ids, positions, mask in zip(*arrays, strict=True):
            for begin, end in pairwise([*np.flatnonzero(positions == 0), len(ids)]):
                found.append((ids[begin:end].tolist(), mask[begin:end].tolist()))
    return [(ids, mask) for ids, mask in found if len(set(ids)) > 1]  # without the padding, which repeats one id


def _expected_mask(ids: list[int], begin: list[int], end: int) -> list[int]:
    """Returns the mask found by searching the ids: after every beginning of an answer, up to its end token."""
    mask = [0] * len(ids)
    at = 0
    while at < len(ids):
        if ids[at : at + len(begin)] == begin:
            at += len(begin)
            stop = ids.index(end, at) + 1
            mask[at:stop] = [1] * (stop - at)
            at = stop
        else:
            at += 1
    return mask


def test_only_assistant_messages_and_their_end_of_turn_are_trained_on(dataset: Path, smollm2_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    plain = (dataset / "chat_template.jinja").read_text() == PLAIN_TEMPLATE
    begin = tokenizer("### Response:\n" if plain else "<|im_start|>assistant\n", add_special_tokens=False).input_ids
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    answers: list[str] = []
    examples = _examples(dataset)
    for ids, mask in examples:
        assert mask == _expected_mask(ids, begin, end)
        runs = np.split(np.array(ids), np.flatnonzero(np.diff(mask)) + 1)
        answers += [tokenizer.decode(run) for run in runs[1::2]]
    rows = _rows()
    expected = [message["content"] for message in LONG_CONVERSATION if message["role"] == "assistant"]
    expected += [row.get("output") or row.get("completion") or row["messages"][1]["content"] for row in rows[1:]]
    assert sorted(answers) == sorted(f"{answer}<|im_end|>" for answer in expected)
    assert len(examples) == len(rows)


def test_the_ids_equal_those_of_the_tuned_model_at_inference(dataset: Path, smollm2_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    tokenizer.chat_template = (dataset / "chat_template.jinja").read_text()
    prompts = {tuple(ids[: mask.index(1)]) for ids, mask in _examples(dataset)}
    for line in (dataset / "held_out.jsonl").read_text().splitlines():
        turns = json.loads(line)["messages"]
        first = next(number for number, message in enumerate(turns) if message["role"] == "assistant")
        prompt = tokenizer.apply_chat_template(turns[:first], add_generation_prompt=True, return_dict=False)
        assert tuple(prompt) in prompts
