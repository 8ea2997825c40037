"""Several processes score the batches of a single one, and get exactly its answers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from pipeline.evaluation.lm import LanguageModel
from pipeline.evaluation.sharing import BatchTurns, ScoringRanks, own_requests

RANKS = 3
PAIRS = [("The capital is", f" {city}") for city in ("Paris", "Lima", "Rome", "Quito")]
PAIRS += [("word " * length, ending) for length in (1, 3, 9) for ending in ("a", "b")]  # differ in the last token
TEXTS = [("The quick brown fox. " * length,) for length in (1, 40, 2, 90, 3, 5, 1)]
GREEDY = {"until": ["\n"], "max_gen_toks": 5}
PROMPTS = [(f"Repeat{' please' * number}:", GREEDY) for number in range(7)]
SAMPLED = [(prompt, {**GREEDY, "do_sample": True, "temperature": 1.0}) for prompt, _ in PROMPTS]


def run_ranks(function: Callable[[int], Any]) -> list[Any]:
    """Returns what a function returns for each of several ranks, which are threads here."""
    with ThreadPoolExecutor(RANKS) as threads:
        return list(threads.map(function, range(RANKS), timeout=60))


def test_every_rank_gets_what_all_have_gathered(tmp_path: Path) -> None:
    ranks = [ScoringRanks(rank, RANKS, tmp_path) for rank in range(RANKS)]
    found = run_ranks(lambda rank: [ranks[rank].gather([rank, time], "a part") for time in range(20)])
    assert found == RANKS * [[[[rank, time] for rank in range(RANKS)] for time in range(20)]]
    assert len(list(tmp_path.glob("part-*.json"))) <= 2 * RANKS


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("loglikelihood", PAIRS), ("loglikelihood_rolling", TEXTS), ("generate_until", PROMPTS),
        ("generate_until", SAMPLED),
    ],
)  # fmt: skip
def test_the_answers_are_exactly_those_of_one_process(
    kind: Any, arguments: list[tuple[Any, ...]], tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [Instance(kind, {}, arguments=each, idx=0) for each in arguments]
    batches: dict[HFLM, list[Any]] = {}
    for name, method in {"_model_call": HFLM._model_call, "_model_generate": HFLM._model_generate}.items():

        def record(lm: HFLM, ids: torch.Tensor, *rest: Any, compute: Any = method, **details: Any) -> Any:
            batches.setdefault(lm, []).append(ids.tolist())
            return compute(lm, ids, *rest, **details)

        monkeypatch.setattr(HFLM, name, record)

    def answer(lm: LanguageModel) -> Any:
        return getattr(lm, kind)(requests), lm.first_tokens

    groups = [ScoringRanks(), *(ScoringRanks(rank, RANKS, tmp_path) for rank in range(RANKS))]
    alone, *together = (LanguageModel(tiny_llama_dir, torch.float32, "cpu", 2, ranks) for ranks in groups)
    torch.manual_seed(1)
    expected = answer(alone)
    torch.manual_seed(1)
    assert run_ranks(lambda rank: answer(together[rank])) == [expected] * RANKS
    assert len(expected[0]) == len(arguments)
    computed = [batches.get(lm, []) for lm in together]
    assert sorted(itertools.chain(*computed)) == sorted(batches[alone])
    most = max(map(len, computed))
    assert most == len(batches[alone]) if arguments is SAMPLED else most <= len(batches[alone]) / 2


def test_a_batch_is_computed_by_one_rank_and_those_in_order_by_the_first(tmp_path: Path) -> None:
    def run(rank: int) -> tuple[list[int], list[int]]:
        turns, computed = BatchTurns(ScoringRanks(rank, RANKS, tmp_path)), []

        def compute(number: int) -> int:
            computed.append(number)
            return 10 * number

        def method() -> list[int]:
            return [turns.result_of(lambda: compute(number), 0, in_order=number > 5) for number in range(8)]  # noqa: B023

        return turns.run(method), computed

    found = run_ranks(run)
    assert [answers for answers, _ in found] == [[10 * number for number in range(8)]] * RANKS
    assert [computed for _, computed in found] == [[0, 3, 6, 7], [1, 4], [2, 5]]


def test_requests_that_differ_in_the_last_token_stay_together() -> None:
    requests = [(None, [1, 2], [3]), (None, [9], [9]), (None, [1, 2], [4]), (None, [5, 6], [7, 8])]
    assert own_requests(requests, 1, ScoringRanks()) == [0, 1, 2, 3]
    assert [own_requests(requests, 1, ScoringRanks(rank, 2)) for rank in range(2)] == [[1, 3], [0, 2]]
