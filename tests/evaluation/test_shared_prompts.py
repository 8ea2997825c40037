"""The options of a question get the scores that lm-eval computes with one prompt each, in fewer tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.models.huggingface import HFLM

from pipeline.evaluation.lm import LanguageModel
from pipeline.evaluation.shared_prompts import Request, batches_of, can_share_prompts, shared_prompts_of
from tests.family_coverage import tiny_model
from tests.tiny_families import save_tiny

PROMPT, LONGER, OPTIONS = list(range(5, 17)), list(range(30, 50)), [[3, 4], [9], [8, 7, 6, 5], [3, 9, 1]]


def _requests(*prompts: list[int]) -> list[Request]:
    """All options of every prompt, as lm-eval passes them."""
    return [(("", ""), prompt, option) for option in OPTIONS for prompt in prompts]


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", "gpt_neox"])
@pytest.mark.parametrize("batch_size", [1, 8])
def test_scores_are_those_of_lm_eval(family: str, batch_size: int, tmp_path: Path, tiny_tokenizer: Any) -> None:
    lm = LanguageModel(save_tiny(family, tmp_path / "model", tiny_tokenizer), torch.float32, "cpu", batch_size)
    seen: list[int] = []
    lm.model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].numel()))
    requests = [*_requests(PROMPT, LONGER, PROMPT[::-1]), (("", ""), [1], [2, 3]), (("", ""), [1], [4, 3])]
    found, tokens = lm._loglikelihood_tokens(requests), sum(seen)
    seen.clear()
    expected = HFLM._loglikelihood_tokens(lm, requests, disable_tqdm=True)
    assert tokens < 0.6 * sum(seen)
    for (value, is_greedy), (theirs, theirs_greedy) in zip(found, expected, strict=True):
        assert value == pytest.approx(theirs, rel=1e-5)
        assert is_greedy == theirs_greedy


@pytest.mark.parametrize("family", ["bamba", "deepseek_v32", "minimax", "mamba"])
def test_prompts_are_not_shared_where_cached_tokens_get_other_logits(family: str) -> None:
    assert not can_share_prompts(tiny_model(family).eval())


def test_only_prompts_worth_sharing_are_shared() -> None:
    limit = len(PROMPT) + 4
    assert [each.numbers for each in shared_prompts_of(_requests(PROMPT), limit)] == [[0, 1, 2, 3]]
    assert not shared_prompts_of(
        _requests(PROMPT), limit - 1
    )  # lm-eval cuts the prompt off for the longest option only
    assert not shared_prompts_of(_requests([1]), limit)
    assert not shared_prompts_of([(("", ""), PROMPT, [1])], limit)
    assert not shared_prompts_of([(("", ""), PROMPT, [1]), (("", ""), PROMPT, [2])], limit)  # lm-eval's own case


def test_batches_have_prompts_of_one_length_and_at_most_as_many_options_as_fit() -> None:
    questions = shared_prompts_of(_requests(LONGER, PROMPT, PROMPT[::-1], [*PROMPT[1:], 1]), 100)
    assert [[len(each.prompt) for each in batch] for batch in batches_of(questions, 8)] == [[12, 12], [12], [20]]
    assert [len(batch) for batch in batches_of(questions, 1)] == [1, 1, 1, 1]
