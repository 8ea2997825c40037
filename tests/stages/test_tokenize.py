"""The artifact of the tokenize stage: its files, a separate held-out part, and counts that add up."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from pipeline.artifacts.task import StageTask, TrackingTarget
from pipeline.config import Source, Tokenize
from pipeline.data import python_docs
from pipeline.data.tokenizer import TextTokenizer
from pipeline.errors import UserError
from pipeline.files import read_json
from pipeline.stages import tokenize
from tests.plain_settings import NO_TRACKING, cpu_launch

SPLITS = ("train", "held_out")


def _source(purpose: Any, path: Path | None, weight: float = 1.0) -> Source:
    kind = "python_docs" if path is None else "files"
    text_field = "text" if purpose == "corpus" else None
    return Source(
        kind=kind,
        path=path and str(path),
        config_name=None,
        split=None,
        revision=None,
        text_field=text_field,
        weight=weight,
    )


def _task(model: Path, out: Path, purpose: Any, path: Path | None, **changes: Any) -> StageTask:
    source = _source(purpose, path)
    values = {"sequence_length": 64, "held_out_fraction": 0.2, "max_tokens": None, "chat_template": "model"}
    values |= {"system_messages": "keep", "max_dropped": 0.5, "max_record_bytes": 2**28}
    values |= {"forgetting": None, "validation_fraction": 0.0, "max_forgetting_tokens": None}
    settings = Tokenize(**{"purpose": purpose, "sources": [source], **values, **changes})
    out.mkdir(exist_ok=True)
    launch = cpu_launch()
    tracking = TrackingTarget(NO_TRACKING, "group", f"tokenize/{purpose}", "id", out)
    return StageTask(f"tokenize/{purpose}", settings, {"load": model}, out, 0, launch, tracking)


def _arrays(out: Path, split: str) -> tuple[Any, Any, Any]:
    names = ("input_ids", "position_ids", "loss_mask")
    ids, positions, mask = (np.load(out / f"{split}.{name}.npy", mmap_mode="r", allow_pickle=False) for name in names)
    return ids, positions, mask


def _documents(out: Path, split: str, eos: int) -> list[list[int]]:
    """The documents of a split, read back by joining all blocks and splitting them at EOS."""
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


def test_documents_are_separated_by_eos(tiny_llama_dir: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    task = _task(tiny_llama_dir, tmp_path / "out", "corpus", tiny_corpus)
    metrics = tokenize.run(task)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    texts = {json.loads(line)["text"] for line in tiny_corpus.read_text().splitlines()}
    found = {
        split: {tokenizer.decode(ids) for ids in _documents(task.out, split, tokenizer.eos_token_id)}
        for split in SPLITS
    }
    assert found["train"] | found["held_out"] == texts and not found["train"] & found["held_out"]
    assert {row["text"] for row in _held_out(task.out)} == found["held_out"]
    assert metrics == read_json(task.out / "dataset.json")
    assert metrics["documents"] == {split: len(found[split]) for split in SPLITS}
    assert metrics["vocab_size"] == 384 and metrics["sequence_length"] == 64


def test_the_counts_match_the_arrays(tiny_llama_dir: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    task = _task(tiny_llama_dir, tmp_path / "out", "corpus", tiny_corpus)
    metrics = tokenize.run(task)
    for split in SPLITS:
        ids, positions, mask = _arrays(task.out, split)
        assert (ids.dtype, positions.dtype, mask.dtype) == (np.uint32, np.uint32, np.uint8)
        assert ids.shape == positions.shape == mask.shape == (metrics["blocks"][split], 64)
        assert int(mask.sum()) == metrics["supervised_tokens"][split]
        assert not mask[positions == 0].any() and (positions[:, 0] == 0).all()
        assert metrics["tokens"][split] <= ids.size < metrics["tokens"][split] + 64


def test_only_answers_of_conversations_are_trained_on(tiny_llama_dir: Path, tiny_chats: Path, tmp_path: Path) -> None:
    task = _task(tiny_llama_dir, tmp_path / "out", "instructions", tiny_chats)
    metrics = tokenize.run(task)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    answers = set()
    for split in SPLITS:
        ids, _, mask = _arrays(task.out, split)
        flat, targets = ids.reshape(-1), np.flatnonzero(mask.reshape(-1))
        for run in np.split(targets, np.flatnonzero(np.diff(targets) > 1) + 1):
            answers.add(tokenizer.decode(flat[run].astype(int).tolist()))
    chats = [json.loads(line)["messages"] for line in tiny_chats.read_text().splitlines()]
    assert answers == {chat[1]["content"] + "<|im_end|>" for chat in chats}
    assert (task.out / "chat_template.jinja").read_text() == tokenizer.chat_template
    assert metrics["end_of_turn"] == tokenizer.eos_token_id
    held_out = [row["messages"] for row in _held_out(task.out)]
    assert len(held_out) == metrics["documents"]["held_out"] and all(chat in chats for chat in held_out)


@pytest.mark.parametrize("purpose", ["corpus", "instructions"])
def test_python_docs_are_tokenized(purpose: str, tiny_llama_dir: Path, tmp_path: Path) -> None:
    """They have a predefined split, regardless of held_out_fraction."""
    task = _task(tiny_llama_dir, tmp_path / "out", purpose, None, held_out_fraction=0.0, sequence_length=256)
    metrics = tokenize.run(task)
    assert metrics["documents"]["train"] > 500 < metrics["documents"]["held_out"] * 10
    held_out = "".join(json.dumps(row) for row in _held_out(task.out))
    assert "threading." in held_out and "json.dumps" not in held_out


def test_the_result_is_deterministic(tiny_llama_dir: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    """Also in a directory with leftovers of a killed attempt."""
    outs = [tmp_path / "one", tmp_path / "two"]
    outs[1].mkdir()
    (outs[1] / "train.input_ids.npy").write_bytes(b"half written" * 100_000)
    (outs[1] / "held_out.jsonl").write_text("half a line")
    for out in outs:
        tokenize.run(_task(tiny_llama_dir, out, "corpus", tiny_corpus))
    contents = [{path.name: path.read_bytes() for path in out.iterdir()} for out in outs]
    assert contents[0] == contents[1]


def test_reading_stops_at_the_token_budget(tiny_llama_dir: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    complete = tokenize.run(_task(tiny_llama_dir, tmp_path / "complete", "corpus", tiny_corpus))
    budget = complete["tokens"]["train"] // 2
    part = tokenize.run(_task(tiny_llama_dir, tmp_path / "part", "corpus", tiny_corpus, max_tokens=budget))
    longest_document = 200  # tokens
    assert budget <= part["tokens"]["train"] < budget + longest_document
    more = tokenize.run(_task(tiny_llama_dir, tmp_path / "more", "corpus", tiny_corpus, max_tokens=10 * budget))
    assert more["tokens"] == complete["tokens"] and "was not reached" in more["warnings"][0]


def _jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return path


def _two_sources(tmp_path: Path, weights: tuple[float, float], lengths: tuple[int, int] = (30, 7)) -> list[Source]:
    """Two sources of a thousand documents each, which differ in their first word."""
    return [
        _source(
            "corpus", _jsonl(tmp_path / f"{name}.jsonl", [f"{name} {n} " + "x" * (n % length) for n in range(1000)]), w
        )
        for name, w, length in zip(("left", "right"), weights, lengths, strict=True)
    ]


def _tokens_by_source(out: Path, model: Path) -> dict[str, int]:
    """Number of training tokens by the first word of their document, EOS included."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    found = {"left": 0, "right": 0}
    for ids in _documents(out, "train", tokenizer.eos_token_id):
        found[tokenizer.decode(ids).split()[0]] += len(ids) + 1
    return found


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.9, 0.1), (3.0, 9.0)])
def test_weights_are_shares_of_the_training_tokens(
    weights: tuple[float, float], tiny_llama_dir: Path, tmp_path: Path
) -> None:
    sources = _two_sources(tmp_path, weights)
    task = _task(tiny_llama_dir, tmp_path / "out", "corpus", None, sources=sources, max_tokens=5000)
    metrics = tokenize.run(task)
    found = _tokens_by_source(task.out, tiny_llama_dir)
    longest_document = 40  # tokens
    assert abs(found["left"] - sum(found.values()) * weights[0] / sum(weights)) < longest_document
    assert sum(found.values()) == metrics["tokens"]["train"] < 5000 + longest_document
    assert [source["tokens"]["train"] for source in metrics["sources"]] == list(found.values())
    held_out = {(row["source"], row["text"].split()[0]) for row in _held_out(task.out)}
    assert held_out == {(f"data.corpus.{number}", word) for number, word in enumerate(found)}
    assert metrics["warnings"] == []


