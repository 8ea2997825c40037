"""Scores the options of a question with one pass over their common prompt. lm-eval computes the prompt once per option.

Shape suffixes: Q questions, O options of all of them, P tokens of a prompt, T tokens of an option, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch.nn.functional import log_softmax
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

Request = tuple[tuple[str, str], list[int], list[int]]  # (context, continuation), and the token ids of each
Answer = tuple[float, bool]  # log likelihood in nats, and whether greedy decoding gives the continuation
PLAIN_CACHES = (DynamicLayer, DynamicSlidingWindowLayer)


@dataclass(frozen=True)
class SharedPrompt:
    """A prompt and its options: token ids, and the number of every option among the requests."""

    prompt: list[int]
    options: list[list[int]]
    numbers: list[int]


def shared_prompts_of(requests: Sequence[Request], max_length: int) -> list[SharedPrompt]:
    """Returns the prompts worth sharing, shortest first.

    Left out are options of a single token, which lm-eval scores together itself, prompts shorter than their longest
    option, and prompts that have to be cut off.

    Args:
        requests: as lm-eval's ``_loglikelihood_tokens`` receives them.
        max_length: tokens that the model reads at most.
    """
    by_prompt: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for number, request in enumerate(requests):
        by_prompt[tuple(request[1])].append(number)
    questions = []
    for prompt, numbers in by_prompt.items():
        options = [requests[number][2] for number in numbers]
        longest = max(map(len, options))
        if len(options) > 1 and 1 < longest <= len(prompt) and len(prompt) + longest <= max_length:
            questions.append(SharedPrompt(list(prompt), options, numbers))
    return sorted(questions, key=lambda question: len(question.prompt))


def batches_of(questions: Sequence[SharedPrompt], batch_size: int) -> Iterator[list[SharedPrompt]]:
    """Yields questions with prompts of equal length, which need no padding.

    Args:
        questions: sorted by the length of their prompts.
        batch_size: the number of options per batch, unless a single question has more.
    """
    for _, equal in groupby(questions, key=lambda question: len(question.prompt)):
        batch: list[SharedPrompt] = []
        for question in equal:
            if batch and sum(len(each.options) for each in [*batch, question]) > batch_size:
                yield batch
                batch = []
            batch.append(question)
        yield batch


@torch.no_grad()
def can_share_prompts(model: Any) -> bool:
    """Returns whether several tokens after a cached prompt have the logits that they have without a cache.

    That holds for caches of the keys and values of all tokens, or of those in a sliding window. State-space layers
    advance their states by one token at a time, and some indexers of sparse attention select other tokens.
    """
    output = model(torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=True)
    cache: Any = getattr(output, "past_key_values", None)
    return type(cache) is DynamicCache and all(type(layer) in PLAIN_CACHES for layer in cache.layers)


@torch.no_grad()
def score_options(model: Any, batch: Sequence[SharedPrompt]) -> list[Answer]:
    """Returns the answers for all options of some questions, in their order.

    Args:
        model: a causal language model of transformers in evaluation mode that ``can_share_prompts``.
        batch: questions with prompts of equal length.
    """
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    ids_QP = torch.tensor([question.prompt for question in batch], device=model.device)
    prompts = model(ids_QP, use_cache=True, **last_only)
    question_O = torch.tensor([q for q, each in enumerate(batch) for _ in each.options], device=model.device)
    options = [option for question in batch for option in question.options]
    longest = max(map(len, options))
    # The logits of the first tokens are those at the end of the prompts. Padding follows an option and changes nothing.
    inputs_OT = torch.tensor([[*option, *[0] * (longest - len(option))][:-1] for option in options]).to(model.device)
    prompts.past_key_values.reorder_cache(question_O)
    later_OTV = model(inputs_OT, past_key_values=prompts.past_key_values, use_cache=True).logits
    logits_OTV = torch.cat([prompts.logits[question_O, -1:], later_OTV], dim=1)
    return [_answer(logits_TV[: len(option)], option) for logits_TV, option in zip(logits_OTV, options, strict=True)]


def _answer(logits_TV: torch.Tensor, option: list[int]) -> Answer:
    ids_T = torch.tensor(option, device=logits_TV.device)
    log_likelihoods = log_softmax(logits_TV, dim=-1, dtype=torch.float32).gather(1, ids_T[:, None])
    return float(log_likelihoods.sum()), bool((logits_TV.argmax(dim=1) == ids_T).all())
