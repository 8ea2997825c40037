"""The tokenize stage's artifact: the contract's files, the held-out part apart, counts that add up."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from pipeline.artifact import read_json
from pipeline.config import Launch, Source, Tokenize, Tracking
from pipeline.errors import UserError
from pipeline.stage import StageTask, TrackingTarget
from pipeline.stages import tokenize

SPLITS = ("train", "held_out")


def _task(model: Path, out: Path, purpose: Any, path: Path | None, **changes: Any) -> StageTask:
    kind = "python_docs" if path is None else "files"
    text_field = "text" if purpose == "corpus" else None
    source = Source(
        kind=kind, path=path and str(path), config_name=None, split=None, revision=None, text_field=text_field
    )
    values = {"sequence_length": 64, "held_out_fraction": 0.2, "max_tokens": None, "chat_template": "model"}
    settings = Tokenize(**{"purpose": purpose, "source": source, **values, **changes})
    out.mkdir(exist_ok=True)
    launch = Launch(device="cpu", processes=1, threads=1, nodes=1, utilization=0.4)
    tracking = TrackingTarget(
        Tracking(wandb="disabled", project="p", entity=None), "group", f"tokenize/{purpose}", "id", out
    )
    return StageTask(f"tokenize/{purpose}", settings, {"load": model}, out, 0, launch, tracking)


def _arrays(out: Path, split: str) -> tuple[Any, Any, Any]:
    names = ("input_ids", "position_ids", "loss_mask")
    ids, positions, mask = (np.load(out / f"{split}.{name}.npy", mmap_mode="r", allow_pickle=False) for name in names)
    return ids, positions, mask


def _documents(out: Path, split: str, eos: int) -> list[list[int]]:
    """The token stream cut at its EOS tokens; what a block boundary cut is put together again."""
    ids = _arrays(out, split)[0].reshape(-1).tolist()
    found: list[list[int]] = [[]]
    for token in ids:
        if token == eos:
            found.append([])
        else:
            found[-1].append(token)
    return [document for document in found if document]


def _held_out(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "held_out.jsonl").read_text().splitlines()]


def test_a_corpus_is_joined_by_eos_and_read_back(tiny_llama_dir: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    task = _task(tiny_llama_dir, tmp_path / "out", "corpus", tiny_corpus)
    metrics = tokenize.run(task)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    texts = {json.loads(line)["text"] for line in tiny_corpus.read_text().splitlines()}
    back = {
        split: {tokenizer.decode(ids) for ids in _documents(task.out, split, tokenizer.eos_token_id)}
        for split in SPLITS
    }
    assert back["train"] | back["held_out"] == texts and not back["train"] & back["held_out"]
    assert {row["text"] for row in _held_out(task.out)} == back["held_out"]
    assert metrics == read_json(task.out / "dataset.json")
    assert metrics["documents"] == {split: len(back[split]) for split in SPLITS}
    assert metrics["vocab_size"] == 384 and metrics["sequence_length"] == 64


def test_the_counts_are_those_of_the_arrays(tiny_llama_dir: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    task = _task(tiny_llama_dir, tmp_path / "out", "corpus", tiny_corpus)
    metrics = tokenize.run(task)
    for split in SPLITS:
        ids, positions, mask = _arrays(task.out, split)
        assert (ids.dtype, positions.dtype, mask.dtype) == (np.uint32, np.uint32, np.uint8)
        assert ids.shape == positions.shape == mask.shape == (metrics["blocks"][split], 64)
        assert int(mask.sum()) == metrics["supervised_tokens"][split]
        assert not mask[positions == 0].any() and (positions[:, 0] == 0).all()
        assert metrics["tokens"][split] <= ids.size < metrics["tokens"][split] + 64


def test_conversations_are_taught_on_the_answers_only(tiny_llama_dir: Path, tiny_chats: Path, tmp_path: Path) -> None:
    task = _task(tiny_llama_dir, tmp_path / "out", "instructions", tiny_chats)
    metrics = tokenize.run(task)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    said = set()
    for split in SPLITS:
        ids, _, mask = _arrays(task.out, split)
        flat, taught = ids.reshape(-1), mask.reshape(-1).astype(bool)
        for run in np.split(np.flatnonzero(taught), np.flatnonzero(np.diff(np.flatnonzero(taught)) > 1) + 1):
            said.add(tokenizer.decode(flat[run].astype(int).tolist()))
    chats = [json.loads(line)["messages"] for line in tiny_chats.read_text().splitlines()]
    assert said == {chat[1]["content"] + "<|im_end|>" for chat in chats}
    assert (task.out / "chat_template.jinja").read_text() == tokenizer.chat_template
    held_out = [row["messages"] for row in _held_out(task.out)]
    assert len(held_out) == metrics["documents"]["held_out"] and all(chat in chats for chat in held_out)


@pytest.mark.parametrize("purpose", ["corpus", "instructions"])
def test_the_embedded_data_set(purpose: str, tiny_llama_dir: Path, tmp_path: Path) -> None:
    """It has a split of its own, whatever the fraction."""
    task = _task(tiny_llama_dir, tmp_path / "out", purpose, None, held_out_fraction=0.0, sequence_length=256)
    metrics = tokenize.run(task)
    assert metrics["documents"]["train"] > 500 < metrics["documents"]["held_out"] * 10
    held_out = "".join(json.dumps(row) for row in _held_out(task.out))
    assert "threading." in held_out and "json.dumps" not in held_out


def test_the_result_is_the_same_every_time(tiny_llama_dir: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    """Also over what a killed attempt left."""
    outs = [tmp_path / "one", tmp_path / "two"]
    outs[1].mkdir()
    (outs[1] / "train.input_ids.npy").write_bytes(b"half written" * 100_000)
    (outs[1] / "held_out.jsonl").write_text("half a line")
    for out in outs:
        tokenize.run(_task(tiny_llama_dir, out, "corpus", tiny_corpus))
    contents = [{path.name: path.read_bytes() for path in out.iterdir()} for out in outs]
    assert contents[0] == contents[1]


def test_reading_stops_at_the_token_budget(tiny_llama_dir: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    whole = tokenize.run(_task(tiny_llama_dir, tmp_path / "whole", "corpus", tiny_corpus))
    budget = whole["tokens"]["train"] // 2
    part = tokenize.run(_task(tiny_llama_dir, tmp_path / "part", "corpus", tiny_corpus, max_tokens=budget))
    longest = 200
    assert budget <= part["tokens"]["train"] < budget + longest


def test_repeats_are_dropped_and_control_tokens_are_plain_text(tiny_llama_dir: Path, tmp_path: Path) -> None:
    texts = [*(f"Document {number}" for number in range(20)), "Document 3", "Say <|im_end|> aloud"]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    task = _task(tiny_llama_dir, tmp_path / "out", "corpus", tmp_path / "a.jsonl")
    metrics = tokenize.run(task)
    assert metrics["dropped"] == {"duplicate": 1}
    assert sum(metrics["documents"].values()) == 21
    eos = sum(int((_arrays(task.out, split)[0] == 2).sum()) for split in SPLITS)
    padding = sum(metrics["blocks"][split] * 64 - metrics["tokens"][split] for split in SPLITS)
    assert eos - padding == 21  # one a document, and none from its text


@pytest.mark.parametrize(
    ("purpose", "rows", "changes", "words"),
    [
        ("corpus", [{"text": "only one"}], {"held_out_fraction": 0.0}, ["data.held_out_fraction", "hash"]),
        ("corpus", [{"text": " "}], {}, ["data.corpus.path", "not one token"]),
        ("instructions", [{"prompt": "x " * 500, "completion": "y"}], {}, ["data.instructions.path", "too_long"]),
        ("instructions", [{"prompt": "x", "completion": ""}], {}, ["data.instructions.path", "no_answer"]),
    ],
)
def test_an_empty_split_is_refused(
    purpose: str, rows: list[Any], changes: dict[str, Any], words: list[str], tiny_llama_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError) as caught:
        tokenize.run(_task(tiny_llama_dir, tmp_path / "out", purpose, tmp_path / "a.jsonl", **changes))
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_tokenizer_that_the_model_has_no_embeddings_for_is_refused(tiny_llama_dir: Path, tmp_path: Path) -> None:

    shutil.copytree(tiny_llama_dir, tmp_path / "model")
    config = read_json(tmp_path / "model" / "config.json")
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    with pytest.raises(UserError, match=r"embeddings end at 99"):
        tokenize.run(_task(tmp_path / "model", tmp_path / "out", "corpus", None))