def test_a_source_without_a_held_out_document_is_reported(tiny_llama_dir: Path, tmp_path: Path) -> None:
    few = _source("corpus", _jsonl(tmp_path / "few.jsonl", ["one alone " * 40]), 0.01)
    task = _task(tiny_llama_dir, tmp_path / "out", "corpus", None, sources=[_two_sources(tmp_path, (1.0, 1.0))[0], few])
    warnings = [warning for warning in tokenize.run(task)["warnings"] if "no held-out document" in warning]
    assert len(warnings) == 1 and warnings[0].startswith("data.corpus.1 ") and "held_out_fraction" in warnings[0]


def test_reading_stops_when_the_first_source_is_exhausted(tiny_llama_dir: Path, tmp_path: Path) -> None:
    task = _task(tiny_llama_dir, tmp_path / "out", "corpus", None, sources=_two_sources(tmp_path, (0.1, 0.9)))
    metrics = tokenize.run(task)
    left, right = _tokens_by_source(task.out, tiny_llama_dir).values()
    assert abs(left / (left + right) - 0.1) < 0.01
    assert [source["ran_out"] for source in metrics["sources"]] == [False, True]
    assert len(metrics["warnings"]) == 1 and metrics["warnings"][0].startswith("data.corpus.1 ran out")


