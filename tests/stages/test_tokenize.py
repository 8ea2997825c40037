"""The tokenize stage's artifact: the contract's files, the held-out part apart, counts that add up."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from pipeline.artifacts.task import StageTask, TrackingTarget
from pipeline.config import Source, Tokenize, Tracking
from pipeline.data import python_docs
from pipeline.errors import UserError
from pipeline.files import read_json
from pipeline.stages import tokenize
from tests.plain_settings import cpu_launch

SPLITS = ("train", "held_out")


def _source(purpose: Any, path: Path | None, weight: float = 1.0) -> Source:
    kind = "python_docs" if path is None else "files"
    text_field = "text" if purpose == "corpus" else None
    place = path and str(path)
    return Source(
        kind=kind, path=place, config_name=None, split=None, revision=None, text_field=text_field, weight=weight
    )


def _task(model: Path, out: Path, purpose: Any, path: Path | None, **changes: Any) -> StageTask:
    source = _source(purpose, path)
    values = {"sequence_length": 64, "held_out_fraction": 0.2, "max_tokens": None, "chat_template": "model"}
    settings = Tokenize(**{"purpose": purpose, "sources": [source], **values, **changes})
    out.mkdir(exist_ok=True)
    launch = cpu_launch()
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
    assert metrics["end_of_turn"] == tokenizer.eos_token_id
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
    more = tokenize.run(_task(tiny_llama_dir, tmp_path / "more", "corpus", tiny_corpus, max_tokens=10 * budget))
    assert more["tokens"] == whole["tokens"] and "was not reached" in more["warnings"][0]


def _jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return path


def _two(tmp_path: Path, weights: tuple[float, float], lengths: tuple[int, int] = (30, 7)) -> list[Source]:
    """Two sources of a thousand documents each, told apart by their first word."""
    return [
        _source(
            "corpus", _jsonl(tmp_path / f"{name}.jsonl", [f"{name} {n} " + "x" * (n % length) for n in range(1000)]), w
        )
        for name, w, length in zip(("left", "right"), weights, lengths, strict=True)
    ]


def _tokens_by_source(out: Path, model: Path) -> dict[str, int]:
    """Training tokens by the first word of their document, each with its EOS."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    found = {"left": 0, "right": 0}
    for ids in _documents(out, "train", tokenizer.eos_token_id):
        found[tokenizer.decode(ids).split()[0]] += len(ids) + 1
    return found


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.9, 0.1), (3.0, 9.0)])
def test_a_weight_is_a_share_of_the_training_tokens(
    weights: tuple[float, float], tiny_llama_dir: Path, tmp_path: Path
) -> None:
    sources = _two(tmp_path, weights)
    task = _task(tiny_llama_dir, tmp_path / "out", "corpus", None, sources=sources, max_tokens=5000)
    metrics = tokenize.run(task)
    found = _tokens_by_source(task.out, tiny_llama_dir)
    longest = 40
    assert abs(found["left"] - sum(found.values()) * weights[0] / sum(weights)) < longest
    assert sum(found.values()) == metrics["tokens"]["train"] < 5000 + longest
    assert [source["tokens"]["train"] for source in metrics["sources"]] == list(found.values())
    held_out = {(row["source"], row["text"].split()[0]) for row in _held_out(task.out)}
    assert held_out == {(f"data.corpus.{number}", word) for number, word in enumerate(found)}
    assert metrics["warnings"] == []


def test_a_source_without_a_held_out_document_is_named(tiny_llama_dir: Path, tmp_path: Path) -> None:
    few = _source("corpus", _jsonl(tmp_path / "few.jsonl", ["one alone " * 40]), 0.01)
    task = _task(tiny_llama_dir, tmp_path / "out", "corpus", None, sources=[_two(tmp_path, (1.0, 1.0))[0], few])
    warnings = [warning for warning in tokenize.run(task)["warnings"] if "no held-out document" in warning]
    assert len(warnings) == 1 and warnings[0].startswith("data.corpus.1 ") and "held_out_fraction" in warnings[0]


def test_the_shares_hold_until_the_first_source_runs_out(tiny_llama_dir: Path, tmp_path: Path) -> None:
    task = _task(tiny_llama_dir, tmp_path / "out", "corpus", None, sources=_two(tmp_path, (0.1, 0.9)))
    metrics = tokenize.run(task)
    left, right = _tokens_by_source(task.out, tiny_llama_dir).values()
    assert abs(left / (left + right) - 0.1) < 0.01
    assert [source["ran_out"] for source in metrics["sources"]] == [False, True]
    assert len(metrics["warnings"]) == 1 and metrics["warnings"][0].startswith("data.corpus.1 ran out")


def test_held_out_text_is_never_trained_on(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """Read back from the blocks: sources that share documents with each other and repeat their own."""
    texts = [f"Document number {number}, " + "and so on, " * (number % 7) for number in range(500)]
    _jsonl(tmp_path / "a.jsonl", [*texts[:300], *(f"{text}\n\n" for text in texts[100:200])])
    _jsonl(tmp_path / "b.jsonl", [*texts[200:], *(f"  {text}" for text in texts[:100]), *texts[400:]])
    sources = [_source("corpus", tmp_path / f"{name}.jsonl") for name in "ab"]
    task = _task(tiny_llama_dir, tmp_path / "out", "corpus", None, sources=sources, held_out_fraction=0.3)
    metrics = tokenize.run(task)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    sides = [
        [tokenizer.decode(ids).strip() for ids in _documents(task.out, split, tokenizer.eos_token_id)]
        for split in SPLITS
    ]
    assert not set(sides[0]) & set(sides[1]) and all(sides)
    assert all(len(set(side)) == len(side) for side in sides)
    assert {*sides[0], *sides[1]} <= {text.strip() for text in texts}
    assert {row["text"].strip() for row in _held_out(task.out)} == set(sides[1])
    kept = sum(metrics["documents"].values())
    assert kept == len(sides[0]) + len(sides[1]) > 400
    assert metrics["dropped"]["duplicate"] > 100


def test_what_the_embedded_docs_hold_out_is_not_trained_on_from_a_file(tiny_llama_dir: Path, tmp_path: Path) -> None:
    held_out = python_docs.documents(held_out=True)[:40]
    sources = [_source("corpus", _jsonl(tmp_path / "a.jsonl", held_out), 1e-3), _source("corpus", None, 1.0)]
    task = _task(tiny_llama_dir, tmp_path / "out", "corpus", None, sources=sources, held_out_fraction=0.0)
    metrics = tokenize.run(task)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    trained = {tokenizer.decode(ids) for ids in _documents(task.out, "train", tokenizer.eos_token_id)}
    kept = {row["text"] for row in _held_out(task.out)}
    assert trained & set(held_out) and kept  # the file's came first
    assert not trained & kept
    assert metrics["documents"]["held_out"] + len(trained & set(held_out)) == len(python_docs.documents(held_out=True))


def test_an_empty_one_of_several_sources_is_named(tiny_llama_dir: Path, tmp_path: Path) -> None:
    sources = [*_two(tmp_path, (1.0, 1.0)), _source("corpus", _jsonl(tmp_path / "blank.jsonl", [" "]))]
    with pytest.raises(UserError, match=r"data\.corpus\.2\.path.*blank"):
        tokenize.run(_task(tiny_llama_dir, tmp_path / "out", "corpus", None, sources=sources))


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
