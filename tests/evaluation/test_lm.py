"""Likelihoods compared with plain transformers, one BOS token per sequence, and bounded memory."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.evaluation.lm import LOGITS_BYTES, LanguageModel

TEXTS = ["Return the number of items.", "The quick brown fox. " * 40, "def add(a, b):\n    return a + b"]


def _lm(directory: Path, batch_size: int = 4) -> LanguageModel:
    return LanguageModel(directory, torch.float32, "cpu", batch_size)


def _requests(kind: Any, *arguments: tuple[str, ...]) -> list[Instance]:
    return [Instance(kind, {}, arguments=pair, idx=0) for pair in arguments]


def _loglikelihood(directory: Path, ids: list[int], first_scored: int) -> float:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(logits[at - 1, ids[at]].item() for at in range(first_scored, len(ids)))


def test_the_score_of_a_continuation_matches_transformers(tiny_llama_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    pairs = [("json.dumps\n   ", " Return a string."), ("x", " y"), ("", "The whole sentence.")]
    found = _lm(tiny_llama_dir).loglikelihood(_requests("loglikelihood", *pairs))
    for (context, continuation), (value, _) in zip(pairs, found, strict=True):
        before = tokenizer(context.rstrip()).input_ids if context else [tokenizer.bos_token_id]
        ids = tokenizer(context + continuation).input_ids if context else [*before, *tokenizer(continuation).input_ids]
        assert value == pytest.approx(_loglikelihood(tiny_llama_dir, ids, len(before)), rel=1e-4)


def test_scores_in_bfloat16_are_those_of_a_float32_softmax(tiny_llama_dir: Path) -> None:
    lm = LanguageModel(tiny_llama_dir, torch.bfloat16, "cpu", 1)
    context, continuation = "json.dumps\n   ", " Return a string."
    ((value, _),) = lm.loglikelihood(_requests("loglikelihood", (context, continuation)))
    before = len(lm.tok_encode(context.rstrip()))
    ids = torch.tensor([lm.tok_encode(context + continuation)])
    with torch.no_grad():
        logits = lm.model(ids[:, :-1]).logits[0]
    assert logits.dtype == torch.bfloat16
    scores = logits.double().log_softmax(-1)
    expected = scores[torch.arange(before - 1, ids.shape[1] - 1), ids[0, before:]].sum().item()
    assert value == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("model", ["tiny_llama_dir", "tiny_llama_with_bos"])
def test_a_text_is_scored_after_exactly_one_bos_token(model: str, request: pytest.FixtureRequest) -> None:
    directory = request.getfixturevalue(model)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    lm = _lm(directory)
    found = lm.loglikelihood_rolling(_requests("loglikelihood_rolling", (TEXTS[0],), (TEXTS[2],)))
    for text, value in zip((TEXTS[0], TEXTS[2]), found, strict=True):
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids]
        assert value == pytest.approx(_loglikelihood(directory, ids, 1), rel=1e-4)
    assert lm.first_tokens.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("model", ["tiny_llama_dir", "tiny_llama_with_bos"])
def test_a_text_longer_than_the_context_is_scored_in_windows(model: str, request: pytest.FixtureRequest) -> None:
    """Every token is scored once: the first 256 after BOS, and further ones after the last token of the one before."""
    directory = request.getfixturevalue(model)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    text = "Return the number of items. " * 80
    ids = tokenizer(text, add_special_tokens=False).input_ids
    (found,) = _lm(directory).loglikelihood_rolling(_requests("loglikelihood_rolling", (text,)))
    context = 256
    assert len(ids) > 2 * context
    windows = [[tokenizer.bos_token_id, *ids[:context]]]
    windows += [ids[start - 1 : start + context] for start in range(context, len(ids), context)]
    # lm-eval fills the last window with context that precedes its tokens.
    expected = sum(_loglikelihood(directory, window, 1) for window in windows[:-1])
    last = ids[-context - 1 :]
    expected += _loglikelihood(directory, last, len(last) - (len(windows[-1]) - 1))
    assert found == pytest.approx(expected, rel=1e-4)


def test_a_text_may_begin_with_the_bos_token(tiny_llama_with_bos: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_with_bos)
    text = "<|endoftext|>" + TEXTS[0]
    (found,) = _lm(tiny_llama_with_bos).loglikelihood_rolling(_requests("loglikelihood_rolling", (text,)))
    ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids]
    assert ids[1] == tokenizer.bos_token_id
    assert found == pytest.approx(_loglikelihood(tiny_llama_with_bos, ids, 1), rel=1e-4)


def test_contexts_begin_with_the_bos_token_of_the_tokenizer(tiny_llama_with_bos: Path) -> None:
    lm = _lm(tiny_llama_with_bos)
    lm.loglikelihood(_requests("loglikelihood", ("A context", " and more")))
    assert lm.first_tokens[0] == lm.tokenizer.bos_token_id != lm.first_tokens[1]
    lm.start("chat: the template contains the BOS token")
    lm.loglikelihood(_requests("loglikelihood", ("<|endoftext|>A context", " and more")))
    assert lm.first_tokens[0] == lm.tokenizer.bos_token_id != lm.first_tokens[1]


def test_two_bos_tokens_fail_an_assertion(tiny_llama_with_bos: Path) -> None:
    with pytest.raises(AssertionError, match="two beginning-of-sequence"):
        _lm(tiny_llama_with_bos).loglikelihood(_requests("loglikelihood", ("<|endoftext|><|endoftext|>A", " b")))


def test_scores_do_not_depend_on_the_batch_size(tiny_llama_dir: Path) -> None:
    requests = _requests("loglikelihood_rolling", *((text,) for text in TEXTS))
    one, many = (_lm(tiny_llama_dir, size).loglikelihood_rolling(requests) for size in (1, 8))
    assert one == pytest.approx(many, rel=1e-4)


def test_long_sequences_are_scored_in_smaller_batches(tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits over 384 tokens, twice, in float32 take 3072 bytes per position."""
    monkeypatch.setitem(LOGITS_BYTES, "cpu", 100 * 3072)
    lm = _lm(tiny_llama_dir, batch_size=16)
    sizes: list[tuple[int, int]] = []
    call = lm.model.forward
    monkeypatch.setattr(lm.model, "forward", lambda ids, **more: sizes.append(tuple(ids.shape)) or call(ids, **more))
    lm.loglikelihood(_requests("loglikelihood", *(("word " * length, "end") for length in (1, 2, 20, 30))))
    lm.loglikelihood_rolling(_requests("loglikelihood_rolling", *((text,) for text in TEXTS)))
    assert all(batch == 1 or batch * tokens <= 100 for batch, tokens in sizes)


def test_weights_have_the_requested_dtype(tiny_llama_dir: Path) -> None:
    lm = LanguageModel(tiny_llama_dir, torch.bfloat16, "cpu", 1)
    assert {parameter.dtype for parameter in lm.model.parameters()} == {torch.bfloat16}


def test_progress_counts_sequences(tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    advanced: list[float] = []
    bar = SimpleNamespace(advance=lambda count, **numbers: advanced.append(count))

    class Shown:
        def __enter__(self) -> SimpleNamespace:
            return bar

        def __exit__(self, *details: object) -> None:
            pass

    monkeypatch.setattr("pipeline.evaluation.lm.progress", lambda label, total: Shown())
    _lm(tiny_llama_dir).loglikelihood(_requests("loglikelihood", *(("a b", f" c {number} d") for number in range(9))))
    assert sum(advanced) == 9