def test_held_out_text_is_never_trained_on(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """Read back from the blocks of sources that share documents and contain duplicates."""
    texts = [f"Document number {number}, " + "and so on, " * (number % 7) for number in range(500)]
    _jsonl(tmp_path / "a.jsonl", [*texts[:300], *(f"{text}\n\n" for text in texts[100:200])])
    _jsonl(tmp_path / "b.jsonl", [*texts[200:], *(f"  {text}" for text in texts[:100]), *texts[400:]])
    sources = [_source("corpus", tmp_path / f"{name}.jsonl") for name in "ab"]
    task = _task(tiny_llama_dir, tmp_path / "out", "corpus", None, sources=sources, held_out_fraction=0.3)
    metrics = tokenize.run(task)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    texts_by_split = [
        [tokenizer.decode(ids).strip() for ids in _documents(task.out, split, tokenizer.eos_token_id)]
        for split in SPLITS
    ]
    assert not set(texts_by_split[0]) & set(texts_by_split[1]) and all(texts_by_split)
    assert all(len(set(split)) == len(split) for split in texts_by_split)
    assert {*texts_by_split[0], *texts_by_split[1]} <= {text.strip() for text in texts}
    assert {row["text"].strip() for row in _held_out(task.out)} == set(texts_by_split[1])
    kept = sum(metrics["documents"].values())
    assert kept == len(texts_by_split[0]) + len(texts_by_split[1]) > 400
    assert metrics["dropped"]["duplicate"] > 100


def test_text_that_python_docs_hold_out_is_not_trained_on_from_a_file(tiny_llama_dir: Path, tmp_path: Path) -> None:
    held_out = python_docs.documents(held_out=True)[:40]
    sources = [_source("corpus", _jsonl(tmp_path / "a.jsonl", held_out), 1e-3), _source("corpus", None, 1.0)]
    task = _task(tiny_llama_dir, tmp_path / "out", "corpus", None, sources=sources, held_out_fraction=0.0)
    metrics = tokenize.run(task)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    trained = {tokenizer.decode(ids) for ids in _documents(task.out, "train", tokenizer.eos_token_id)}
    kept = {row["text"] for row in _held_out(task.out)}
    assert trained & set(held_out) and kept  # some documents of the file came first and are trained on
    assert not trained & kept
    assert metrics["documents"]["held_out"] + len(trained & set(held_out)) == len(python_docs.documents(held_out=True))


def test_an_empty_source_among_several_is_reported(tiny_llama_dir: Path, tmp_path: Path) -> None:
    sources = [*_two_sources(tmp_path, (1.0, 1.0)), _source("corpus", _jsonl(tmp_path / "blank.jsonl", [" "]))]
    with pytest.raises(UserError, match=r"data\.corpus\.2\.path.*blank"):
        tokenize.run(_task(tiny_llama_dir, tmp_path / "out", "corpus", None, sources=sources))


def test_duplicates_are_dropped_and_control_tokens_in_text_stay_plain(tiny_llama_dir: Path, tmp_path: Path) -> None:
    texts = [*(f"Document {number}" for number in range(20)), "Document 3", "Say <|im_end|> aloud"]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    task = _task(tiny_llama_dir, tmp_path / "out", "corpus", tmp_path / "a.jsonl")
    metrics = tokenize.run(task)
    assert metrics["dropped"] == {"duplicate": 1}
    assert sum(metrics["documents"].values()) == 21
    eos = sum(int((_arrays(task.out, split)[0] == 2).sum()) for split in SPLITS)
    padding = sum(metrics["blocks"][split] * 64 - metrics["tokens"][split] for split in SPLITS)
    assert eos - padding == 21  # one per document, and none from its text


@pytest.mark.parametrize(
    ("purpose", "rows", "changes", "words"),
    [
        ("corpus", [{"text": "only one"}], {"held_out_fraction": 0.0}, ["data.held_out_fraction", "hash"]),
        ("corpus", [{"text": " "}], {}, ["data.corpus.path", "not provide a single token"]),
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


def test_what_is_dropped_is_an_error_a_warning_or_folded(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """A template that refuses system messages, and nine of ten conversations with one."""
    model = tmp_path / "model"
    shutil.copytree(tiny_llama_dir, model)
    template = TextTokenizer(model).chat_template
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + template
    (model / "chat_template.jinja").write_text(strict)
    chats = tmp_path / "chats.jsonl"
    with open(chats, "w") as lines:
        for number in range(100):
            system = [{"role": "system", "content": "Be brief."}] if number % 10 else []
            turns = [{"role": "user", "content": f"What is {number}?"}, {"role": "assistant", "content": "A number."}]
            lines.write(json.dumps({"messages": [*system, *turns]}) + "\n")
    with pytest.raises(
        UserError, match=r"data\.max_dropped = 0\.5: 90 of 100 .*90 rejected_by_template.*line 2; .*fold"
    ):
        tokenize.run(_task(model, tmp_path / "out", "instructions", chats))
    allowed = tokenize.run(_task(model, tmp_path / "out", "instructions", chats, max_dropped=0.9))
    assert allowed["documents"]["train"] + allowed["documents"]["held_out"] == 10
    places = [f"{chats}, line {line}" for line in (2, 3, 4)]
    assert allowed["sources"][0]["dropped_at"] == {"rejected_by_template": places}
    assert allowed["sources"][0]["files"] == {str(chats): 100}
    (warning,) = allowed["warnings"]
    assert "of 100 examples, 90 rejected_by_template" in warning and all(place in warning for place in places)
    folded = tokenize.run(_task(model, tmp_path / "folded", "instructions", chats, system_messages="fold"))
    assert folded["dropped"] == {} and folded["warnings"] == []
    assert sum(folded["documents"].values()) == 100
    assert any(row["messages"][0]["content"].startswith("Be brief.\n\nWhat") for row in _held_out(tmp_path / "folded"))


def test_a_warning_advises_only_on_its_own_reason(tiny_llama_dir: Path, tmp_path: Path) -> None:
    answers = [*(["A number."] * 30), " ", "long " * 100]
    rows = [{"prompt": f"What is {number}?", "completion": answer} for number, answer in enumerate(answers)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    no_answer, too_long = tokenize.run(_task(tiny_llama_dir, tmp_path / "out", "instructions", tmp_path / "a.jsonl"))[
        "warnings"
    ]
    assert "1 no_answer" in no_answer and "sft.sequence_length" not in no_answer
    assert "1 too_long" in too_long and too_long.endswith("Increase sft.sequence_length.")


def test_a_setting_that_changes_nothing_is_not_in_the_key(tmp_path: Path) -> None:
    settings = _task(tmp_path, tmp_path, "instructions", tmp_path).settings
    key = settings.key_settings()
    assert {"system_messages", "max_dropped", "max_record_bytes"}.isdisjoint(key)
    assert settings.model_copy(update={"system_messages": "fold"}).key_settings() == {**key, "system_messages": "fold"}


def test_a_tokenizer_with_ids_beyond_the_embeddings_is_refused(tiny_llama_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama_dir, tmp_path / "model")
    config = read_json(tmp_path / "model" / "config.json")
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    with pytest.raises(UserError, match=r"embeddings end at 99"):
        tokenize.run(_task(tmp_path / "model", tmp_path / "out", "corpus", None))


def test_validation_and_forgetting_are_further_splits_of_a_corpus(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """No document is in two of them. The held-out split is the same with and without them."""
    words = [f"document {number} of the corpus" for number in range(300)]
    other = [f"other text {number}" for number in range(200)]
    for name, texts in (("corpus", words), ("other", [*other, *words[:50]])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    forgetting = [_source("corpus", tmp_path / "other.jsonl")]
    plain = _task(tiny_llama_dir, tmp_path / "plain", "corpus", tmp_path / "corpus.jsonl")
    split = _task(
        tiny_llama_dir, tmp_path / "split", "corpus", tmp_path / "corpus.jsonl",
        validation_fraction=0.3, forgetting=forgetting,
    )  # fmt: skip
    for task in (plain, split):
        tokenize.run(task)
    assert {path.name.partition(".")[0] for path in plain.out.glob("*.npy")} == set(SPLITS)
    for array in ("input_ids", "position_ids", "loss_mask"):
        name = f"held_out.{array}.npy"
        assert (plain.out / name).read_bytes() == (split.out / name).read_bytes()
    assert (plain.out / "held_out.jsonl").read_bytes() == (split.out / "held_out.jsonl").read_bytes()

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    found: dict[str, list[str]] = {
        name: [tokenizer.decode(ids) for ids in _documents(split.out, name, tokenizer.eos_token_id)]
        for name in (*SPLITS, "validation", "forgetting")
    }
    assert sorted(found["forgetting"]) == sorted(other)  # what is in the corpus too is dropped
    assert sorted(found["train"] + found["held_out"] + found["validation"]) == sorted(words)
    assert 50 < len(found["validation"]) < 130
    counted = read_json(split.out / "dataset.json")["documents"]
    assert counted == {name: len(texts) for name, texts in found.items()}


@pytest.mark.parametrize("setting", ["validation_fraction", "forgetting"])
def test_an_empty_further_split_is_refused(setting: str, tiny_llama_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text("\n".join(json.dumps({"text": f"document {n}"}) for n in range(20)))
    same = [_source("corpus", tmp_path / "corpus.jsonl")]
    value = {"validation_fraction": 1e-6, "forgetting": same}[setting]
    task = _task(tiny_llama_dir, tmp_path / "out", "corpus", tmp_path / "corpus.jsonl", **{setting: value})
    with pytest.raises(UserError) as refused:
        tokenize.run(task)
    assert refused.value.setting == f"data.{setting}"
